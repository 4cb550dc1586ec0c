"""Tests of conversations: which tokens are learned, in every format that they come in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from support.kinds import losses_of
from support.templates import CHATML, ENDS, GEMMA, PLAIN, chat_tokenizer
from transformers import PreTrainedTokenizerBase

from fedslm.config import DataConfig, TaskConfig
from fedslm.data import labels
from fedslm.errors import DataError
from fedslm.tasks import chat
from fedslm.tasks.base import Example
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.preference import Preference
from fedslm.tasks.prompts import Prompts
from fedslm.tasks.tokens import IGNORED
from fedslm.validation import check

CHAT = Prompts("{messages}", "auto", 256, None)
ANSWERS = ("rest and water", "no cough at all", "two days")
TURNS = [
    {"role": "user", "content": "what helps fever"},
    {"role": "assistant", "content": ANSWERS[0]},
    {"role": "user", "content": "and with chest pain"},
    {"role": "assistant", "content": f" {ANSWERS[1]}\n"},
    {"role": "user", "content": "how long"},
    {"role": "assistant", "content": ANSWERS[2]},
]
NAMES = {"user": "human", "assistant": "gpt", "system": "system"}
WHOLE = Instruction(CHAT, None)


def share_gpt(turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same conversation as ShareGPT writes it."""
    return [{"from": NAMES[turn["role"]], "value": turn["content"]} for turn in turns]


def only(task: Instruction | Preference, row: dict[str, Any], tokenizer: Any) -> Example:
    """The example of a row."""
    (example,) = task.prepare([row], tokenizer).examples
    return example


def learned_by_offsets(tokenizer: PreTrainedTokenizerBase, text: str, end: str) -> list[int]:
    """Tokens of a whole rendered text that lie within an answer or the end of its turn, else ignored."""
    spans = []
    for answer in ANSWERS:
        first = text.index(answer)
        last = text.index(end, first) + len(end) if end else first + len(answer)
        spans.append((first, last))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    inside = [any(a <= start < stop <= b for a, b in spans) and token for token, (start, stop) in pairs]
    return [IGNORED if token is False else token for token in inside]


@pytest.mark.parametrize("name", ENDS)
def test_exactly_what_an_assistant_says_is_learned(name: str) -> None:
    """Token by token: each answer and the end of its turn, found again by offsets in the whole text."""
    template, end = ENDS[name]
    tokenizer = chat_tokenizer(template)
    example = only(WHOLE, {"messages": TURNS}, tokenizer)
    stripped = [{**turn, "content": turn["content"].strip()} for turn in TURNS]
    whole = chat.rendered(stripped, tokenizer, asks=False)
    if name == "plain":  # nothing in the text ends a turn: EOS ends the last
        whole, end = f"{whole.rstrip()}[SEP]", ""
    else:
        whole = whole[: whole.rindex(end) + len(end)]
    assert list(example.input_ids) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    expected = learned_by_offsets(tokenizer, whole, end)
    if name == "plain":
        expected[-1] = tokenizer.eos_token_id
    assert list(example.targets) == expected
    assert sum(target != IGNORED for target in expected) > 8


def test_every_way_to_write_a_conversation_is_the_same_example() -> None:
    """TRL's messages, ShareGPT's conversations, prompt and completion as turns or as text."""
    tokenizer = chat_tokenizer(CHATML)
    expected = only(WHOLE, {"messages": TURNS}, tokenizer)
    assert only(WHOLE, {"messages": share_gpt(TURNS)}, tokenizer) == expected
    parts = Instruction(replace(CHAT, template="{prompt}"), "completion")
    for split in (TURNS, share_gpt(TURNS)):
        row = {"prompt": split[:-1], "completion": split[-1:]}
        assert only(parts, row, tokenizer) == expected
        assert only(parts, {**row, "completion": ANSWERS[2]}, tokenizer) == expected
    in_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
    assert only(WHOLE, {"messages": in_parts}, tokenizer) == expected
    one_turn = only(parts, {"prompt": TURNS[:1], "completion": TURNS[1:2]}, tokenizer)
    assert one_turn == only(parts, {"prompt": TURNS[0]["content"], "completion": ANSWERS[0]}, tokenizer)
    asks_on = [*TURNS, {"role": "user", "content": "thanks"}]
    assert only(WHOLE, {"messages": asks_on}, tokenizer) == expected  # nobody answers that


