"""What the benchmarks run on: small, randomly initialised Llama models and random texts, made offline.

Also the clock and the memory gauge that they share. Nothing here imports torch before it is asked to.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY_SIZE = 512
MAX_TOKENS = 64
_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[EOS]")
_WORDS_IN_TEXT = MAX_TOKENS + 16  # longer than what is kept, so that every example has MAX_TOKENS


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions.

    Attributes:
        name: What the tables call it.
        width: Hidden size.
        hidden: Width of the feed-forward layers.
        layers: Number of layers.
    """

    name: str
    width: int
    hidden: int
    layers: int


SMALL = Size("0.2M", width=64, hidden=128, layers=4)
MEDIUM = Size("5M", width=256, hidden=688, layers=6)
LARGE = Size("50M", width=640, hidden=1728, layers=10)


def write_model(directory: Path, size: Size, vocabulary_size: int = VOCABULARY_SIZE) -> int:
    """Writes a random Llama and its word tokenizer as transformers does; returns its parameters."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    network = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary_size,
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            max_position_embeddings=2 * MAX_TOKENS,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=2,
        )
    )
    network.save_pretrained(directory)
    words = [*_SPECIAL_TOKENS, *_words()]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL_TOKENS[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    pad, unknown, end = _SPECIAL_TOKENS
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown, eos_token=end
    ).save_pretrained(directory)
    return sum(parameter.numel() for parameter in network.parameters())


def write_texts(directory: Path, *, num_train: int, num_evaluation: int = 4) -> None:
    """Writes random texts as ``train.jsonl`` and ``test.jsonl``."""
    generator, words = random.Random(0), _words()
    directory.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", num_train), ("test", num_evaluation)):
        texts = (" ".join(generator.choices(words, k=_WORDS_IN_TEXT)) for _ in range(count))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (directory / f"{name}.jsonl").write_text(lines)


def config(model: Path, texts: Path, run: Path, /, **sections: Mapping[str, Any]) -> dict[str, Any]:
    """A federation without privacy on a model and texts; evaluation is as good as off.

    Args:
        model: The model's directory.
        texts: The texts' directory.
        run: The run's directory; must not exist.
        **sections: Added to the sections of the same name.
    """
    rounds = int(sections.get("federation", {}).get("rounds", 1))
    values: dict[str, dict[str, Any]] = {
        "run": {"name": "bench", "directory": str(run)},
        "model": {"base": str(model), "device": "cpu"},
        "lora": {"rank": 8, "alpha": 8.0},
        "data": {"source": str(texts), "label_column": "", "max_evaluation_records": 2},
        "task": {"name": "causal-lm", "max_length": MAX_TOKENS},
        "training": {"optimizer": "adamw", "learning_rate": 1e-3},
        "privacy": {"unit": "none"},
        "aggregation": {"method": "fedit"},
        "federation": {"evaluate_every": rounds + 1},
        "engine": {"name": "local", "workers": 2, "threads_per_worker": 1},
    }
    for section, content in sections.items():
        values[section].update(content)
    return values


def to_toml(values: Mapping[str, Mapping[str, Any]]) -> str:
    """Writes sections of plain values as TOML."""
    lines = []
    for section, content in values.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in content.items())]
    return "\n".join(lines)


def measured(command: Sequence[str | Path]) -> tuple[dict[str, Any], float]:
    """Runs a Python program that ends with one JSON line.

    Returns:
        That line, and when the program was started on :func:`time.monotonic`'s clock, which all
        processes of a machine share.
    """
    started = time.monotonic()
    return json.loads(finished(command).splitlines()[-1]), started


def finished(command: Sequence[str | Path]) -> str:
    """Runs a Python program to its end; gives what it prints."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True, env=quiet()
    )
    return done.stdout


def quiet() -> dict[str, str]:
    """An environment in which nothing asks the network and no thread count is preset."""
    offline = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return {**kept, **offline}


def memory_bytes(process: int | str, key: str, file: str = "status") -> int:
    """Reads one gauge of a process: VmHWM (peak) or VmRSS (now), or of another file such as its Pss.

    Unlike ``getrusage``, these do not remember what the process was before it became a program.
    """
    for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return 1024 * int(value.split()[0])
    raise KeyError(key)


def descendants(process: int | str) -> Iterator[int]:
    """All processes below one, parents before children."""
    for thread in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (thread / "children").read_text().split()):
            yield child
            yield from descendants(child)


def cpu_seconds(process: int | str = "self") -> float:
    """Processor time of a process and of all below it, those that have ended included; Linux only."""
    ticks = 0
    for number in (process, *descendants(process)):
        with suppress(FileNotFoundError):  # it ended meanwhile
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))  # own, and of children that it waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes(command: Sequence[str | Path]) -> int:
    """Runs a Python program and returns the most memory that it and all below it held together.

    Memory is the proportional set size, in which a page that n processes share counts once. It is read
    ten times a second; Linux only.
    """
    peak = 0
    with subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=quiet(),
    ) as process:
        while process.poll() is None:
            with suppress(OSError, KeyError):  # a process ended meanwhile
                everyone = (process.pid, *descendants(process.pid))
                peak = max(peak, sum(memory_bytes(one, "Pss", "smaps_rollup") for one in everyone))
            time.sleep(0.1)
    assert process.returncode == 0, f"{command} ended with {process.returncode}"
    return peak


def busy_cores(seconds: float = 1.0) -> float:
    """How many cores the machine keeps busy while this process sleeps; Linux only.

    On a busy machine a ratio means little: threads that wait for one another in OpenMP, as the bare
    loop's do, lose far more than single-threaded processes.
    """

    def idle_ticks() -> int:
        """Ticks that all cores have idled or waited for the disk."""
        return sum(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[4:6]))

    began, before = time.monotonic(), idle_ticks()
    time.sleep(seconds)
    passed = time.monotonic() - began
    idle = (idle_ticks() - before) / os.sysconf("SC_CLK_TCK") / passed
    return max(0.0, (os.cpu_count() or 1) - idle)


def spread(values: Sequence[float]) -> str:
    """The median and, where there are several, what it lies between."""
    middle = f"{statistics.median(values):.2f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.2f}–{max(values):.2f})"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells[1:]]))


def _words() -> list[str]:
    """The vocabulary without the special tokens."""
    return [f"w{index}" for index in range(VOCABULARY_SIZE - len(_SPECIAL_TOKENS))]
