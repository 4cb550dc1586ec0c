"""Other processors on this one: which kernels the libraries may use, and a test run under each of them.

``python tests/support/processors.py [options of pytest]`` runs :data:`SENSITIVE` in random order under each capability
that this processor has. Only torch, MKL, oneDNN, OpenBLAS and NumPy choose by these variables; the
C library's own choice stays the processor's.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent.parent
SENSITIVE = (
    "test_agreement.py",
    "distillation/test_run.py",
    "distillation/test_losses.py",
    "distillation/test_planted_facts.py",
    "federation/test_rounds.py",
    "inference/test_bootstrap.py",
    "models/test_adapter.py",
    "models/test_residual.py",
    "models/test_demo_large.py",
    "models/test_eva.py",
    "models/test_families.py",
    "models/test_initial.py",
    "models/test_peft_export.py",
    "models/test_quantized.py",
    "training/test_bfloat16.py",
    "training/test_every_loss.py",
    "training/test_local.py",
    "training/test_steps.py",
    "training/test_units.py",
)
"""Files whose figures kernels can move: what is learned, tolerances of floats, hashes that machines compare."""
_NUMPY = ("X86_V3", "X86_V4", "AVX512_ICL", "AVX512_SPR", "FMA3", "AVX2", "AVX512F")
KERNELS: dict[str, dict[str, str]] = {
    "default": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "OPENBLAS_CORETYPE": "Nehalem",
        "NPY_DISABLE_CPU_FEATURES": " ".join(_NUMPY),
    },
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512F AVX512_ICL AVX512_SPR",
    },
    "native": {},
}
"""Capability to environment; native is whatever the processor has."""


def environment(kernels: str) -> dict[str, str]:
    """This process's environment with one capability's kernels and no other's."""
    chosen = {name for each in KERNELS.values() for name in each}
    kept = {name: value for name, value in os.environ.items() if name not in chosen}
    return {**kept, **KERNELS[kernels]}


def native() -> str:
    """What torch calls the best kernels of this processor, as a process without limits finds it."""
    code = "import torch; print(torch.backends.cpu.get_cpu_capability())"
    command = [sys.executable, "-c", code]
    environ = environment("native")
    return subprocess.run(
        command, env=environ, capture_output=True, text=True, check=True
    ).stdout.strip()


def why_not(kernels: str, best: str) -> str:
    """Why this processor cannot compute with a capability's kernels; "" if it can.

    >>> why_not("avx2", "DEFAULT")
    'this processor has no avx2 (its best is DEFAULT)'
    >>> why_not("native", "AVX2")
    'native is avx2 here'
    >>> why_not("avx2", "AVX512")
    ''
    """
    if kernels == "avx2" and best not in ("AVX2", "AVX512"):
        return f"this processor has no avx2 (its best is {best})"
    if kernels == "native" and best in ("DEFAULT", "AVX2"):
        return f"native is {best.lower()} here"
    return ""


def main(options: list[str]) -> int:
    """Runs the sensitive files under each capability; the first failing status, else 0."""
    best, status = native(), 0
    for kernels in KERNELS:
        if why := why_not(kernels, best):
            print(f"kernels {kernels}: skipped, {why}", flush=True)
            continue
        seed = random.SystemRandom().randrange(2**32)
        order = ["-p", "randomly", f"--randomly-seed={seed}"]
        print(f"kernels {kernels}: random order, --randomly-seed={seed}", flush=True)
        files = [str(HERE / file) for file in SENSITIVE]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", *order, *files, *options]
        status = status or subprocess.run(command, env=environment(kernels), check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
