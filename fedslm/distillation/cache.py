"""Two-pass distillation, for models that do not fit into memory together: stores the teacher's targets.

For each language position, some tokens are sampled from the teacher, with weights that make the
student's expected gradient equal to that of the full distribution (using only the most likely tokens
would not); for a classifier's position, all classes are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedslm.distillation import losses
from fedslm.distillation.contexts import Context
from fedslm.distillation.models import Teacher
from fedslm.distillation.objective import Objective, Target
from fedslm.errors import RunError
from fedslm.inference.trained import OnProgress
from fedslm.records import AdapterState, FloatArray
from fedslm.rng import seed_of
from fedslm.storage import read_tensors, save_adapter

_BATCH_SIZE = 16
_PER_FILE = 512  # contexts per file


def write_cache(
    directory: Path,
    teacher: Teacher,
    objective: Objective,
    contexts: Sequence[Context],
    on_progress: OnProgress,
) -> None:
    """Stores the teacher's targets for all contexts; results of an interrupted pass are kept.

    Args:
        directory: Directory for files of :data:`_PER_FILE` contexts.
        teacher: The model that provides the targets.
        objective: Determines the targets; ``cached_samples`` tokens of each position are stored.
        contexts: All contexts, in the order of the numbers that :class:`Cached` uses.
        on_progress: Receives the number of finished contexts, and the total.

    Raises:
        RunError: The files cannot be written.
    """
    for start in range(0, len(contexts), _PER_FILE):
        path = _file(directory, start)
        piece = contexts[start : start + _PER_FILE]
        if not path.exists():
            save_adapter(path, _answers(teacher, objective, piece, start))
        on_progress(start + len(piece), len(contexts))


@dataclass(frozen=True)
class Cached:
    """Targets that :func:`write_cache` stored on disk.

    Attributes:
        directory: Directory of the files.
        device: Device for the targets.
        whole: Whether all classes are stored, not sampled tokens.
    """

    directory: Path
    device: torch.device
    whole: bool

    def of(self, numbers: Sequence[int], contexts: Sequence[Context]) -> Target:
        """Reads the targets of some contexts.

        Raises:
            RunError: A file is missing or damaged.
        """
        files: dict[Path, list[int]] = {}
        for number in numbers:
            files.setdefault(_file(self.directory, number - number % _PER_FILE), []).append(number)
        stored: dict[int, FloatArray] = {}
        for path, inside in files.items():
            values = read_tensors(path, [_key(number) for number in inside])
            stored.update(zip(inside, values, strict=True))
        rows = torch.cat([torch.from_numpy(stored[number]) for number in numbers]).to(self.device)
        if self.whole:
            return Target(rows)
        weights = torch.full(rows.shape, 1 / rows.shape[1], device=self.device)
        return Target(ids=rows.long(), weights=weights)


def _answers(
    teacher: Teacher, objective: Objective, contexts: Sequence[Context], first: int
) -> AdapterState:
    """Computes the targets of consecutive contexts, by number."""
    samples = objective.settings.cached_samples
    found: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = {}
    for start in range(0, len(contexts), _BATCH_SIZE):
        for at, context in enumerate(contexts[start : start + _BATCH_SIZE], first + start):
            answer = objective.target(teacher, None, [context]).log_probabilities
            if answer is None:
                raise RunError("a teacher's answer has no probabilities")
            if not teacher.task.labels:
                seed = seed_of(teacher.trained.run.seed, "distil-cache", at)
                generator = torch.Generator().manual_seed(seed)
                ids, _ = losses.sampled(answer.cpu(), samples, generator)
                answer = ids.float()  # exact: vocabularies are smaller than 2**24
            found[_key(at)] = answer.cpu().numpy()
    return AdapterState(found)


def _key(number: int) -> str:
    """Returns the name of a context's tensor."""
    return f"{number:08d}"


def _file(directory: Path, first: int) -> Path:
    """Returns the file that contains the targets of the contexts from ``first`` on."""
    return directory / f"targets-{first:08d}.safetensors"
