"""Converts text to the tokens that a model continues, and new tokens back to text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedslm.tasks.base import Tokens, tokenise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNCUT = 1_000_000


def prompt_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Returns the token ids of the beginning of a text: as in training, without the end tokens."""
    ids = tokenise([text], tokenizer, _UNCUT)[0].input_ids
    special = set(tokenizer.all_special_ids)
    while len(ids) > 1 and ids[-1] in special:
        ids = ids[:-1]
    if not ids and tokenizer.bos_token_id is not None:
        return (int(tokenizer.bos_token_id),)
    return ids


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: Tokens, new: Tokens) -> str:
    """Returns the text that new tokens add to a prompt, including the exact space between them.

    Decoding only the new tokens would lose it: some tokenizers drop the space before the first word.
    """
    before = str(tokenizer.decode(list(prompt), skip_special_tokens=True))
    whole = str(tokenizer.decode([*prompt, *new], skip_special_tokens=True))
    if whole.startswith(before):
        return whole[len(before) :]
    return str(tokenizer.decode(list(new), skip_special_tokens=True))
