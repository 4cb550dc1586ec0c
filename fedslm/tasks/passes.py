"""Groups examples into passes without gradients, with bounded memory whatever the vocabulary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedslm.tasks.base import Example, Task

MOST_EXAMPLES = 32
MOST_LOGITS = 1 << 24  # 64 MiB in float32, for each copy that a metric makes
LEAST_WIDTH = 1 << 11  # fewest values that a layer holds per token, even with few classes


def passes(examples: Sequence[Example], width: int, size: int = MOST_EXAMPLES) -> Iterator[list[int]]:
    """Yields the indices of the examples that share a pass, short ones first.

    Args:
        examples: Any number of examples.
        width: The result of :func:`width_of`.
        size: Most examples in a pass. A pass has fewer if their padded tokens times ``width`` (at
            least :data:`LEAST_WIDTH`) would exceed :data:`MOST_LOGITS`, and always at least one.

    >>> list(passes([Example((1,) * 512), Example((1,) * 256), Example((1,))], 2**15))
    [[2, 1], [0]]
    """
    lengths, width = [example.length for example in examples], max(width, LEAST_WIDTH)
    part: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        values = (len(part) + 1) * lengths[number] * width  # all are padded to the last, the longest
        if part and (len(part) == size or values > MOST_LOGITS):
            yield part
            part = []
        part.append(number)
    if part:
        yield part


def width_of(task: Task, vocabulary: int) -> int:
    """Returns the logits per token: the number of classes, or the vocabulary in each row needed."""
    if task.labels:
        return len(task.labels)
    return vocabulary * task.rows_per_example * (2 if task.uses_base else 1)
