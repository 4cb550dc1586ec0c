"""Makes a transformers directory of a GGUF file of a language model, in bfloat16, with its tokenizer.

python simulations/unpack_gguf.py FILE.gguf DIRECTORY

It needs the package gguf (``pip install gguf``), and memory for the model in float32. Weights that the
file holds in a few bits are widened; they do not become the original ones.
"""

from __future__ import annotations

import sys
from pathlib import Path


def unpack(file: Path, directory: Path) -> None:
    """Reads a GGUF file and writes the directory."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    values = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):  # of the file, not of the widened model
        values.pop(key, None)
    plain = AutoModelForCausalLM.from_config(type(read.config)(**values), dtype=torch.bfloat16)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    unpack(Path(sys.argv[1]), Path(sys.argv[2]))
