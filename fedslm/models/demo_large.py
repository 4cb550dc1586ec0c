"""The larger model of the demo: the embedded base, twice as wide, with the same function.

Each unit is there twice, and what reads it takes half of each copy, a little more of one and a little
less of the other: so the copies learn different things, and nothing is lost (Chen et al. 2016, Net2Net,
arXiv 1511.05641). It is made on first use, in the user's cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from fedslm.errors import ModelError
from fedslm.rng import seed_of

if TYPE_CHECKING:
    import torch

NAME = "demo-large"
_WIDER = 2
_ASYMMETRY = 0.1  # standard deviations of a matrix
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def demo_large(small: Path, sha256: str) -> Path:
    """The directory of the larger demo model; builds it if it is not there.

    Args:
        small: The embedded base.
        sha256: Its hash.

    Raises:
        ModelError: It cannot be written.
    """
    place = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    target = Path(place) / "fedslm" / f"{NAME}-{sha256[:16]}"
    if (target / "config.json").exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _build(small, made)
            made.chmod(0o755)
            made.rename(target)
        except OSError:
            if not (target / "config.json").exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"model.base={NAME!r} cannot be made in {target}: {error}") from error
    return target


def _build(small: Path, target: Path) -> None:
    """Writes the wider model and its tokenizer."""
    import torch
    from transformers import BertConfig, BertModel

    model = BertModel.from_pretrained(small, dtype=torch.float32, local_files_only=True)
    values = model.config.to_dict()
    for key in ("hidden_size", "num_attention_heads", "intermediate_size"):
        values[key] *= _WIDER
    wide = BertModel(BertConfig(**values)).to(torch.float32)
    wide.load_state_dict({name: _wider(name, each) for name, each in model.state_dict().items()})
    wide.config.dtype = "float32"
    wide.save_pretrained(target)
    for name in _TOKENIZER:
        shutil.copy(small / name, target / name)


def _wider(name: str, values: torch.Tensor) -> torch.Tensor:
    """One tensor for twice the width."""
    import torch

    if not values.is_floating_point():
        return values
    if values.dim() == 1:
        return torch.cat([values, values])
    if "embeddings" in name:
        return torch.cat([values, values], dim=1)
    generator = torch.Generator().manual_seed(seed_of(0, "demo-large", name))
    copies = []
    for _ in range(_WIDER):
        more = _ASYMMETRY * values.std() * torch.randn(values.shape, generator=generator)
        copies.append(torch.cat([values / 2 + more, values / 2 - more], dim=1))
    return torch.cat(copies)
