"""The small federated teacher and the larger student; only the student's adapter is trained.

Both return logits of the *positions* to be learned: the target tokens of all examples, concatenated,
shape (positions, vocabulary), or the classes of each example, shape (examples, classes).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedslm.config import DistillConfig, LoraConfig, ModelConfig, TaskConfig
from fedslm.config.tasks import tasks_that
from fedslm.errors import ConfigError, ModelError, Problem
from fedslm.inference.trained import Trained, TunedModel, load_trained
from fedslm.models import families, precision
from fedslm.models.base import load_tokenizer, local, resolve
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel, load
from fedslm.records import AdapterState
from fedslm.tasks import build, tokens
from fedslm.tasks.base import Example, Task
from fedslm.training.batches import forward

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
LANGUAGE = tasks_that(lambda kind: kind.teaches == "tokens")
TAUGHT = tasks_that(lambda kind: kind.teaches != "nothing")


@dataclass(frozen=True)
class Reader:
    """The task and tokenizer with which a model reads records.

    Attributes:
        task: The learning task.
        tokenizer: The model's tokenizer.
    """

    task: Task
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Teacher:
    """The federated small model S*, and its state before federation, S0.

    Attributes:
        trained: The loaded model; its adapter is overwritten.
        tuned: S*: the adapter used for teaching.
    """

    trained: Trained
    tuned: AdapterState

    @property
    def task(self) -> Task:
        """The task that the model learned."""
        return self.trained.task

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The small model's tokenizer."""
        return self.trained.model.tokenizer

    @property
    def reader(self) -> Reader:
        """The small model's task and tokenizer."""
        return Reader(self.task, self.tokenizer)

    def of(self, adapter: AdapterState) -> Teacher:
        """Returns the same model with another adapter."""
        return replace(self, tuned=adapter)

    def logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """Returns the logits of S*, without gradient."""
        self.trained.model.adapter.write(self.tuned)
        return _frozen_positions(self.trained.model, self.task, examples)

    def untuned_logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """Returns the logits of S0, without gradient; a new head is untrained."""
        model = self.trained.model
        if not self.trained.has_new_head:
            with model.adapter.disabled():
                return _frozen_positions(model, self.task, examples)
        model.adapter.write(self.trained.initial)
        return _frozen_positions(model, self.task, examples)


@dataclass(frozen=True)
class Student:
    """The larger model with its adapter.

    Attributes:
        model: The loaded model.
        task: The teacher's task, in the student's tokens.
        lora: Settings of the student's adapter.
        config: The student's model section.
        seed: Seed of the starting adapter, and of the order of examples.
        start: Adapter to continue from, instead of a new one.
    """

    model: LoadedModel
    task: Task
    lora: LoraConfig
    config: ModelConfig
    seed: int
    start: AdapterState | None = None

    @cached_property
    def initial(self) -> AdapterState:
        """The adapter before distillation: the plain student with an untrained head, or ``start``."""
        if self.start is not None:
            return self.start
        return initial_state(self.model.adapter.read().shapes, self.seed)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The larger model's tokenizer."""
        return self.model.tokenizer

    @property
    def reader(self) -> Reader:
        """The student's task and tokenizer."""
        return Reader(self.task, self.tokenizer)

    def logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """Returns the student's logits, with gradient."""
        return _positions(*forward(self.model, self.task, examples))

    def base_logits(self, examples: Sequence[Example]) -> torch.Tensor:
        """Returns L0: the student's logits without its adapter and without gradient (language only)."""
        with self.model.adapter.disabled():
            return _frozen_positions(self.model, self.task, examples)


def _frozen_positions(model: LoadedModel, task: Task, examples: Sequence[Example]) -> torch.Tensor:
    """Returns the logits of the positions, without gradient."""
    with torch.no_grad():
        return _positions(*forward(model, task, examples))


