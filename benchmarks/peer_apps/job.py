"""The job that ``peers.py`` gives to each framework: what ``bare_loop.py`` computes, for one client."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Job:
    """A base with LoRA, and the tokens of every client and round.

    Attributes:
        model: PEFT's model.
        initial: The first adapter, under PEFT's names.
        tokens: Shape (rounds, clients, steps, batch, length).
        learning_rate: Of AdamW.
    """

    model: peft.PeftModel
    initial: State
    tokens: torch.Tensor
    learning_rate: float

    @property
    def trained(self) -> State:
        """The trained tensors by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load(directory: Path, inputs: Path, rank: int = 8, learning_rate: float = 1e-3) -> Job:
    """Loads the base, attaches LoRA and writes the first adapter."""
    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    lora = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    values = load_file(inputs)
    tokens = values.pop("tokens").long()
    peft.set_peft_model_state_dict(model, values)
    return Job(model, values, tokens, learning_rate)


def loss(model: peft.PeftModel, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss of a next token."""
    logits = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train(job: Job, batches: torch.Tensor) -> None:
    """Takes the steps of one client, with an optimizer of its own."""
    optimizer = torch.optim.AdamW(job.trained.values(), lr=job.learning_rate, weight_decay=0.0)
    for tokens in batches:
        optimizer.zero_grad()
        loss(job.model, tokens).backward()
        optimizer.step()


class Clock:
    """Notes when each round was over: wall time, and processor time of this process and all below."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def note(self) -> None:
        """Adds a mark."""
        below, ticks = [os.getpid()], 0
        while below:
            number = below.pop()
            with suppress(FileNotFoundError):  # it ended meanwhile
                for thread in Path(f"/proc/{number}/task").iterdir():
                    below += map(int, (thread / "children").read_text().split())
                fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # own, and of children that it waited for
        self.marks.append((time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")))

    def result(self) -> dict[str, list[float]]:
        """Wall time at which the first round began; seconds of each round, both kinds."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        return {
            "began": [self.marks[0][0]],
            "seconds": [end[0] - start[0] for start, end in pairs],
            "cpu_seconds": [end[1] - start[1] for start, end in pairs],
        }
