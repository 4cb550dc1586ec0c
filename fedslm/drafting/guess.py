"""Guesses what data is for, from its columns and from how the base reads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedslm.config import ModelConfig
from fedslm.config.base import TaskName
from fedslm.config.tasks import TASKS, Network
from fedslm.drafting.survey import ANSWERS, CLASSES, PROMPTS, TEXTS, Column, layout_of, texts_in
from fedslm.models import families
from fedslm.models.base import resolve_config

_DOES: Mapping[families.Reads, tuple[Network, ...]] = {
    "both ways": ("classifier", "tagger"),
    "forwards": ("classifier", "tagger", "decoder"),
    "a text, then writes another": ("encoder-decoder",),
}
_WORDS_OF_A_CLASS = 3


@dataclass(frozen=True)
class Guess:
    """One task that the columns fit.

    Attributes:
        task: The task.
        why: The columns that fit it.
        is_clear: Whether their names or their form say so; otherwise nothing speaks against it.
    """

    task: TaskName
    why: str
    is_clear: bool = True


def guesses(columns: Sequence[Column], *, text: str | None, label: str | None) -> tuple[Guess, ...]:
    """Returns the tasks that columns fit, the clearest first.

    Args:
        columns: The columns, without those that name a person or a client.
        text: The column with the input, if it is known.
        label: The column with the target, if it is known.

    >>> columns = [Column("kind", "text", 4, 1.0, 90), Column("entry", "text", 90, 14.0, 90)]
    >>> [(each.task, each.is_clear) for each in guesses(columns, text=None, label=None)]
    [('classification', True), ('causal-lm', False)]
    """
    inputs = [each for each in columns if each.name == text or (text is None and each.name != label)]
    targets = [each for each in columns if each.name == label or (label is None and each.name != text)]
    if layout := layout_of("preference", columns):
        return (Guess("preference", ", ".join(layout)),)
    found = [*_of_form(inputs, targets), *_of_texts(columns, inputs, targets, label)]
    return tuple(sorted(found, key=lambda each: not each.is_clear))


def best(found: Sequence[Guess], reads: families.Reads | None) -> tuple[Guess, ...]:
    """Returns the guesses between which nothing decides: one if it is clear, none if none is possible.

    Args:
        found: As from :func:`guesses`.
        reads: How the base reads; None: unknown.

    >>> found = [Guess("instruction", "prompt, completion"), Guess("seq2seq", "prompt, completion")]
    >>> [each.task for each in best(found, "forwards")], len(best(found, None))
    (['instruction'], 2)
    """
    may = [each for each in found if reads is None or TASKS[each.task].network in _DOES[reads]]
    return tuple(each for each in may if each.is_clear) or tuple(may)


def reads_of(model: ModelConfig) -> families.Reads | None:
    """Returns how a base reads, by its ``config.json``; None for an unknown architecture.

    Raises:
        ModelError: The base cannot be found.
    """
    values = families.configuration(resolve_config(model))
    known = families.PROVED.get(values["model_type"])
    if known is None:
        return "a text, then writes another" if values.get("is_encoder_decoder") is True else None
    return known.reads


def _of_form(inputs: Sequence[Column], targets: Sequence[Column]) -> Iterator[Guess]:
    """Yields tasks whose columns have a form of their own: conversations, lists."""
    for each in inputs:
        if each.kind == "turns":
            yield Guess("instruction", f"{each.name} has conversations")
            return
    lists = [each for each in targets if each.kind == "list"]
    for words in inputs:
        for tags in lists:
            if words.kind == "list" and words is not tags and math.isclose(words.words, tags.words):
                yield Guess("token-classification", f"lists of the same length, {_both(words, tags)}")
                return
    if lists and any(map(_is_text, inputs)):
        yield Guess("multi-label", f"{lists[0].name} has lists, next to a text")


def _of_texts(
    columns: Sequence[Column], inputs: Sequence[Column], targets: Sequence[Column], label: str | None
) -> Iterator[Guess]:
    """Yields tasks that read a text and learn a class, an answer, or the text itself."""
    texts = [each for each in inputs if _is_text(each)]
    if not texts:
        return
    main = texts_in("classification", texts, [])[0]
    classes = [each for each in targets if _is_class(each) and each.name != main]
    named = [each for each in classes if each.name.lower() in CLASSES or each.name == label]
    has_lists = any(each.kind in ("list", "turns") for each in columns)
    for each in named[:1] or ([] if has_lists else classes[:1]):
        why = f"{each.name} has {each.different} different values"
        yield Guess("classification", why, is_clear=bool(named))
    if not has_lists:
        yield from _answers(texts, [each for each in targets if each not in named], columns)
        yield Guess("causal-lm", f"{main} has texts", is_clear=False)


def _answers(
    texts: Sequence[Column], targets: Sequence[Column], columns: Sequence[Column]
) -> Iterator[Guess]:
    """Yields the tasks that learn to answer: clear by usual names, possible with any two texts."""
    prompts = [each for each in texts if each.name.lower() in PROMPTS]
    answers = [each for each in targets if each.name.lower() in ANSWERS]
    layout = layout_of("instruction", columns)
    usual = [_both(a, b) for a in prompts for b in answers if a is not b]
    long = [each for each in targets if each.kind == "text" and each.words > 1]
    found = [", ".join(layout)] if layout else usual
    other = [_both(a, b) for a in texts for b in long if a is not b]
    for why in (found or other)[:1]:
        yield Guess("instruction", why, is_clear=bool(found))
        yield Guess("seq2seq", why, is_clear=bool(found))


def _is_text(column: Column) -> bool:
    """Whether a column looks like a text to read."""
    return column.kind == "text" and (column.words > 1 or column.name.lower() in (*TEXTS, *PROMPTS))


def _is_class(column: Column) -> bool:
    """Whether a column looks like the name of a class: few values, or a usual name and short values."""
    if column.kind not in ("text", "number"):
        return False
    is_named = column.name.lower() in CLASSES and column.words <= _WORDS_OF_A_CLASS
    return column.is_like_classes or (is_named and column.name.lower() not in ANSWERS)


def _both(first: Column, second: Column) -> str:
    """The names of two columns."""
    return f"{first.name} and {second.name}"
