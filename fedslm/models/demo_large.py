"""The larger model of the demo: the embedded base, twice as wide, with the same function.

Each unit is duplicated, and the next layer takes half of each copy, a little more of one and a little
less of the other: so the copies learn different things, and the function does not change (Chen et al.
2016, Net2Net, arXiv 1511.05641). It is built on first use, in the user's cache, byte for byte the same
on every machine, because nodes compare its hash.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np

from fedslm.errors import ModelError, RunError
from fedslm.records import AdapterState, FloatArray
from fedslm.rng import reproducible_bytes
from fedslm.storage import load_tensors, save_adapter, user_cache, with_usual_modes, write_text

NAME = "demo-large"
_WIDER = 2
_MADE = 2  # version of the build; change it when the values change, so that no older copy is reused
_ASYMMETRY = 0.1  # relative to the root mean square of a matrix
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def demo_large(small: Path, sha256: str) -> Path:
    """Returns the directory of the larger demo model; builds it if it is missing.

    Args:
        small: The embedded base.
        sha256: Its hash.

    Raises:
        ModelError: The model cannot be written.
    """
    try:
        target = user_cache() / f"{NAME}-{_MADE}-{sha256[:16]}"
    except RunError as error:
        raise ModelError(f"model.base={NAME!r} cannot be made: {error}") from error
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _build(small, made)
            with_usual_modes(made)
            made.chmod(0o755)
            made.rename(target)
        except (OSError, RunError):
            if not (target / "config.json").exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except (OSError, RunError) as error:
        raise ModelError(f"model.base={NAME!r} cannot be made in {target}: {error}") from error
    return target


def _build(small: Path, target: Path) -> None:
    """Writes the wider model and its tokenizer."""
    narrow = load_tensors(small / "model.safetensors")
    wide = {name: _wider(name, values.astype(np.float32)) for name, values in narrow.items()}
    save_adapter(target / "model.safetensors", AdapterState(wide))
    values = json.loads((small / "config.json").read_text(encoding="utf-8"))
    for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
        values[key] *= _WIDER
    values["dtype"] = "float32"
    del values["transformers_version"]
    write_text(target / "config.json", json.dumps(values, indent=2, sort_keys=True) + "\n")
    for name in _TOKENIZER:
        shutil.copy(small / name, target / name)


def _wider(name: str, values: FloatArray) -> FloatArray:
    """Widens one tensor to twice the width.

    Each value comes from single IEEE operations in a fixed order, and the sum is exact
    (:func:`math.fsum`): no instruction set rounds them differently.
    """
    if values.ndim == 1:
        return np.concatenate([values, values])
    if "embeddings" in name:
        return np.concatenate([values, values], axis=1)
    squares = values.astype(np.float64).ravel() ** 2
    size = np.float32(_ASYMMETRY * math.sqrt(3 * math.fsum(squares) / values.size))
    copies = []
    for number in range(_WIDER):
        drawn = reproducible_bytes(2 * values.size, 0, NAME, name, number)
        steps = np.frombuffer(drawn, "<i2").reshape(values.shape).astype(np.float32)
        more = size * ((steps + np.float32(0.5)) / np.float32(1 << 15))
        copies.append(np.concatenate([values / 2 + more, values / 2 - more], axis=1))
    return np.concatenate(copies)
