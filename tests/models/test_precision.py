"""Which precision "auto" gives: a rule of device and size, the same in every process of a machine."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import processors

from fedslm.config import LoraConfig, ModelConfig, TaskConfig
from fedslm.models import precision
from fedslm.models.base import decided
from fedslm.models.footprint import footprint
from fedslm.models.loaded import load

CPU, TASK = torch.device("cpu"), TaskConfig(name="causal-lm", max_length=32)
LARGE = precision.LEAST_PARAMETERS


def base(dtype: str = "auto", where: Path | str = "demo") -> ModelConfig:
    """A base on the CPU."""
    return ModelConfig(base=str(where), device="cpu", dtype=dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("count", [0, LARGE - 1, LARGE, 10 * LARGE])
def test_auto_is_bfloat16_for_a_large_base_in_hardware(
    native: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both conditions are needed, and what is asked for by name is what is used."""
    monkeypatch.setattr(precision, "is_native", lambda device: native)
    expected = "bfloat16" if native and count >= LARGE else "float32"
    assert precision.chosen(base(), CPU, lambda: count) == expected
    for dtype in ("float32", "bfloat16"):
        assert precision.chosen(base(dtype), CPU, lambda: count) == dtype


def test_a_base_is_counted_only_if_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hardware no network is built to count its parameters."""

    def count() -> int:
        raise AssertionError

    monkeypatch.setattr(precision, "is_native", lambda device: False)
    assert precision.chosen(base(), CPU, count) == "float32"


INTEL = {"architecture": "x86_64", "avx512_bf16": True}


@pytest.mark.parametrize(
    ("has", "takes", "limit", "expected"),
    [
        (INTEL, True, "", True),
        (INTEL, True, "DEFAULT", True),
        (INTEL, True, "AVX512_CORE_BF16", True),
        (INTEL, True, "AVX512_CORE", False),
        (INTEL, True, "avx512_core_vnni", False),
        (INTEL, True, "AVX2_VNNI_2", False),
        (INTEL, False, "AVX2", False),
        ({"architecture": "x86_64", "amx_bf16": True}, True, "", True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": False}, True, "", False),
        ({"architecture": "x86_64"}, True, "", False),
        ({"architecture": "aarch64"}, True, "", True),
        ({"architecture": "aarch64"}, False, "", False),
    ],
)
def test_processors(
    has: dict[str, Any], takes: bool, limit: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x86 needs instructions and a library that may use them; on Arm the library's answer is enough."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: takes)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert precision.is_native(CPU) is expected
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", limit)  # its older name
    assert precision.is_native(CPU) is expected
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not precision.is_native(CPU)


@pytest.mark.parametrize("native", [True, False])
def test_gpus(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA says itself what it does in hardware; Apple's GPUs and unknown devices count as not."""

    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert precision.is_native(torch.device("cuda")) is native
    assert not precision.is_native(torch.device("mps"))
    assert not precision.is_native(torch.device("xpu"))


@pytest.mark.parametrize("kernels", ["default", "avx2"])
def test_limits_of_the_libraries_count(kernels: str) -> None:
    """Where an operator's limit makes oneDNN emulate bfloat16, a process does not take it for native."""
    code = """
import torch
from fedslm.models import precision
from fedslm.config import ModelConfig
device = torch.device("cpu")
assert not precision.is_native(device)
assert precision.chosen(ModelConfig(base="demo"), device, lambda: 10**9) == "float32"
assert "emulated" in precision.warning(ModelConfig(base="demo", dtype="bfloat16"), device)
"""
    if torch.cpu.get_capabilities()["architecture"] != "x86_64":
        pytest.skip("the limits are names of x86 instructions")
    environ = processors.environment(kernels)
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("dtype", "native", "warns"),
    [
        ("bfloat16", False, True),
        ("bfloat16", True, False),
        ("float32", False, False),
        ("auto", False, False),
    ],
)
def test_only_emulation_is_warned_of(
    dtype: str, native: bool, warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config that asks for bfloat16 by name on a device without it; "auto" never does."""
    monkeypatch.setattr(precision, "is_native", lambda device: native)
    found = precision.warning(base(dtype), CPU)
    assert ("emulated on this cpu" in found) is bool(found) is warns


def test_all_that_load_or_describe_a_base_decide_alike(
    family_directory: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The count is that of the loaded base: its size is the last at which "auto" gives bfloat16."""
    where = family_directory("llama", "causal-lm")
    lora, model = LoraConfig(rank=2), base(where=where)
    logger = logging.getLogger("fedslm.models.loaded")
    logger.addHandler(caplog.handler)  # whatever an earlier test made of the loggers above
    monkeypatch.setattr(logger, "level", logging.INFO)
    size = footprint(where, model, lora, TASK, 0).parameters
    monkeypatch.setattr(precision, "is_native", lambda device: True)
    for least, expected in ((size, "bfloat16"), (size + 1, "float32")):
        monkeypatch.setattr(precision, "LEAST_PARAMETERS", least)
        loaded = load.__wrapped__(model, lora, TASK, 0)
        assert str(loaded.dtype) == f"torch.{expected}"
        assert {each.dtype for each in loaded.adapter.parameters.values()} == {torch.float32}
        frozen = {p.dtype for p in loaded.adapter.network.parameters() if not p.requires_grad}
        assert frozen == {loaded.dtype}
        assert f'computes in {expected} on cpu (model.dtype="auto")' in caplog.text
        assert footprint(where, model, lora, TASK, 0).dtype == expected
        assert decided(model, where, TASK, 0).dtype == expected
    logger.removeHandler(caplog.handler)


def test_a_rounded_base_is_smaller(family_directory: Callable[[str, str], Path]) -> None:
    """The size that is announced is that of the precision that is used."""
    where = family_directory("llama", "causal-lm")
    sizes = {
        dtype: footprint(where, base(dtype, where), LoraConfig(), TASK, 0)
        for dtype in ("auto", "float32", "bfloat16")
    }
    assert sizes["auto"] == sizes["float32"]  # the base is tiny
    assert 2 * sizes["bfloat16"].base_bytes == sizes["float32"].base_bytes
