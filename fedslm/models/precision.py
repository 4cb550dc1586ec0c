"""The precision in which a frozen base computes, and which devices have bfloat16 in hardware.

``model.dtype = "auto"`` is a rule and not a measurement: equal machines decide alike, busy or not. It
gives bfloat16 for a base of at least :data:`LEAST_PARAMETERS` on a device that multiplies bfloat16 in
hardware, otherwise float32. The adapter, the gradients that are clipped, sum and noise are float32 or
wider in both, so clients that decide differently fit into one federation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Literal

from fedslm.config import DistillConfig, ModelConfig
from fedslm.errors import Problem

if TYPE_CHECKING:
    import torch

LEAST_PARAMETERS = 100_000_000
NO_FLOAT16 = (
    'value "float16" would turn small gradients into zero, since no loss is scaled; use "bfloat16" or '
    '"float32"'
)
_EMULATING = {"AVX512_CORE", "AVX512_CORE_VNNI", "AVX2_VNNI_2"}  # oneDNN's levels that take bfloat16


def chosen(
    model: ModelConfig, device: torch.device, parameters: Callable[[], int]
) -> Literal["float32", "bfloat16", "float16"]:
    """Returns the precision of a base on a device.

    Args:
        model: The base; "auto" follows the rule of this module.
        device: The device that computes.
        parameters: Counts the base's parameters, without new heads; called only if the count matters.
    """
    if model.dtype != "auto":
        return model.dtype
    return "bfloat16" if is_native(device) and parameters() >= LEAST_PARAMETERS else "float32"


def is_native(device: torch.device) -> bool:
    """Returns whether a device multiplies bfloat16 matrices in hardware.

    * CPU: what oneDNN may use here: AVX512-BF16 (and AMX) on x86, FEAT_BF16 on Arm. Limits that an
      operator sets (``ONEDNN_MAX_CPU_ISA``) count; other kernels than oneDNN's do not.
    * CUDA: compute capability 8.0 or later; ROCm.
    * Apple GPUs: no. The first two generations emulate bfloat16 (huggingface/transformers pull request
      40458), and a base of 126 M parameters was 17 % slower in it on an M4 (karpathy/nanochat issue
      685).
    """
    import torch

    match device.type:
        case "cpu":
            return _cpu_is_native()
        case "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False


def warning(model: ModelConfig, device: torch.device) -> str:
    """Returns a warning if a config asks for bfloat16 on a device that emulates it; otherwise ""."""
    if model.dtype != "bfloat16" or is_native(device):
        return ""
    return (
        f'model.dtype="bfloat16" is emulated on this {device.type}: it takes less memory than float32, '
        f'but usually far more time; use "auto" or "float32"'
    )


def problems(model: ModelConfig, distill: DistillConfig, *, shares_passes: bool) -> Iterator[Problem]:
    """Yields what cannot be trained.

    Args:
        model: The base.
        distill: The student.
        shares_passes: Whether units of private training share passes.
    """
    for key, dtype in (("model.dtype", model.dtype), ("distill.dtype", distill.dtype)):
        if dtype == "float16":
            yield Problem(key, NO_FLOAT16)
    if shares_passes and model.dtype == "bfloat16":
        message = (
            'value "bfloat16" must be "auto" or "float32" with privacy.passes="shared": in a shared '
            "pass its rounding lets units change one another's gradients by 1 % and more"
        )
        yield Problem("model.dtype", message)


def _cpu_is_native() -> bool:
    """Returns whether oneDNN computes products in bfloat16 without widening."""
    import torch

    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False  # Apple's processors have the instructions, but torch has no kernels with them
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    found = torch.cpu.get_capabilities()
    if found["architecture"] != "x86_64":
        return True
    # On x86 oneDNN also accepts bfloat16 where it emulates it, more slowly than float32.
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or ""
    has_products = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return has_products and limit.upper() not in _EMULATING
