"""Tests of prompts and completions, and of the tasks that are made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.kinds import KINDS, PAD, PROMPTS, VOCABULARY, by_hand, examples_of, logits_of, losses_of
from transformers import PreTrainedTokenizerBase

from fedslm.config import DataConfig, TaskConfig
from fedslm.errors import ConfigError
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build
from fedslm.tasks.instruction import Instruction
from fedslm.tasks.preference import Preference
from fedslm.tasks.prompts import Prompts
from fedslm.tasks.seq2seq import Seq2Seq
from fedslm.tasks.tokens import IGNORED

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROW = {"text": "chest pain", "site": "left arm", "answer": "fever and cough", "worse": "cough"}
WRITING = ["instruction", "seq2seq", "preference"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer with an end token, as generative ones have."""
    made = load_tokenizer(DEMO_DIRECTORY)
    made.eos_token = made.sep_token
    return made


def test_the_config_says_how_a_row_becomes_a_prompt() -> None:
    """Template, format, lengths and columns come from the config."""
    data = DataConfig(source="x", text_column="q", label_column="a", rejected_column="b")
    config = TaskConfig(
        name="instruction", prompt="Q: {q}", prompt_format="plain", max_length=9, max_target_length=4
    )
    prompts = Prompts("Q: {q}", "plain", 9, 4)
    assert build(config, data, ()) == Instruction(prompts, "a")
    assert build(config.model_copy(update={"name": "seq2seq"}), data, ()) == Seq2Seq(prompts, "a")
    preference = config.model_copy(update={"name": "preference", "beta": 0.3})
    assert build(preference, data, ()) == Preference(prompts, "a", "b", 0.3)
    bare = build(TaskConfig(name="instruction"), data, ())
    assert isinstance(bare, Instruction)
    assert bare.prompts.template == "{q}"


def test_a_template_takes_any_columns() -> None:
    """Columns in braces are filled in; a missing value is nothing."""
    prompts = replace(PROMPTS, template="{text} / {site}:")
    assert prompts.text(ROW) == "chest pain / left arm:"
    assert prompts.text({**ROW, "site": None}) == "chest pain / :"


@pytest.mark.parametrize("template", ["{text.__class__}", "{text:>999999999}", "{}", "{0}", "{te"])
def test_a_template_from_a_server_names_columns_alone(template: str) -> None:
    """Attributes, widths and positions are refused before any record is looked at."""
    with pytest.raises(ConfigError, match=r"task\.prompt"):
        Prompts(template, "plain", 16, 6)


def test_the_loss_is_on_the_completion_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    """A record is prompt, completion, end; only completion and end are targets."""
    (example,) = KINDS["instruction"].prepare([ROW], tokenizer).examples
    prompt = tokenizer("chest pain")["input_ids"][:-1]  # without the end that the tokenizer puts
    answer = tokenizer("fever and cough", add_special_tokens=False)["input_ids"]
    assert list(example.input_ids) == [*prompt, *answer, tokenizer.eos_token_id]
    assert list(example.targets) == [
        *[IGNORED] * len(prompt),
        *answer,
        tokenizer.eos_token_id,
    ]


def test_the_chat_template_is_used_where_there_is_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Auto and chat put the prompt as the tokenizer's template says; plain does not."""
    tokenizer.chat_template = TEMPLATE
    rendered = tokenizer("[user] chest pain [assistant]", add_special_tokens=False)["input_ids"]
    plain = tokenizer("chest pain")["input_ids"][:-1]
    for format_, expected in [("auto", rendered), ("chat", rendered), ("plain", plain)]:
        prompts = Prompts("{text}", format_, 64, 16)  # type: ignore[arg-type]
        (asked,) = prompts.asked([prompts.said(ROW, "answer")], tokenizer)
        assert list(asked.ids) == list(expected), format_
    tokenizer.chat_template = None
    prompts = Prompts("{text}", "auto", 64, 16)
    assert list(prompts.asked([prompts.said(ROW, "answer")], tokenizer)[0].ids) == plain


def test_what_is_too_long_is_cut_where_it_hurts_least(tokenizer: PreTrainedTokenizerBase) -> None:
    """A long completion loses its end, a long prompt its middle; both are counted."""
    task = KINDS["instruction"]
    rows = [
        ROW,
        {**ROW, "answer": "cough " * 50},
        {**ROW, "text": "chest pain " * 40 + "fever"},
    ]
    prepared = task.prepare(rows, tokenizer)
    assert prepared.truncated == 2
    short, long_answer, long_prompt = prepared.examples
    assert long_answer.input_ids[-1] != tokenizer.eos_token_id
    assert sum(target != IGNORED for target in long_answer.targets) == PROMPTS.max_target_length
    assert len(long_prompt.input_ids) == PROMPTS.max_length
    assert long_prompt.targets[-4:] == short.targets[-4:]
    unlimited = Instruction(replace(PROMPTS, max_target_length=None), "answer")
    _, longer, _ = unlimited.prepare(rows, tokenizer).examples
    assert len(longer.input_ids) == PROMPTS.max_length  # a short prompt leaves its room
    asked = [id_ for id_, at in zip(*_pair(long_prompt), strict=True) if at == IGNORED]
    whole = tokenizer(rows[2]["text"])["input_ids"][:-1]
    assert asked == [whole[0], *whole[len(whole) - len(asked) + 1 :]]