def test_a_conversation_is_one_example_with_the_mean_of_its_tokens() -> None:
    """However many answers, one example has one loss: the mean over what is learned."""
    tokenizer = chat_tokenizer(CHATML)
    example = only(WHOLE, {"messages": TURNS}, tokenizer)
    short = Example(tuple(token % 17 for token in example.input_ids), targets=example.targets)
    short = replace(short, targets=tuple(t if t == IGNORED else t % 17 for t in example.targets))
    (whole,) = losses_of(WHOLE, [short]).tolist()
    alone, at = [], [n for n, target in enumerate(short.targets) if target != IGNORED]
    for number in at:
        targets = [t if n == number else IGNORED for n, t in enumerate(short.targets)]
        alone += losses_of(WHOLE, [replace(short, targets=tuple(targets))]).tolist()
    assert whole == pytest.approx(sum(alone) / len(at))


def test_preferences_come_as_turns_too() -> None:
    """With the prompt beside them or in them; what an assistant said before is not part of the choice."""
    tokenizer = chat_tokenizer(CHATML)
    task = Preference(replace(CHAT, template="{prompt}"), "chosen", "rejected", 0.1)
    history, good = TURNS[:-1], TURNS[-1:]
    bad = [{"role": "assistant", "content": "never"}]
    row = {"prompt": history, "chosen": good, "rejected": bad}
    expected = only(task, row, tokenizer)
    assert expected.rejected is not None
    for example, answer in ((expected, ANSWERS[2]), (expected.rejected, "never")):
        learned = [target for target in example.targets if target != IGNORED]
        assert learned == tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
    assert only(task, {**row, "chosen": ANSWERS[2], "rejected": "never"}, tokenizer) == expected
    implicit = Preference(replace(CHAT, template="{chosen}"), "chosen", "rejected", 0.1)
    carried = {"chosen": share_gpt([*history, *good]), "rejected": share_gpt([*history, *bad])}
    assert only(implicit, carried, tokenizer) == expected
    other = {**carried, "rejected": share_gpt([*TURNS[:1], *bad])}
    assert implicit.prepare([other], tokenizer).kept == ()


def test_a_system_s_turn_is_kept_where_the_template_has_none() -> None:
    """It joins the first user's turn; where there is one it stands by itself."""
    system = {"role": "system", "content": "be brief"}
    gemma, chatml = chat_tokenizer(GEMMA), chat_tokenizer(CHATML)
    example = only(WHOLE, {"messages": [system, *TURNS]}, gemma)
    joined = [{"role": "user", "content": "be brief\n\nwhat helps fever"}, *TURNS[1:]]
    assert example == only(WHOLE, {"messages": joined}, gemma)
    text = chatml.decode(only(WHOLE, {"messages": [system, *TURNS]}, chatml).input_ids)
    assert text.startswith("<|im_start|> system be brief <|im_end|>")


@pytest.mark.parametrize(
    "value",
    [
        TURNS[1:],
        [],
        [{"role": "narrator", "content": "once"}, TURNS[1]],
        [{"role": "user", "content": 3}, TURNS[1]],
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}, TURNS[1]],
        TURNS[:1],
        None,
        "a text",
    ],
    ids=["refused", "empty", "role", "number", "picture", "unanswered", "none", "text"],
)
def test_a_conversation_that_cannot_be_read_is_left_out_alone(value: Any) -> None:
    """Whatever is wrong with one record, the others are as if it were not there."""
    tokenizer = chat_tokenizer(GEMMA)
    expected = WHOLE.prepare([{"messages": TURNS}], tokenizer)
    prepared = WHOLE.prepare([{"messages": value}, {"messages": TURNS}], tokenizer)
    assert (prepared.kept, prepared.examples) == ((1,), expected.examples)


