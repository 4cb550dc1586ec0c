"""Tests of the tasks: what is learned, one loss for each example."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from fedslm.config import DataConfig, TaskConfig
from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
from fedslm.tasks import build
from fedslm.tasks.base import Example, Task
from fedslm.tasks.causal_lm import CausalLM
from fedslm.tasks.classification import Classification

PAD, VOCABULARY = 0, 17
CLASSES = Classification(("cold", "flu", "other"), "text", "label", 16)
LANGUAGE = CausalLM("text", 16)
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


def logits_of(task: Task, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A fake model in double precision: an example's logits depend on its own tokens alone."""
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, VOCABULARY, generator=generator, dtype=torch.double)
    by_token = table[tokens].cumsum(dim=1)
    if not task.labels:
        return by_token
    last = mask.sum(dim=1) - 1
    return by_token[torch.arange(len(tokens)), last][:, : len(task.labels)]


def losses_of(task: Task, examples: Sequence[Example]) -> torch.Tensor:
    """Per-example losses under the fake model."""
    batch = task.collate(examples, PAD)
    return task.per_example_loss(logits_of(task, batch), batch)


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
    """Classification has a class for each row, a language model its tokens and no padding."""
    assert CLASSES.collate(EXAMPLES[:2], PAD)["labels"].tolist() == [0, 2]
    assert LANGUAGE.collate(EXAMPLES[:2], PAD)["labels"].tolist() == [[3, 5, 7], [4, 4, -100]]


def test_a_token_like_the_padding_still_counts() -> None:
    """Padding is where the mask says, not wherever its token is (many models pad with the end)."""
    example = Example((5, PAD, 6, PAD))
    batch = LANGUAGE.collate([example, EXAMPLES[2]], PAD)
    assert batch["labels"][0].tolist() == [5, PAD, 6, PAD, -100, -100, -100]
    assert losses_of(LANGUAGE, [example, EXAMPLES[2]])[0] == pytest.approx(
        float(losses_of(LANGUAGE, [example])[0]), rel=1e-6
    )


@TASKS
def test_a_loss_depends_on_its_own_example_alone(task: Task) -> None:
    """Alone, in a batch, in another order, padded or not: an example's loss is the same."""
    alone = [float(losses_of(task, [example])[0]) for example in EXAMPLES]
    assert losses_of(task, EXAMPLES).tolist() == pytest.approx(alone, rel=1e-6)
    assert losses_of(task, EXAMPLES[::-1]).tolist() == pytest.approx(alone[::-1], rel=1e-6)
    long = Example(tuple(range(1, 16)), 1)
    assert losses_of(task, [*EXAMPLES, long]).tolist()[:4] == pytest.approx(alone, rel=1e-6)


@TASKS
def test_a_loss_has_no_gradient_elsewhere(task: Task) -> None:
    """The gradient of an example's loss is zero at other examples' logits and at padding."""
    batch = task.collate(EXAMPLES, PAD)
    logits = logits_of(task, batch).requires_grad_()
    losses = task.per_example_loss(logits, batch)
    assert losses.shape == (4,)
    for row, example in enumerate(EXAMPLES):
        (gradient,) = torch.autograd.grad(losses[row], logits, retain_graph=True)
        assert gradient[row].any()
        gradient[row, slice(None) if task.labels else slice(0, len(example.input_ids) - 1)] = 0
        assert not gradient.any()


def by_hand(logits: torch.Tensor, target: int) -> float:
    """Negative log-probability of a class, in plain Python."""
    values = [float(value) for value in logits]
    return math.log(sum(math.exp(value) for value in values)) - values[target]


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


@TASKS
def test_a_score_depends_on_its_own_example_alone(task: Task) -> None:
    """Alone, in a batch, in another order, padded or not: an example's score is the same, in [0, 1]."""

    def scores(examples: Sequence[Example]) -> list[float]:
        batch = task.collate(examples, PAD)
        return task.per_example_score(logits_of(task, batch), batch).tolist()

    examples = [
        Example((first, 4, last), target)
        for first in (1, 2, 9)
        for last in (3, 4)
        for target in range(3)
    ]
    examples += [Example((first, second)) for first in range(1, 9) for second in range(1, 9)]
    alone = [scores([example])[0] for example in examples]
    assert all(0 <= score <= 1 for score in alone)
    assert 0 < sum(alone) < len(alone)
    assert scores(examples) == pytest.approx(alone)
    assert scores([Example(tuple(range(1, 16)), 1), *examples[::-1]])[1:] == pytest.approx(alone[::-1])


@TASKS
def test_losses_are_computed_in_float32(task: Task) -> None:
    """A base in half precision does not make the loss coarse."""
    batch = task.collate(EXAMPLES, PAD)
    losses = task.per_example_loss(logits_of(task, batch).bfloat16(), batch)
    assert losses.dtype == torch.float32


@TASKS
@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 1, 1)])
def test_metrics_of_added_sums_are_metrics_of_the_whole(task: Task, sizes: tuple[int, ...]) -> None:
    """However a split is cut and padded, adding the parts' sums gives the whole's metrics."""

    def sums(examples: Sequence[Example]) -> dict[str, float]:
        batch = task.collate(examples, PAD)
        return task.sums(logits_of(task, batch), batch)

    total: dict[str, float] = {}
    start = 0
    for size in sizes:
        for name, value in sums(EXAMPLES[start : start + size]).items():
            total[name] = total.get(name, 0.0) + value
        start += size
    whole = task.metrics(sums(EXAMPLES))
    assert task.metrics(total) == pytest.approx(whole, rel=1e-6)
    assert task.headline in whole


def test_classification_metrics_by_hand() -> None:
    """Accuracy counts hits over records, and the loss is the mean loss."""
    logits = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 1.0], [1.0, 0, 0]])
    examples = [Example((1,), target) for target in (0, 1, 0, 0)]
    metrics = CLASSES.metrics(CLASSES.sums(logits, CLASSES.collate(examples, PAD)))
    expected = [by_hand(row, e.target) for row, e in zip(logits, examples, strict=True)]
    assert metrics == pytest.approx({"accuracy": 0.75, "loss": sum(expected) / 4})


def test_language_model_metrics_by_hand() -> None:
    """Loss is per token, not per example; perplexity is its exponential; padding is no hit."""
    batch = LANGUAGE.collate(EXAMPLES, PAD)
    logits = logits_of(LANGUAGE, batch)
    losses, hits = [], 0
    for row, example in zip(logits, EXAMPLES, strict=True):
        for at, token in enumerate(example.input_ids[1:]):
            losses.append(by_hand(row[at], token))
            hits += int(row[at].argmax()) == token
    metrics = LANGUAGE.metrics(LANGUAGE.sums(logits, batch))
    loss = sum(losses) / len(losses)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["next_token_accuracy"] == pytest.approx(hits / len(losses))
