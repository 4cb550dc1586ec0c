"""Tests of answers as chat templates frame them."""

from __future__ import annotations

import pytest
from support.kinds import PROMPTS
from support.templates import BROKEN, CHATML, ENDS, GEMMA, HEADLESS, chat_tokenizer
from transformers import PreTrainedTokenizerBase

from fedslm.errors import ModelError
from fedslm.tasks import chat
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.preference import Preference
from fedslm.tasks.prompts import Prompts, Said
from fedslm.tasks.seq2seq import Seq2Seq
from fedslm.tasks.tokens import IGNORED

CHAT = Prompts("{text}", "auto", 64, None)
ROW = {"text": "chest pain", "answer": "fever and cough", "worse": "cough"}


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without special ones around it."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", ENDS)
def test_an_answer_ends_as_the_template_ends_a_turn(name: str) -> None:
    """The tokens are those of the template's own text; learned are the answer and the turn's end."""
    template, end = ENDS[name]
    tokenizer = chat_tokenizer(template)
    turns = [{"role": "user", "content": "chest pain"}]
    asked = chat.rendered(turns, tokenizer, asks=True)
    answered = [*turns, {"role": "assistant", "content": "fever and cough"}]
    whole = chat.rendered(answered, tokenizer, asks=False)
    (example,) = Instruction(CHAT, "answer").prepare([ROW], tokenizer).examples
    learned = [each for each in example.targets if each != IGNORED]
    assert learned == [*ids_of(tokenizer, "fever and cough"), *ids_of(tokenizer, end)]
    assert list(example.input_ids) == [*ids_of(tokenizer, asked), *learned]
    if name != "plain":
        up_to_end = whole[: whole.rindex(end) + len(end)]
        assert list(example.input_ids) == ids_of(tokenizer, up_to_end)
    better = Preference(CHAT, "answer", "worse", 0.1).prepare([ROW], tokenizer).examples[0]
    assert (better.input_ids, better.targets) == (example.input_ids, example.targets)
    assert better.rejected is not None
    assert better.rejected.input_ids[-1:] == example.input_ids[-1:]


def test_a_template_without_a_generation_prompt_is_given_one() -> None:
    """The header of an answer is asked with and never learned, as ChatML with a generation prompt is."""
    rows = [
        ROW,
        {
            "text": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
                {"role": "user", "content": "chest pain"},
            ],
            "answer": "fever",
        },
    ]
    made = [
        Instruction(CHAT, "answer").prepare(rows, chat_tokenizer(each)).examples
        for each in (HEADLESS, CHATML)
    ]
    assert len(made[0]) == 2
    assert made[0] == made[1]
    said = [Said(({"role": "user", "content": "chest pain"},))]
    bare, usual = (CHAT.asked(said, chat_tokenizer(each)) for each in (HEADLESS, CHATML))
    assert bare == usual


def test_without_a_chat_an_answer_ends_with_eos() -> None:
    """Plain prompts and sequence-to-sequence targets know no turns."""
    tokenizer = chat_tokenizer(CHATML)
    expected = (*ids_of(tokenizer, "fever and cough"), tokenizer.eos_token_id)
    (plain,) = Instruction(PROMPTS, "answer").prepare([ROW], tokenizer).examples
    assert plain.input_ids[-len(expected) :] == expected
    (written,) = Seq2Seq(PROMPTS, "answer").prepare([ROW], tokenizer).examples
    assert written.targets == expected


def test_seq2seq_has_no_chat() -> None:
    """A template beside an encoder-decoder is not looked at."""
    from fedslm.config import DataConfig, TaskConfig
    from fedslm.tasks import build

    task = build(TaskConfig(name="seq2seq"), DataConfig(source="x", label_column="answer"), ())
    tokenizer = chat_tokenizer(BROKEN["raises"])
    (example,) = task.prepare([ROW], tokenizer).examples
    assert example.targets[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_used_says_what_to_do(name: str) -> None:
    """Whatever it does, the error names the way out, before any record is looked at."""
    tokenizer = chat_tokenizer(BROKEN[name])
    with pytest.raises(ModelError, match=r'task\.prompt_format="plain"'):
        Instruction(CHAT, "answer").prepare([], tokenizer)
    assert chat.end_token(tokenizer) is None
    assert Instruction(PROMPTS, "answer").prepare([ROW], tokenizer).examples  # the way out


def test_the_end_of_a_turn_is_a_token() -> None:
    """It is what a model that writes stops at."""
    for template, end in ((CHATML, "<|im_end|>"), (GEMMA, "<end_of_turn>")):
        tokenizer = chat_tokenizer(template)
        assert chat.end_token(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    tokenizer.chat_template = None
    assert chat.end_token(tokenizer) is None
