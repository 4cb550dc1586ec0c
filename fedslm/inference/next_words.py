"""The most likely next words of a text, as a keyboard suggests them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from fedslm.inference.inputs import Rows, text_of
from fedslm.inference.outputs import next_chances
from fedslm.inference.texts import continuation, prompt_tokens
from fedslm.inference.trained import Trained
from fedslm.tasks.base import Tokens

Answer = dict[str, Any]
_TOP = 3
_FIRST_TOKENS = 8
_WORD_TOKENS = 8
_NEXT_WORD = re.compile(r"\s*(\w+(?:['’-]\w+)*|[^\w\s]+)")


def continued(trained: Trained, rows: Rows, first: int) -> list[Answer]:
    """Returns the most likely next words of each text.

    Args:
        trained: Model of a run.
        rows: Rows with texts.
        first: Number of rows before these, for errors.

    Raises:
        DataError: A row's column contains something other than text.
    """
    column = trained.run.data.text_column
    texts = [text_of(row, column, first + at) for at, row in enumerate(rows, 1)]
    return [{"text": text, **_next_words(trained, text)} for text in texts]


def _next_words(trained: Trained, text: str) -> Answer:
    """Returns the most likely next words; a word's probability sums over likely tokenizations."""
    tokenizer = trained.model.tokenizer
    whole = prompt_tokens(text, tokenizer)
    longest = trained.run.task.max_length - _WORD_TOKENS
    prompt = whole if len(whole) <= max(1, longest) else whole[-max(1, longest) :]
    if not prompt:
        return {"next_words": [], "note": "no text"}
    chances = next_chances(trained, [prompt])[0]
    special = set(tokenizer.all_special_ids)
    likeliest = [int(token) for token in np.argsort(-chances) if int(token) not in special]
    spellings: dict[Tokens, float] = {
        (token,): float(chances[token]) for token in likeliest[:_FIRST_TOKENS]
    }
    words: dict[str, float] = {}
    for word, chance in _spelt_out(trained, text, prompt, spellings):
        words[word] = words.get(word, 0.0) + chance
    order = sorted(words.items(), key=lambda item: -item[1])[:_TOP]
    said = [{"word": word, "probability": chance} for word, chance in order]
    return {"next_words": said, **({"truncated": True} if len(prompt) < len(whole) else {})}


def _spelt_out(
    trained: Trained, text: str, prompt: Tokens, spellings: dict[Tokens, float]
) -> Iterator[tuple[str, float]]:
    """Extends word beginnings greedily, token by token, until the words end."""
    tokenizer = trained.model.tokenizer
    special = set(tokenizer.all_special_ids)
    for length in range(1, _WORD_TOKENS + 1):
        chances = next_chances(trained, [(*prompt, *each) for each in spellings])
        going: dict[Tokens, float] = {}
        for (begun, chance), following in zip(spellings.items(), chances, strict=True):
            token = int(following.argmax())
            longer = continuation(tokenizer, prompt, (*begun, token))
            match = _NEXT_WORD.match(longer)
            ended = token in special or length == _WORD_TOKENS
            if match and (ended or match.end() < len(longer)):
                yield _joined(text, longer, match.group(1)), chance
            elif not ended:
                going[(*begun, token)] = chance * float(following[token])
        if not going:
            return
        spellings = going


def _joined(text: str, following: str, word: str) -> str:
    """If the text stopped within a word, shows the whole word."""
    last = re.search(r"\w+$", text)
    glued = last and not following[:1].isspace() and word[:1].isalnum()
    return f"{last.group()}{word}" if last and glued else word