def _pair(example: Any) -> tuple[Any, Any]:
    """Inputs and targets."""
    return example.input_ids, example.targets


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("answer", [None, "", "  "], ids=["none", "empty", "blank"])
def test_a_record_without_an_answer_is_left_out(
    name: str, answer: Any, tokenizer: PreTrainedTokenizerBase
) -> None:
    """There is nothing to learn from it; the others are as if it were not there."""
    task = KINDS[name]
    alone = task.prepare([ROW], tokenizer)
    assert len(alone.examples) == 1
    prepared = task.prepare([{**ROW, "answer": answer}, ROW], tokenizer)
    assert (prepared.kept, prepared.examples) == ((1,), alone.examples)


@pytest.mark.parametrize("name", WRITING)
def test_no_rows_are_no_examples(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """A client without records prepares to nothing."""
    assert KINDS[name].prepare([], tokenizer).examples == ()


def test_the_decoder_sees_what_is_before_each_target(tokenizer: PreTrainedTokenizerBase) -> None:
    """decoder_input_ids are the targets one step later, from the padding token on."""
    task = KINDS["seq2seq"]
    examples = task.prepare([ROW, {**ROW, "answer": "pain"}], tokenizer).examples
    batch = task.collate(examples, PAD)
    answer = [*tokenizer("fever and cough", add_special_tokens=False)["input_ids"], 3]
    assert batch["labels"][0].tolist() == answer
    assert batch["decoder_input_ids"][0].tolist() == [PAD, *answer[:-1]]
    assert batch["labels"][1].tolist()[2:] == [IGNORED] * (len(answer) - 2)


def test_preference_loss_is_dpo_by_hand() -> None:
    """−log σ(β((log π − log π₀)(chosen) − (log π − log π₀)(rejected))), in plain Python."""
    import math

    task, examples = KINDS["preference"], examples_of("preference")
    batch = task.collate(examples, PAD)
    logits = logits_of(task, batch)

    def gain(row: int) -> float:
        total = 0.0
        for at, target in enumerate(batch["labels"][row].tolist()):
            if target != IGNORED:
                total += by_hand(batch["base_logits"][row, at], target)
                total -= by_hand(logits[row, at], target)
        return total

    margins = [0.5 * (gain(2 * number) - gain(2 * number + 1)) for number in range(len(examples))]
    expected = [math.log1p(math.exp(-margin)) for margin in margins]
    assert losses_of(task, examples).tolist() == pytest.approx(expected, rel=1e-4)
    assert task.per_example_score(logits, batch).tolist() == [float(m > 0) for m in margins]


def test_preference_starts_undecided() -> None:
    """A model that equals its base has loss log 2 and is right in half of the cases."""
    task, examples = KINDS["preference"], examples_of("preference")
    batch = task.collate(examples, PAD)
    logits_of(task, batch)
    base = batch["base_logits"]
    assert task.per_example_score(base, batch).tolist() == [0.5] * len(examples)
    losses = task.per_example_loss(base, batch)
    assert losses.tolist() == pytest.approx([0.6931472] * len(examples))


def test_equal_answers_prefer_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    """A pair of equal answers is left out."""
    assert KINDS["preference"].prepare([{**ROW, "worse": ROW["answer"]}], tokenizer).kept == ()


def test_top_three_by_hand() -> None:
    """A token counts if at most two others are likelier."""
    task = KINDS["instruction"]
    examples = examples_of("instruction")
    batch = task.collate(examples, PAD)
    logits = logits_of(task, batch)
    hits = tokens = 0
    for row, example in zip(logits, examples, strict=True):
        for at, target in enumerate(example.targets[1:]):
            likelier = sum(float(x) > float(row[at][target]) for x in row[at])
            hits += likelier < 3
            tokens += 1
    found = task.statistics(logits, batch)
    assert float(found["top3"].sum()) == hits
    assert float(found["tokens"].sum()) == tokens
    assert 0 < hits < tokens
    assert torch.all(found["top1"] <= found["top3"])
    assert VOCABULARY > 3


def test_a_huge_value_costs_no_more_than_a_long_one(tokenizer: PreTrainedTokenizerBase) -> None:
    """Of any value only a public number of characters is looked at, which is counted as a cut."""
    room = 32 * PROMPTS.max_length
    texts = ["chest pain " * (room // 11 + 1), "chest pain " * 200_000]
    for name in WRITING:
        rows = [{**ROW, column: text} for column in ("text", "answer") for text in texts]
        prepared = KINDS[name].prepare(rows, tokenizer)
        assert prepared.truncated == 4, name
        assert prepared.examples[0] == prepared.examples[1], name
        assert prepared.examples[2] == prepared.examples[3], name
    prompts = replace(PROMPTS, template="{text}")
    assert len(prompts.text({"text": "x" * 10**7})) == room
