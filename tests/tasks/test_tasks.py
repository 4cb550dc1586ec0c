"""What holds for every task: one loss for each example, whatever else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.kinds import (
    CLASSES,
    KINDS,
    LANGUAGE,
    LONG,
    PAD,
    added,
    by_hand,
    example_of,
    examples_of,
    logits_of,
    losses_of,
    metrics_of,
    sums_of,
)
from transformers import PreTrainedTokenizerBase

from fedslm.config import DataConfig, TaskConfig
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build
from fedslm.tasks.base import Example, Task
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.classification import Classification

EACH = pytest.mark.parametrize("name", KINDS)
TASKS = pytest.mark.parametrize("task", [CLASSES, LANGUAGE], ids=["classification", "causal-lm"])
EXAMPLES = (
    Example((3, 5, 7), 0),
    Example((4, 4), 2),
    Example((6, 1, 2, 9, 8, 3, 3), 1),
    Example((2, 9, 9, 1), 2),
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer."""
    return load_tokenizer(DEMO_DIRECTORY)


def test_build_takes_columns_and_labels_from_the_config() -> None:
    """The config names the task."""
    data = DataConfig(source="x", text_column="note", label_column="code")
    built = build(TaskConfig(name="classification", max_length=9), data, ("a", "b"))
    assert built == Classification(("a", "b"), "note", "code", 9)
    built = build(TaskConfig(name="causal-lm", max_length=9), data, ())
    assert built == CausalLM("note", 9)


def test_classification_prepares_tokens_and_classes(tokenizer: PreTrainedTokenizerBase) -> None:
    """A row becomes its tokens, cut to the longest length, and the position of its label."""
    rows = [
        {"text": "chest pain", "label": "flu"},
        {"text": "chest pain " * 50, "label": "cold"},
    ]
    prepared = CLASSES.prepare(rows, tokenizer)
    assert prepared.kept == (0, 1)
    assert [example.target for example in prepared.examples] == [1, 0]
    assert prepared.examples[0].input_ids == tuple(tokenizer("chest pain")["input_ids"])
    assert len(prepared.examples[1].input_ids) == 16


def test_labels_may_be_numbers(tokenizer: PreTrainedTokenizerBase) -> None:
    """A label that is a number is looked up by its text."""
    task = Classification(("0", "1"), "text", "label", 16)
    prepared = task.prepare([{"text": "pain", "label": 1}], tokenizer)
    assert prepared.examples[0].target == 1


def test_an_unknown_label_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    """A label that is no class leaves out its record alone: failing would tell that it is there."""
    rows = [{"text": "pain", "label": label} for label in ("pox", "flu", "", "cold")]
    prepared = CLASSES.prepare(rows, tokenizer)
    assert prepared.kept == (1, 3)
    assert [example.target for example in prepared.examples] == [1, 0]


