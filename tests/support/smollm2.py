"""SmolLM2-135M-Instruct, the one real language model of an ordinary size among the assets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
NAME = "smollm2-135m-instruct"


def weights(target: Path) -> Path:
    """The transformers directory below FEDSLM_DERIVED; otherwise one unpacked from the GGUF file."""
    made = Path(os.environ.get("FEDSLM_DERIVED", os.devnull)) / "models" / NAME
    if (made / "config.json").exists():
        return made.resolve()
    assets = (ROOT / os.environ.get("FEDSLM_ASSETS", "../shared/assets")).resolve()
    files = sorted((assets / "models" / f"{NAME}-gguf").glob("*.gguf"))
    if not files:
        pytest.skip(f"no models/{NAME}-gguf/*.gguf in FEDSLM_ASSETS={assets}")
    script = ROOT / "simulations" / "unpack_gguf.py"
    subprocess.run([sys.executable, script, files[0], target], check=True, capture_output=True)
    return target
