"""Turns a row into the tokens of a prompt and of the completion after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedslm.config import DataConfig, TaskConfig
from fedslm.config.tasks import TASKS
from fedslm.data.columns import placeholders
from fedslm.data.turns import Turn, answered, turns_of
from fedslm.data.values import is_value, text_in
from fedslm.errors import ModelError
from fedslm.tasks import chat, tokens
from fedslm.tasks.base import CHARACTERS, Encoded, Example, Row, Tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1_000_000
_BETWEEN = "\n\n"  # between turns without a chat template


@dataclass(frozen=True)
class Said:
    """A row as turns and an answer.

    Attributes:
        turns: The model's input; a plain prompt is one user turn. Empty if it cannot be read.
        answer: The answer that the model should give.
    """

    turns: tuple[Turn, ...]
    answer: str = ""


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt in tokens.

    Attributes:
        ids: Not truncated, ready for an answer to follow; empty if the prompt cannot be used.
        targets: The token ids of earlier assistant turns, including their end; others are ignored.
    """

    ids: Tokens
    targets: Tokens


@dataclass(frozen=True)
class Prompts:
    """How a row becomes the model's input.

    Attributes:
        template: Text with columns in braces.
        format: "chat", "plain" or "auto" (chat if the tokenizer has a template).
        max_length: Maximum length of prompt and completion together, in tokens.
        max_target_length: Maximum length of a completion in tokens; None: the remaining room.

    Raises:
        ConfigError: The template is not valid.
    """

    template: str
    format: Literal["auto", "chat", "plain"]
    max_length: int
    max_target_length: int | None

    def __post_init__(self) -> None:
        placeholders(self.template)  # only column names are allowed: a template may come from a server

    @classmethod
    def of(cls, task: TaskConfig, data: DataConfig) -> Prompts:
        """Returns the prompts that a config describes."""
        template = task.prompt or f"{{{data.text_column}}}"
        style = task.prompt_format if TASKS[task.name].reads_turns else "plain"
        return cls(template, style, task.max_length, task.max_target_length)

    def text(self, row: Row) -> str:
        """Returns the prompt of a row, before any chat template is applied."""
        room = CHARACTERS * self.max_length
        return self.template.format_map({key: _bounded(text_in(row[key]), room) for key in row})

    def is_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """True if prompts use the tokenizer's chat template."""
        return self.format == "chat" or (self.format == "auto" and bool(tokenizer.chat_template))

    def said(self, row: Row, column: str | None) -> Said:
        """Reads a row as turns and an answer.

        Args:
            row: A row; its prompt is the filled template or the text column, which contains a text, or
                turns in the format of TRL and ShareGPT.
            column: Column with the answer: a text, or turns. Turns replace the row's prompt if they
                have a role other than the assistant before the answer. None: the prompt's last
                assistant turn is the answer.
        """
        turns = self._turns(row)
        if column is None:
            return Said(*answered(turns))
        own = turns_of(row[column])
        if not own:
            return Said(turns, text_in(row[column]))
        before, answer = answered(own)
        whole = any(turn["role"] != "assistant" for turn in before)
        return Said(before if whole else (*turns, *before), answer)

    def _turns(self, row: Row) -> tuple[Turn, ...]:
        """Returns a row's prompt as turns."""
        names = placeholders(self.template)
        if self.template == f"{{{names[0]}}}" and not is_value(value := row[names[0]]):
            return self._within(turns_of(value))
        return ({"role": "user", "content": self.text(row)},)

    def _within(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """Returns the last turns that may fit, after the system turn if there is one."""
        room = CHARACTERS * self.max_length
        bounded = [{**turn, "content": _bounded(turn["content"], room)} for turn in turns]
        first, used = len(bounded), 0
        while first and (used := used + len(bounded[first - 1]["content"])) <= room:
            first -= 1
        first = min(first, len(bounded) - 1) if bounded else 0
        while 0 < first < len(bounded) and bounded[first]["role"] != "user":
            first += 1
        opening = bounded[:1] if first and bounded[0]["role"] == "system" else []
        return (*opening, *bounded[first:])

    def asked(self, said: Sequence[Said], tokenizer: PreTrainedTokenizerBase) -> list[EncodedPrompt]:
        """Tokenises prompts; a prompt gets no tokens if the chat template refuses its turns.

        Formal guarantees:
            * Whether a prompt has tokens depends only on its own turns, the tokenizer and the config.

        Raises:
            ModelError: The chat template cannot be used at all.
        """
        if not self.is_chat(tokenizer):
            return self._asked_plainly(said, tokenizer)
        frame = chat.frame_of(tokenizer)
        cut = [_in_chat(each.turns, tokenizer, frame) for each in said]
        pieces = iter(_bare([segment.text for each in cut for segment in each], tokenizer))
        return [_joined([(next(pieces).input_ids, one.learned) for one in each]) for each in cut]

    def _asked_plainly(
        self, said: Sequence[Said], tokenizer: PreTrainedTokenizerBase
    ) -> list[EncodedPrompt]:
        """Tokenises prompts without a template: a text unchanged, or turns one after another."""
        cut = [_one_after_another(each.turns) for each in said]
        begun = tokenise([each[0].text for each in cut if each], tokenizer, _UNCUT)
        firsts = iter([_unended(each.input_ids, tokenizer) for each in begun])
        later = _bare([segment.text for each in cut for segment in each[1:]], tokenizer)
        pieces, end = iter([each.input_ids for each in later]), self.ending(tokenizer)
        found = []
        for segments in cut:
            made = [(next(firsts), False)] if segments else []
            for segment in segments[1:]:
                ids = next(pieces)
                made.append(((*ids, *end) if segment.learned else ids, segment.learned))
            found.append(_joined(made))
        return found

    def completions(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
        """Tokenises completions, not truncated; each ends as in the chat template, or with EOS.

        Raises:
            ModelError: The chat template cannot be used.
        """
        end, room = self.ending(tokenizer), CHARACTERS * self.max_length
        texts = [text[:room] for text in texts]
        if self.is_chat(tokenizer):
            begin = chat.frame_of(tokenizer).begin
            texts = [f"{begin}{text.strip()}" for text in texts]
        return [(*each.input_ids, *end) for each in _bare(texts, tokenizer)]

    def ending(self, tokenizer: PreTrainedTokenizerBase) -> Tokens:
        """Returns the token ids after a completion; empty if there is no end token.

        Raises:
            ModelError: The chat template cannot be used.
        """
        if self.is_chat(tokenizer) and (end := chat.frame_of(tokenizer).end):
            return _bare([end], tokenizer)[0].input_ids
        return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)

    def join(self, prompt: EncodedPrompt, completion: Tokens) -> tuple[Example, bool]:
        """Appends a completion to a prompt, and returns whether either was truncated.

        A long completion loses its end: it may have ``max_target_length`` tokens, or otherwise the
        room that the prompt leaves, but at least half. A prompt that is then too long keeps its first
        token and its end, which contains the question and the chat template's text before the answer.
        ``targets`` are the completion's tokens, and those of earlier answers.
        """
        length = len(prompt.ids)
        most = self.max_target_length or max(self.max_length // 2, self.max_length - length)
        answer = completion[: min(most, self.max_length - 1)]
        room = self.max_length - len(answer)
        asked, targets = (_fitted(each, room) for each in (prompt.ids, prompt.targets))
        cut = len(asked) + len(answer) < length + len(completion)
        return Example((*asked, *answer), targets=(*targets, *answer)), cut


def _bare(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenises without special tokens."""
    return tokenise(texts, tokenizer, _UNCUT, add_special_tokens=False)


def _in_chat(
    turns: tuple[Turn, ...], tokenizer: PreTrainedTokenizerBase, frame: chat.Frame
) -> list[chat.Segment]:
    """Splits turns as the template writes them; empty if the template refuses them."""
    try:
        return chat.segments(turns, tokenizer, frame) if turns else []
    except ModelError:  # only this record: loading refuses a template that no turns fit
        return []


def _one_after_another(turns: tuple[Turn, ...]) -> list[chat.Segment]:
    """Turns without a template become segments; the first one is never learned."""
    if len(turns) == 1:
        return [chat.Segment(turns[0]["content"], learned=False)]
    found: list[chat.Segment] = []
    for turn in turns:
        speaks = turn["role"] == "assistant"
        text = turn["content"].strip() if speaks else f"{turn['content']}{_BETWEEN}"
        found.append(chat.Segment(text, learned=speaks))
    return found if not found or not found[0].learned else [chat.Segment("", learned=False), *found]


def _unended(ids: Tokens, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Removes the end-of-sequence token from a text's token ids."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _joined(pieces: Sequence[tuple[Tokens, bool]]) -> EncodedPrompt:
    """Concatenates token ids, with targets for the learned pieces."""
    ids = tuple(token for piece, _ in pieces for token in piece)
    targets = tuple(
        token if learned else tokens.IGNORED for piece, learned in pieces for token in piece
    )
    return EncodedPrompt(ids, targets)


def _fitted(prompt: Tokens, room: int) -> Tokens:
    """Truncates a prompt that is too long to its first token and its end."""
    return prompt if len(prompt) <= room else (*prompt[:1], *prompt[len(prompt) - room + 1 :])


def _bounded(text: str, room: int) -> str:
    """Truncates a very long text to its start and its end."""
    return text if len(text) <= room else text[: room // 2] + text[-(room - room // 2) :]
