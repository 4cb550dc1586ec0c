"""A tokenizer's chat template: how it formats turns, and the text around an assistant's answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedslm.data.turns import Turn
from fedslm.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARK = "\ue000"  # placeholder for an answer; from the private-use area, so it has no meaning in a text
_LONGEST_REASON = 200
_MOST_WRITTEN = 200_000  # characters, added to ten times the turns' own: a tool's schema is shorter


@dataclass(frozen=True)
class Frame:
    """The text that a template puts around an assistant's answer.

    Attributes:
        begin: The text between the generation prompt and the answer: a space, usually nothing.
        end: The text from the answer to the first special token after it; empty if there is none.
        header: The text before an answer, if the template writes it only together with one: such a
            template has no generation prompt, and this replaces it.
    """

    begin: str
    end: str
    header: str = ""


@dataclass(frozen=True)
class Segment:
    """A piece of a conversation's text.

    Attributes:
        text: The text as the template writes it.
        learned: Whether it is an assistant's text with the end of its turn.
    """

    text: str
    learned: bool


def rendered(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, asks: bool) -> str:
    """Renders turns in the tokenizer's own format, with reasoning disabled if the template has it.

    Args:
        turns: The turns, in order.
        tokenizer: A tokenizer with a chat template.
        asks: Whether the text ends where an answer starts.

    Raises:
        ModelError: The template does not parse, refuses these turns, or writes too much text.
    """
    try:
        text = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=asks, enable_thinking=False
        )
    except Exception as error:  # a template is the base's own program and may raise any error
        first = (str(error).splitlines() or [""])[0][:_LONGEST_REASON]
        roles = ", ".join(dict.fromkeys(turn["role"] for turn in turns))
        raise ModelError(
            f"the tokenizer's chat template cannot write turns of {roles}: {type(error).__name__}: "
            f'{first}; set task.prompt_format="plain"'
        ) from error
    most = _MOST_WRITTEN + 10 * sum(len(turn["content"]) for turn in turns)
    if len(text) > most:
        raise ModelError(
            f"the tokenizer's chat template writes {len(text):,} characters, and may write at most "
            f'{most:,} for these turns; set task.prompt_format="plain"'
        )
    return str(text)


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """Finds the text that the tokenizer's template puts around an answer, with made-up turns.

    Raises:
        ModelError: The template cannot be used.
    """
    question = {"role": "user", "content": "Why?"}
    asked = rendered([question], tokenizer, asks=True)
    answer = {"role": "assistant", "content": _MARK}
    whole = rendered([question, answer], tokenizer, asks=False)
    if whole.count(_MARK) != 1:
        raise ModelError(
            f"the tokenizer's chat template writes an answer {whole.count(_MARK)} times, not once; set "
            f'task.prompt_format="plain"'
        )
    before, _, after = whole.partition(_MARK)
    begin, end = before.removeprefix(asked), _up_to_special(after, tokenizer)
    if not before.startswith(asked):
        return Frame("", end)
    return Frame("", end, begin) if begin.strip() else Frame(begin, end)


def segments(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, frame: Frame) -> list[Segment]:
    """Splits a conversation up to the next answer at the start and end of each earlier answer.

    Formal guarantees:
        * Joined, the segments are the template's own text of the turns without the space around them.
        * Of a turn, exactly the assistant's text and the text that ends the turn are learned.

    Args:
        turns: The turns, in order; if the template refuses a system turn, it is merged into the first
            user turn.
        tokenizer: A tokenizer with a chat template.
        frame: The result of :func:`frame_of`.

    Raises:
        ModelError: The template refuses these turns, or does not write each answer once.
    """
    answers = [turn["content"].strip() for turn in turns if turn["role"] == "assistant"]
    pieces = _asked([_marked(turn) for turn in turns], tokenizer).split(_MARK)
    if len(pieces) != len(answers) + 1:
        raise ModelError(
            "the tokenizer's chat template does not write each answer once; set "
            'task.prompt_format="plain"'
        )
    found, begin = [], ""
    for number, piece in enumerate(pieces):
        if number:
            end = frame.end if piece.startswith(frame.end) else ""
            found.append(Segment(f"{begin}{answers[number - 1]}{end}", learned=True))
            piece = piece.removeprefix(end)
        begin = frame.begin if number < len(answers) and piece.endswith(frame.begin) else ""
        header = frame.header if number == len(answers) else ""
        found.append(Segment(f"{piece.removesuffix(begin)}{header}", learned=False))
    return [each for each in found if each.text]


def _marked(turn: Turn) -> Turn:
    """Replaces an assistant turn's content by the mark, and removes the mark from other turns."""
    content = turn["content"].strip().replace(_MARK, "\ufffd")
    content = _MARK if turn["role"] == "assistant" else content
    return {**turn, "content": content}


def _asked(turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase) -> str:
    """Renders turns up to an answer's start; merges the system turn if the template refuses it."""
    try:
        return rendered(turns, tokenizer, asks=True)
    except ModelError:
        if [turn["role"] for turn in turns[:2]] != ["system", "user"]:
            raise
    both = "\n\n".join(turn["content"] for turn in turns[:2])
    return rendered([{"role": "user", "content": both}, *turns[2:]], tokenizer, asks=True)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Returns the special token that ends an assistant's turn; None if no usable template has one."""
    if not tokenizer.chat_template:
        return None
    try:
        end = frame_of(tokenizer).end
    except ModelError:
        return None
    ids = tokenizer(end, add_special_tokens=False)["input_ids"] if end else []
    return int(ids[-1]) if ids else None


def _up_to_special(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns a text up to and including its first special token; empty without one."""
    special = [each.content for each in tokenizer.added_tokens_decoder.values() if each.special]
    found = [(text.index(each), -len(each)) for each in special if each in text]
    if not found:
        return ""
    start, negative = min(found)
    return text[: start - negative]
