"""A loaded tiny model, its task and a padded batch of examples, for each architecture; one step, seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedslm import tasks
from fedslm.config import DataConfig, LoraConfig, ModelConfig, TaskConfig
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.models.networks import on_meta
from fedslm.privacy.plan import ExamplePlan, PrivatePlan, UserPlan
from fedslm.records import AdapterState
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import Unit, forward
from fedslm.training.local import enter_training
from fedslm.training.shapes import Shapes
from fedslm.training.steps import PrivateStep, stepping

LABELS = ("bone", "heart", "skin")
FAMILIES = [
    ("bert", "classification", "native"),
    ("bert", "classification", "mean"),
    ("gpt2", "causal-lm", "native"),
    ("llama", "causal-lm", "native"),
]
CASES = [
    ("bert", "classification", "native"),
    ("bert", "token-classification", "native"),
    ("distilbert", "classification", "native"),
    ("gemma", "causal-lm", "native"),
    ("gemma2", "causal-lm", "native"),
    ("gemma3_text", "causal-lm", "native"),
    ("gpt2", "causal-lm", "native"),
    ("gpt2", "classification", "native"),
    ("llama", "causal-lm", "native"),
    ("mistral", "causal-lm", "native"),
    ("modernbert", "classification", "native"),
    ("modernbert", "token-classification", "native"),
    ("phi", "causal-lm", "native"),
    ("phi3", "causal-lm", "native"),
    ("qwen2", "causal-lm", "native"),
    ("qwen3", "causal-lm", "native"),
    ("qwen3", "classification", "mean"),
    ("roberta", "classification", "native"),
    ("smollm3", "causal-lm", "native"),
    ("t5", "seq2seq", "native"),
    ("t5", "classification", "mean"),
    ("xlm-roberta", "token-classification", "native"),
]
"""Every proved architecture with its usual tasks."""
WILD_TOKEN, UNKNOWN_TOKEN = 8, 10**6  # see wild_token; a token of no vocabulary


def load_family(
    directory: Path,
    name: str,
    pooling: str = "native",
    rank: int = 3,
    targets: tuple[str, ...] = ("all-linear",),
    **options: Any,
) -> LoadedModel:
    """Loads a tiny model with LoRA on every linear layer; ``options`` are of the base."""
    return load(
        ModelConfig(base=str(directory), device="cpu", **options),
        LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets),
        TaskConfig(name=name, pooling=pooling, max_length=32),  # type: ignore[arg-type]
        len(labels_of(name)),
    )


def last_layer(directory: Path, name: str, pooling: str) -> tuple[str, ...]:
    """The linear layers of a tiny model's second block, which is its last."""
    task = TaskConfig(name=name, pooling=pooling, max_length=32)  # type: ignore[arg-type]
    modules = on_meta(directory, task, len(labels_of(name))).named_modules()
    return tuple(each for each, m in modules if isinstance(m, nn.Linear | Conv1D) and ".1." in each)


def labels_of(name: str) -> tuple[str, ...]:
    """Class names, where a task has classes."""
    return LABELS if name in ("classification", "multi-label", "token-classification") else ()


def task_of(name: str) -> Task:
    """The task for a name."""
    config = TaskConfig(name=name, max_length=32)  # type: ignore[arg-type]
    return tasks.build(config, DataConfig(source="none"), labels_of(name))


def examples_of(count: int, seed: int = 0, name: str = "classification") -> list[Example]:
    """Examples of very different lengths, so that batches are padded."""
    generator = np.random.default_rng(seed)
    return [example_of(name, generator, int(length)) for length in generator.integers(3, 20, count)]


def example_of(name: str, generator: np.random.Generator, length: int) -> Example:
    """A random example of a task."""
    first = tuple(int(token) for token in generator.integers(9, 1700, size=length))
    plain = Example(first, int(generator.integers(len(LABELS))))
    match name:
        case "token-classification":
            return replace(plain, targets=tuple(token % len(LABELS) for token in first))
        case "causal-lm":
            return replace(plain, targets=tuple(range(1, length + 1)))
        case "seq2seq":
            return replace(plain, targets=first[::-1][:9])
    return plain


def alone(examples: Sequence[Example]) -> list[Unit]:
    """Each record as a unit of its own."""
    return [[example] for example in examples]