@TASKS
def test_a_text_without_tokens_is_left_out(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """Blank texts leave nothing to learn from, whatever a tokenizer puts around them."""
    texts = ["chest pain", "", "  ", "\u200b", "cough and fever"]
    prepared = task.prepare([{"text": text, "label": "flu"} for text in texts], tokenizer)
    assert prepared.kept == (0, 4)
    expected = [tuple(tokenizer(texts[row])["input_ids"]) for row in prepared.kept]
    assert [example.input_ids for example in prepared.examples] == expected


@TASKS
def test_whether_a_record_is_left_out_depends_on_it_alone(
    task: Task, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Each row prepared alone gives what it gives among the others."""
    texts = ["chest pain", "", "cough and fever " * 20, "  ", "x"]
    labels = ["flu", "flu", "pox", "cold", "other"]
    rows = [{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]
    together = task.prepare(rows, tokenizer)
    singly = [task.prepare([row], tokenizer) for row in rows]
    assert together.examples == tuple(each for one in singly for each in one.examples)
    assert together.kept == tuple(number for number, one in enumerate(singly) if one.kept)


@TASKS
def test_no_rows_are_no_examples(task: Task, tokenizer: PreTrainedTokenizerBase) -> None:
    """A client without records, which is fine under privacy, prepares to nothing."""
    prepared = task.prepare([], tokenizer)
    assert (prepared.examples, prepared.kept) == ((), ())


def test_a_single_token_predicts_nothing() -> None:
    """A language model's example needs a token to predict."""

    class Bare:
        """A tokenizer without special tokens: one token a letter."""

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

        def num_special_tokens_to_add(self) -> int:
            return 0

    rows = [{"text": text} for text in ("", "a", "ab", "abc")]
    prepared = LANGUAGE.prepare(rows, Bare())  # type: ignore[arg-type]
    assert [len(example.input_ids) for example in prepared.examples] == [2, 3]
    assert prepared.kept == (2, 3)


@TASKS
def test_collating_pads_on_the_right(task: Task) -> None:
    """Tokens come first, padding after them, and the mask says which is which."""
    batch = task.collate(EXAMPLES[:2], 11)
    assert batch["input_ids"].tolist() == [[3, 5, 7], [4, 4, 11]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_labels_of_a_batch() -> None:
    """Classification has a class for each row, a language model the tokens that follow, no padding."""
    assert CLASSES.collate(EXAMPLES[:2], PAD)["labels"].tolist() == [0, 2]
    assert LANGUAGE.collate(EXAMPLES[:2], PAD)["labels"].tolist() == [[5, 7, -100], [4, -100, -100]]


def test_a_token_like_the_padding_still_counts() -> None:
    """Padding is where the mask says, not wherever its token is (many models pad with the end)."""
    example = Example((5, PAD, 6, PAD))
    batch = LANGUAGE.collate([example, EXAMPLES[2]], PAD)
    assert batch["labels"][0].tolist() == [PAD, 6, PAD, *[-100] * 4]
    assert losses_of(LANGUAGE, [example, EXAMPLES[2]])[0] == pytest.approx(
        float(losses_of(LANGUAGE, [example])[0]), rel=1e-6
    )


@EACH
def test_a_loss_depends_on_its_own_example_alone(name: str) -> None:
    """Alone, in a batch, in another order, padded or not: an example's loss is the same."""
    task, examples = KINDS[name], examples_of(name)
    alone = [float(losses_of(task, [example])[0]) for example in examples]
    assert len(set(alone)) == len(alone)
    assert losses_of(task, examples).tolist() == pytest.approx(alone, rel=1e-6)
    assert losses_of(task, examples[::-1]).tolist() == pytest.approx(alone[::-1], rel=1e-6)
    long = example_of(name, LONG, 9)
    assert losses_of(task, [*examples, long]).tolist()[:-1] == pytest.approx(alone, rel=1e-6)


@EACH
def test_a_loss_has_no_gradient_elsewhere(name: str) -> None:
    """The gradient of an example's loss is zero at other examples' logits and at padding."""
    task, examples = KINDS[name], examples_of(name)
    batch = task.collate(examples, PAD)
    logits = logits_of(task, batch).requires_grad_()
    losses = task.per_example_loss(logits, batch)
    assert losses.shape == (len(examples),)
    rows = task.rows_per_example
    for number in range(len(examples)):
        (gradient,) = torch.autograd.grad(losses[number], logits, retain_graph=True)
        own = slice(rows * number, rows * (number + 1))
        assert gradient[own].any()
        if gradient.dim() == 3:
            assert not gradient[own][batch["labels"][own] == -100].any()
        gradient[own] = 0
        assert not gradient.any()


def test_classification_loss_by_hand() -> None:
    """The loss is the negative log-probability of the class."""
    batch = CLASSES.collate(EXAMPLES, PAD)
    logits = logits_of(CLASSES, batch)
    expected = [by_hand(row, e.target) for row, e in zip(logits, EXAMPLES, strict=True)]
    assert CLASSES.per_example_loss(logits, batch).tolist() == pytest.approx(expected, rel=1e-5)


def test_language_model_loss_by_hand() -> None:
    """The loss is the mean over an example's own tokens of what the token before predicts."""
    batch = LANGUAGE.collate(EXAMPLES, PAD)
    logits = logits_of(LANGUAGE, batch)
    expected = []
    for row, example in zip(logits, EXAMPLES, strict=True):
        tokens = example.input_ids
        losses = [by_hand(row[at], tokens[at + 1]) for at in range(len(tokens) - 1)]
        expected.append(sum(losses) / len(losses))
    assert LANGUAGE.per_example_loss(logits, batch).tolist() == pytest.approx(expected, rel=1e-5)


def test_classification_score_by_hand() -> None:
    """The score is 1 if no other class is likelier, else 0."""
    examples = [Example((1, 2), target) for target in (0, 1, 2, 0)]
    logits = torch.tensor([[2.0, 0, 1], [0, 3.0, 0], [5.0, 4.0, 3.0], [-3.0, -1.0, -2.0]])
    batch = CLASSES.collate(examples, PAD)
    assert CLASSES.per_example_score(logits, batch).tolist() == [1, 1, 0, 0]


def test_language_model_score_by_hand() -> None:
    """The score is the share of an example's own next tokens that are the likeliest; padding is none."""
    batch = LANGUAGE.collate(EXAMPLES, PAD)
    logits = logits_of(LANGUAGE, batch)
    for row, example in enumerate(EXAMPLES):  # every fourth token is made right, padding included
        tokens = [*example.input_ids, *[PAD] * 7][: logits.shape[1]]
        for at in range(0, logits.shape[1] - 1, 4):
            logits[row, at, tokens[at + 1]] = 100.0
    expected = []
    for row, example in zip(logits.tolist(), EXAMPLES, strict=True):
        tokens = example.input_ids
        hits = [row[at].index(max(row[at])) == tokens[at + 1] for at in range(len(tokens) - 1)]
        expected.append(sum(hits) / len(hits))
    assert LANGUAGE.per_example_score(logits, batch).tolist() == pytest.approx(expected)
    assert len(set(expected)) > 2


@EACH
def test_a_score_depends_on_its_own_example_alone(name: str) -> None:
    """Alone, in a batch, in another order, padded or not: an example's score is the same, in [0, 1]."""
    task = KINDS[name]

    def scores(examples: Sequence[Example]) -> list[float]:
        batch = task.collate(examples, PAD)
        return task.per_example_score(logits_of(task, batch), batch).tolist()

    pairs = [
        (first, second, last) for first in range(1, 9) for second in (3, 4) for last in range(1, 9)
    ]
    examples = [example_of(name, pair, number) for number, pair in enumerate(pairs)]
    alone = [scores([example])[0] for example in examples]
    assert all(0 <= score <= 1 for score in alone)
    assert 0 < sum(alone) < len(alone)
    assert scores(examples) == pytest.approx(alone)
    long = example_of(name, LONG, 9)
    assert scores([long, *examples[::-1]])[1:] == pytest.approx(alone[::-1])


@EACH
def test_losses_are_computed_in_float32(name: str) -> None:
    """A base in half precision does not make the loss coarse."""
    task = KINDS[name]
    batch = task.collate(examples_of(name), PAD)
    losses = task.per_example_loss(logits_of(task, batch).bfloat16(), batch)
    assert losses.dtype == torch.float32


@EACH
@pytest.mark.parametrize("sizes", [(1, 4), (2, 3), (1, 1, 1, 1, 1)])
def test_metrics_of_added_sums_are_metrics_of_the_whole(name: str, sizes: tuple[int, ...]) -> None:
    """However a split is cut and padded, adding the parts' sums gives the whole's metrics."""
    task, examples = KINDS[name], examples_of(name)

    def sums(part: Sequence[Example]) -> dict[str, Any]:
        batch = task.collate(part, PAD)
        return sums_of(task, logits_of(task, batch), batch)

    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    parts = [sums(examples[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
    whole = task.metrics(sums(examples))
    assert task.metrics(added(parts)) == pytest.approx(whole, rel=1e-6)
    assert task.headline in whole


@EACH
def test_a_made_up_record_is_one_of_the_task(name: str) -> None:
    """What a model is tried out with has a loss, in as many rows as an example has."""
    task = KINDS[name]
    for length in (4, 5, 12):
        assert task.made_up(length).length == length
    batch = task.collate([task.made_up()], PAD)
    assert batch["input_ids"].shape == (task.rows_per_example, 5)
    assert math.isfinite(float(task.per_example_loss(logits_of(task, batch), batch)))


def test_classification_metrics_by_hand() -> None:
    """Accuracy counts hits over records, and the loss is the mean loss."""
    logits = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    examples = [Example((1,), target) for target in (0, 1, 0, 0)]
    metrics = metrics_of(CLASSES, logits, CLASSES.collate(examples, PAD))
    expected = [by_hand(row, e.target) for row, e in zip(logits, examples, strict=True)]
    macro = (
        4 / 5 + 1
    ) / 2  # of class 0: two of three found, nothing else taken for it; class 2 is not there
    wanted = {"accuracy": 0.75, "f1_macro": macro, "loss": sum(expected) / 4}
    assert metrics == pytest.approx(wanted)


def test_language_model_metrics_by_hand() -> None:
    """Loss is per token, not per example; perplexity is its exponential; padding is no hit."""
    batch = LANGUAGE.collate(EXAMPLES, PAD)
    logits = logits_of(LANGUAGE, batch)
    losses, hits = [], 0
    for row, example in zip(logits, EXAMPLES, strict=True):
        for at, token in enumerate(example.input_ids[1:]):
            losses.append(by_hand(row[at], token))
            hits += int(row[at].argmax()) == token
    metrics = metrics_of(LANGUAGE, logits, batch)
    loss = sum(losses) / len(losses)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["next_token_accuracy"] == pytest.approx(hits / len(losses))
