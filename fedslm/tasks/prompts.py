"""From a row to the tokens of a prompt, and of the completion behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedslm.config import DataConfig, TaskConfig
from fedslm.data.columns import placeholders
from fedslm.data.values import text_in
from fedslm.tasks import chat, tokens
from fedslm.tasks.base import CHARACTERS, Encoded, Example, Row, Tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1_000_000


@dataclass(frozen=True)
class Prompts:
    """How a row is put to a model.

    Attributes:
        template: Text with columns in braces.
        format: "chat", "plain" or "auto" (chat where the tokenizer has a template).
        max_length: Longest prompt and completion together, in tokens.
        max_target_length: Longest completion in tokens; None: what there is room for.

    Raises:
        ConfigError: The template is none.
    """

    template: str
    format: Literal["auto", "chat", "plain"]
    max_length: int
    max_target_length: int | None

    def __post_init__(self) -> None:
        placeholders(self.template)  # names of columns alone: a template may come from a server

    @classmethod
    def of(cls, task: TaskConfig, data: DataConfig) -> Prompts:
        """The prompts that a config describes."""
        template = task.prompt or f"{{{data.text_column}}}"
        style = "plain" if task.name == "seq2seq" else task.prompt_format
        return cls(template, style, task.max_length, task.max_target_length)

    def text(self, row: Row) -> str:
        """The prompt of a row, before any chat template."""
        room = CHARACTERS * self.max_length
        return self.template.format_map({key: _bounded(text_in(row[key]), room) for key in row})

    def is_chat(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether prompts are put to a model by the tokenizer's chat template."""
        return self.format == "chat" or (self.format == "auto" and bool(tokenizer.chat_template))

    def tokens(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
        """Token ids of prompts, uncut, ready for a completion to follow.

        Raises:
            ModelError: The chat template cannot be used.
        """
        if self.is_chat(tokenizer):
            texts = [_asked(text, tokenizer) for text in texts]
            return [each.input_ids for each in _bare(texts, tokenizer)]
        ended = [each.input_ids for each in tokenise(texts, tokenizer, _UNCUT)]
        end = tokenizer.eos_token_id
        return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in ended]

    def completions(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tokens]:
        """Token ids of completions, uncut, each ended: as the chat template ends a turn, or by EOS.

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
        """Token ids behind a completion; none if nothing ends one.

        Raises:
            ModelError: The chat template cannot be used.
        """
        if self.is_chat(tokenizer) and (end := chat.frame_of(tokenizer).end):
            return _bare([end], tokenizer)[0].input_ids
        return () if tokenizer.eos_token_id is None else (int(tokenizer.eos_token_id),)

    def join(self, prompt: Tokens, completion: Tokens) -> tuple[Example, bool]:
        """Puts a completion behind a prompt, and says whether either was cut.

        A long completion loses its end: it may take ``max_target_length`` tokens, or else what the
        prompt leaves, but at least half. A prompt that is then too long keeps its first token and its
        end: there the question stands, and what a chat template puts before the answer. ``targets`` are
        the completion's tokens alone.
        """
        most = self.max_target_length or max(self.max_length // 2, self.max_length - len(prompt))
        answer = completion[: min(most, self.max_length - 1)]
        room = self.max_length - len(answer)
        asked = prompt if len(prompt) <= room else (*prompt[:1], *prompt[len(prompt) - room + 1 :])
        targets = (*((tokens.IGNORED,) * len(asked)), *answer)
        cut = len(asked) + len(answer) < len(prompt) + len(completion)
        return Example((*asked, *answer), targets=targets), cut


def _bare(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokenises without special tokens."""
    return tokenise(texts, tokenizer, _UNCUT, add_special_tokens=False)


def _asked(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """One user's turn in the tokenizer's own chat format, up to where the answer begins."""
    return chat.rendered([{"role": "user", "content": text}], tokenizer, asks=True)


def _bounded(text: str, room: int) -> str:
    """A text, or the beginning and the end of a very long one."""
    return text if len(text) <= room else text[: room // 2] + text[-(room - room // 2) :]