def random_state(model: LoadedModel, seed: int = 0) -> AdapterState:
    """An adapter in general position: B is not zero."""
    start = initial_state(model.adapter.read().shapes, seed)
    generator = np.random.default_rng(seed)
    return AdapterState(
        {
            key: start[key] + 0.1 * generator.standard_normal(start[key].shape).astype(np.float32)
            for key in start
        }
    )


def record_plan(
    noise: float = 1.0, clip: float = 1.0, normaliser: int = 1, steps: int = 1, **options: Any
) -> ExamplePlan:
    """A plan with the record as its unit."""
    return ExamplePlan(8.0, 1e-5, clip, noise, 0.5, normaliser, steps, **options)


def user_plan(
    noise: float = 1.0, clip: float = 1.0, normaliser: int = 1, steps: int = 1, **options: Any
) -> UserPlan:
    """A plan with the patient as its unit."""
    return UserPlan(
        8.0,
        1e-5,
        clip,
        noise,
        0.5,
        normaliser,
        steps,
        unit_column="patient",
        max_records_per_unit=5,
        **options,
    )


@dataclass(frozen=True)
class Seen:
    """One private step from :func:`random_state` with SGD at rate 1, all tensors in one vector.

    Attributes:
        exact: The sum of clipped gradients before the noise.
        noisy: The same with noise, divided by the normaliser.
        moved: Minus the change of the parameters.
    """

    exact: np.ndarray
    noisy: np.ndarray
    moved: np.ndarray


SHAPES = Shapes({16: (4,), 24: (2, 4), 32: (4,), 48: (2,)})
"""Public shapes that no test here needs a proof of."""


def one_step(
    model: LoadedModel,
    task: Task,
    plan: PrivatePlan,
    units: Sequence[Unit],
    size: int = 4,
    shapes: Shapes | None = None,
) -> Seen:
    """Takes one step and looks at it through Opacus' own hook."""
    start = ready(model)
    optimizer = torch.optim.SGD(list(model.adapter.parameters.values()), lr=1.0)
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def look(private: Any) -> None:
        assert [id(p) for p in private.params] == [id(p) for p in model.adapter.parameters.values()]
        seen.append((flat(p.summed_grad for p in private.params), flat(p.grad for p in private.params)))

    with stepping(model, task, plan, optimizer, size, shapes=shapes) as step:
        assert isinstance(step, PrivateStep)
        step.optimizer.attach_step_hook(look)
        step(units)
    after = model.adapter.read()
    ((exact, noisy),) = seen
    moved = np.concatenate([(start[key].astype(np.float64) - after[key]).ravel() for key in start])
    return Seen(exact, noisy, moved)


def ready(model: LoadedModel) -> AdapterState:
    """Puts a model into training mode at a fixed adapter, which is returned."""
    start = random_state(model)
    model.adapter.write(start)
    model.adapter.train_only(set(start))
    enter_training(model)
    return start


def gradient(model: LoadedModel, task: Task, example: Example) -> np.ndarray:
    """One record's gradient at the adapter of :func:`one_step`, by plain autograd on a batch of one."""
    ready(model)
    model.adapter.network.zero_grad()
    logits, batch = forward(model, task, [example])
    task.per_example_loss(logits, batch).sum().backward()
    return flat(p.grad for p in model.adapter.parameters.values())


def clipped(vector: np.ndarray, clip: float) -> np.ndarray:
    """A vector of at most a length, as Opacus scales it."""
    return vector * min(1.0, clip / (np.linalg.norm(vector) + 1e-6))


def own_columns(step: PrivateStep, rows: torch.Tensor) -> np.ndarray:
    """Per-record gradients without the columns between tensors, as one array of shape (records, d)."""
    return torch.cat([rows[:, place] for place in step._gradients.places], dim=1).double().numpy()


def flat(tensors: Any) -> np.ndarray:
    """All values in one float64 vector."""
    return np.concatenate([tensor.detach().double().numpy().ravel() for tensor in tensors])


@contextmanager
def wild_token(model: LoadedModel) -> Iterator[None]:
    """Makes everything infinite for a record with :data:`WILD_TOKEN`, where tokens enter the base."""
    modules = dict(model.adapter.network.named_modules())
    names = [name for name in modules if name.endswith(("word_embeddings", "wte", "embed_tokens"))]

    def spoil(module: torch.nn.Module, tokens: tuple[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        return out.masked_fill((tokens[0] == WILD_TOKEN).unsqueeze(-1), torch.inf)

    handle = modules[names[0]].register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()