@pytest.mark.parametrize("most", [8, 16, 24, 40])
@pytest.mark.parametrize("template", [CHATML, PLAIN, None])
def test_what_is_cut_stays_aligned(template: str | None, most: int) -> None:
    """A target is its own position's token, or ignored; the last answer is what stays longest."""
    tokenizer = chat_tokenizer(CHATML)
    tokenizer.chat_template = template
    task = Instruction(replace(CHAT, max_length=most), None)
    prepared = task.prepare([{"messages": TURNS}], tokenizer)
    (example,) = prepared.examples
    pairs = list(zip(example.input_ids, example.targets, strict=True))
    assert all(target in (token, IGNORED) for token, target in pairs)
    last = tokenizer(ANSWERS[2], add_special_tokens=False)["input_ids"]
    assert [token for token, target in pairs if target != IGNORED][-len(last) - 1 :][:-1] == last
    assert len(example.input_ids) <= most


def test_without_a_template_answers_end_with_eos() -> None:
    """Turns stand one after another; each answer and its end are learned."""
    tokenizer = chat_tokenizer(CHATML)
    plain = Instruction(replace(CHAT, format="plain"), None)
    example = only(plain, {"messages": TURNS}, tokenizer)
    learned = [target for target in example.targets if target != IGNORED]
    text = "".join(f"{answer}[SEP]" for answer in ANSWERS)
    assert learned == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert example.input_ids[0] == tokenizer.cls_token_id


def test_a_very_long_conversation_costs_what_a_long_one_does() -> None:
    """Of a hundred thousand turns the last are looked at, and the system's."""
    tokenizer = chat_tokenizer(CHATML)
    turns = [{"role": "system", "content": "be brief"}, *TURNS[:2] * 50_000, *TURNS[-2:]]
    said = CHAT.said({"messages": turns}, None)
    assert sum(len(turn["content"]) for turn in said.turns) <= 2 * 32 * CHAT.max_length
    assert [turn["role"] for turn in said.turns[:2]] == ["system", "user"]
    assert WHOLE.prepare([{"messages": turns}], tokenizer).truncated == 1


def test_text_that_looks_like_the_mark_is_text() -> None:
    """A character that stands for answers inside is not an answer when a user writes it."""
    tokenizer = chat_tokenizer(CHATML)
    odd = [{"role": "user", "content": "what \ue000 helps"}, TURNS[1], *TURNS[2:]]
    example = only(WHOLE, {"messages": odd}, tokenizer)
    learned = [target for target in example.targets if target != IGNORED]
    assert (
        learned
        == tokenizer("".join(f"{answer}<|im_end|>" for answer in ANSWERS), add_special_tokens=False)[
            "input_ids"
        ]
    )


def test_a_simulation_reads_them(make_config: Any) -> None:
    """Conversations need no label column; what is not one, or has no answer, is refused by name."""
    from datasets import Dataset

    data = {"text_column": "messages", "label_column": ""}
    config = make_config(data=data, task={"name": "instruction", "pooling": "native"})
    check(config)
    task, columns = TaskConfig(name="instruction"), DataConfig(source="x", **data)
    labels.check(Dataset.from_list([{"messages": TURNS}]), columns, task, "training")
    for value, part in (
        (TURNS[:1], "no conversation with an answer in column 'messages', but turns"),
        ("a text", "but a text (rows 0); name the column with the answers in data.label_column"),
    ):
        with pytest.raises(DataError) as caught:
            labels.check(Dataset.from_list([{"messages": value}]), columns, task, "training")
        assert part in str(caught.value)
    odd = [{"role": "narrator", "content": "once"}]
    beside = DataConfig(source="x", text_column="messages", label_column="answer")
    rows = Dataset.from_list([{"messages": odd, "answer": "a"}])
    with pytest.raises(DataError, match=r"unknown role.*roles are system, user"):
        labels.check(rows, beside, task, "training")
