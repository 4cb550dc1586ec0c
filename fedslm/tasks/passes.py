"""How much a forward pass holds, and which records share one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from fedslm.tasks.base import Example, Task

# Padded tokens of a pass (rows times the longest). Larger passes leave a CPU's caches: MiniLM takes the
# least time at 512 with gradients, and at 256 to 1,024 without. A GPU must have more to do at once.
CPU_TOKENS, GPU_TOKENS = 1 << 9, 1 << 14
MOST_LOGITS = 1 << 24  # without gradients: 64 MiB in float32, for each copy that a metric makes


def token_budget(device: str, rows: int = 1) -> int:
    """Returns the padded tokens that a pass holds at most, unless one unit has more.

    Args:
        device: Type of the device, such as "cpu".
        rows: Batch rows of a record. The budget is divided by them: whoever keeps it counts records.
    """
    return (CPU_TOKENS if device == "cpu" else GPU_TOKENS) // rows


def evaluation_budget(task: Task, vocabulary: int, device: str) -> int:
    """Returns the same for a pass without gradients, whose logits are bounded too.

    Args:
        task: The task, which has logits of its classes or of the vocabulary.
        vocabulary: Number of logits at one position of a language model.
        device: Type of the device.
    """
    width = len(task.labels) or vocabulary * (2 if task.uses_base else 1)
    return bounded_budget(width, device, task.rows_per_example)


def bounded_budget(width: int, device: str, rows: int = 1) -> int:
    """Returns the padded tokens of a pass that holds ``width`` logits at each position of a row."""
    return min(token_budget(device, rows), MOST_LOGITS // (width * rows))


def passes(examples: Sequence[Example], tokens: int) -> Iterator[list[int]]:
    """Yields the indices of the examples that share a pass, short ones first.

    Args:
        examples: Any number of examples.
        tokens: The result of :func:`evaluation_budget`.

    >>> list(passes([Example((1,) * 512), Example((1,) * 256), Example((1,))], 512))
    [[2, 1], [0]]
    """
    return together([(1, example.length) for example in examples], tokens)


def together(
    sizes: Sequence[tuple[int, int]], tokens: float, records: float = math.inf
) -> Iterator[list[int]]:
    """Yields the indices of the units that share a pass, of similar length; a unit is never split.

    Args:
        sizes: Number of records of each unit, and length of the longest of them.
        tokens: Most records times the longest in a pass, unless one unit has more on its own.
        records: Most records in a pass, with the same exception.
    """
    part: list[int] = []
    there = 0
    for number in sorted(range(len(sizes)), key=lambda number: sizes[number][1]):
        more, longest = sizes[number]
        total = there + more
        if part and (total > records or total * longest > tokens):
            yield part
            part, there = [], 0
        part.append(number)
        there += more
    if part:
        yield part