def _positions(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Selects the logits of the positions to be learned."""
    return logits if logits.dim() == 2 else logits[batch["labels"] != tokens.IGNORED]


def student_sections(
    settings: DistillConfig, task: TaskConfig
) -> tuple[ModelConfig, LoraConfig, TaskConfig]:
    """Returns the student's model and adapter sections, and its task.

    Raises:
        ConfigError: No student is configured, or it cannot be trained in its precision.
    """
    if settings.student is None:
        message = "is missing; give the larger model's hub name or directory"
        raise ConfigError([Problem("distill.student", message)])
    if settings.dtype == "float16":
        raise ConfigError([Problem("distill.dtype", precision.NO_FLOAT16)])
    model = ModelConfig(
        base=settings.student,
        dtype=settings.dtype,
        quantization=settings.quantization,
        gradient_checkpointing=settings.gradient_checkpointing,
        device=settings.device,
    )
    lora = LoraConfig(
        rank=settings.rank, alpha=settings.adapter_alpha, target_modules=settings.target_modules
    )
    return model, lora, task


def load_teacher(run: TunedModel, settings: DistillConfig) -> Teacher:
    """Loads a federated model on the student's device.

    Raises:
        ConfigError: The task does not support distillation.
        ModelError: As :func:`fedslm.inference.trained.load_trained`.
    """
    check_task(run)
    run = replace(run, model=run.model.model_copy(update={"device": settings.device}))
    return Teacher(load_trained(run), run.adapter)


load_kept = lru_cache(maxsize=1)(load.__wrapped__)
"""As ``load``, with a cache of its own: between rounds the student stays next to the run's base, so
that a process loads each of them once."""


def forget_models() -> None:
    """Frees the models that this process keeps."""
    load.cache_clear()
    load_kept.cache_clear()
    gc.collect()


def load_student(
    run: TunedModel, settings: DistillConfig, load: Callable[..., LoadedModel] = load
) -> Student:
    """Loads the student with a fresh adapter.

    Args:
        run: The federated model that teaches.
        settings: The ``[distill]`` section.
        load: Function that loads the base model and attaches an adapter.

    Raises:
        ModelError: The student cannot be loaded for the run's task.
    """
    model, lora, task = student_sections(settings, run.task)
    loaded = load(model, lora, task, len(run.labels))
    student = Student(loaded, build(task, run.data, run.labels), lora, model, run.seed)
    loaded.adapter.write(student.initial)
    return student


def student_reader(run: TunedModel, settings: DistillConfig) -> Reader:
    """Returns the student's task and tokenizer, without loading its weights.

    Raises:
        ModelError: The student has no tokenizer.
    """
    model, _, task = student_sections(settings, run.task)
    return Reader(build(task, run.data, run.labels), load_tokenizer(resolve(model)))


def check_task(run: TunedModel) -> None:
    """Refuses a run without a global model, or whose task does not support distillation.

    Raises:
        ConfigError: Lists the tasks that support it.
    """
    if run.method == "fedsa":
        message = 'value "fedsa" left B and the head with each client: there is no teacher model'
        raise ConfigError([Problem("aggregation.method", message)])
    if run.task.name not in TAUGHT:
        message = f"value {run.task.name!r} cannot be distilled; {', '.join(TAUGHT)} can"
        raise ConfigError([Problem("task.name", message)])


def check_student(run: TunedModel, settings: DistillConfig) -> None:
    """Refuses the teacher's own base model as the student, before anything is loaded.

    Raises:
        ConfigError: No student is configured.
        ModelError: The student is the teacher's base model.
    """
    model, *_ = student_sections(settings, run.task)
    same_name = model.base == run.model.base
    if same_name or (find_student(model) is not None and resolve(model) == resolve(run.model)):
        raise ModelError(
            f"distill.student={model.base!r} is the teacher's base; name the larger model that is "
            f"to learn from it"
        )


def find_student(model: ModelConfig) -> Path | None:
    """Returns the student's local directory; None if it can only be a hub name.

    Raises:
        ModelError: It is a path that does not contain a model.
    """
    try:
        return local(model)
    except ModelError as error:
        raise ModelError(str(error).replace("model.base", "distill.student")) from error


def warn_if_smaller(teacher: Teacher, student: Student) -> str | None:
    """Returns a warning if the student has fewer parameters than its teacher; None otherwise."""
    sizes = [
        sum(parameter.numel() for parameter in model.adapter.network.parameters())
        for model in (student.model, teacher.trained.model)
    ]
    if sizes[0] >= sizes[1]:
        return None
    text = (
        f"the student has {sizes[0]:,} parameters and its teacher {sizes[1]:,}: a smaller student can "
        f"only lose quality; check distill.student"
    )
    logger.warning("%s", text)
    return text


def shared_vocabulary(run: TunedModel, settings: DistillConfig) -> int | None:
    """Returns the number of tokens that both tokenizer files name identically; None if they differ.

    A model's rows beyond it are padding: the same tokenizer may be used with matrices of several
    heights (Qwen2.5: 151,936 and 152,064), and no token corresponds to the additional rows.

    Raises:
        ModelError: A model or its tokenizer cannot be found.
    """
    student, *_ = student_sections(settings, run.task)
    folders = [resolve(model) for model in (run.model, student)]
    theirs, own = (load_tokenizer(folder) for folder in folders)
    if theirs.get_vocab() != own.get_vocab() or not _split_alike(theirs, own):
        return None
    heights = [families.configuration(folder).get("vocab_size") for folder in folders]
    known = [height for height in heights if isinstance(height, int)]
    return int(min(*known, max(own.get_vocab().values()) + 1))


def _split_alike(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers with the same tokens split texts identically: normalization may differ."""
    texts = ["The Patient's BP: 120/80", " leading  spaces", "naïve café 5\u00b5g\n\nend", "你好"]
    return all(first(text)["input_ids"] == second(text)["input_ids"] for text in texts)
