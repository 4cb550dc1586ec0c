"""The demo's larger model: the same function, four times the weights, copies that learn on their own."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support.processors import KERNELS, environment
from transformers import AutoModel, AutoTokenizer

from fedslm.config import ModelConfig
from fedslm.models import base
from fedslm.models.base import DEMO_DIRECTORY, base_sha256, resolve
from fedslm.models.demo_large import demo_large

SHA256 = "0e375218257aa9be6926814074b111eef5ae8db013d6c20e170735d83036d17f"
"""Of this version of the package, on every machine; a new embedded base or ``_MADE`` gives another."""


def outputs(directory: Path, texts: list[str]) -> torch.Tensor:
    """Last hidden states."""
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = AutoTokenizer.from_pretrained(directory)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        return model(**batch).last_hidden_state


def test_it_computes_the_same_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of its states are the small model's."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path))
    texts = ["chest pain since this morning", "a twisted ankle"]
    small, large = (
        outputs(DEMO_DIRECTORY, texts),
        outputs(resolve(ModelConfig(base="demo-large")), texts),
    )
    width = small.shape[-1]
    assert large.shape[-1] == 2 * width
    assert torch.allclose(large[..., :width], small, atol=1e-4)
    assert torch.allclose(large[..., width:], small, atol=1e-4)


def test_it_is_larger_and_its_copies_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """About four times the weights of a layer; gradients of the two copies are not equal."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path))
    model = AutoModel.from_pretrained(resolve(ModelConfig(base="demo-large")), dtype=torch.float32)
    small = AutoModel.from_pretrained(DEMO_DIRECTORY, dtype=torch.float32)
    layer = model.encoder.layer[0].attention.self.query.weight
    assert layer.numel() == 4 * small.encoder.layer[0].attention.self.query.weight.numel()
    tokens = torch.arange(5, 25).reshape(2, 10)
    model(input_ids=tokens).last_hidden_state.square().sum().backward()
    half = layer.shape[1] // 2
    assert not torch.allclose(layer.grad[:half], layer.grad[half:], rtol=1e-2)


def test_it_is_made_once_and_always_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by four threads at once, or in another cache: the same bytes, and nothing is left lying."""
    digest = base_sha256(DEMO_DIRECTORY)
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "one"))
    with ThreadPoolExecutor(4) as pool:
        (first,) = set(pool.map(lambda _: demo_large(DEMO_DIRECTORY, digest), range(4)))
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path / "two"))
    second = demo_large(DEMO_DIRECTORY, digest)
    base.base_sha256.cache_clear()
    assert base_sha256(first) == base_sha256(second)
    assert [path.name for path in first.parent.iterdir()] == [first.name]


@pytest.mark.parametrize("kernels", KERNELS)
def test_every_machine_makes_the_same_bytes(kernels: str, tmp_path: Path) -> None:
    """Whatever instructions torch, MKL and NumPy use, the hash is the recorded one: nodes compare it."""
    code = (
        "from fedslm.config import ModelConfig\n"
        "from fedslm.models.base import base_sha256, resolve\n"
        "print(base_sha256(resolve(ModelConfig(base='demo-large'))))"
    )
    environ = {**environment(kernels), "FEDSLM_CACHE": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    made = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == SHA256


def test_its_config_names_no_version_of_a_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another transformers must write the same file: sorted keys, and none that says who wrote it."""
    monkeypatch.setenv("FEDSLM_CACHE", str(tmp_path))
    text = (resolve(ModelConfig(base="demo-large")) / "config.json").read_text()
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert not [key for key in values if "version" in key]
    assert (values["hidden_size"], values["dtype"]) == (256, "float32")
