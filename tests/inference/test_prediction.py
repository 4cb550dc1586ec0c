"""Tests of predictions: each answer is the model's own, and the run's metrics come out of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedslm.errors import ConfigError, DataError
from fedslm.inference.evaluation import own_rows
from fedslm.inference.next_words import _joined
from fedslm.inference.outputs import next_chances
from fedslm.inference.prediction import predict
from fedslm.inference.trained import Trained, load_trained, open_run
from fedslm.tasks.token_classification import entities

Finished = Callable[[str], Path]
CLASSIFIERS = ["classification", "native", "multi-label"]


def open_(finished_run: Finished, kind: str) -> Trained:
    """A run's model."""
    return load_trained(open_run(finished_run(kind)))


def metrics_of(finished_run: Finished, kind: str) -> dict[str, float]:
    """What the run itself measured on its public split."""
    report = json.loads((finished_run(kind) / "report.json").read_text())
    return dict(report["metrics_after"])


def logits_of(trained: Trained, text: str) -> torch.Tensor:
    """The network's logits of one text alone."""
    batch = trained.model.tokenizer([text], return_tensors="pt")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        return trained.model.adapter.network(**inputs).logits[0]


@pytest.mark.parametrize("kind", ["classification", "native"])
def test_a_class_is_the_likeliest_of_the_model(kind: str, finished_run: Finished) -> None:
    """Label and probabilities are the softmax of a text's own logits, whatever stands beside it."""
    trained = open_(finished_run, kind)
    texts = [row["text"] for row in own_rows(trained.run)]
    answers = list(predict(trained, [{"text": text} for text in texts]))
    assert [answer["text"] for answer in answers] == texts
    for text, answer in zip(texts, answers, strict=True):
        shares = logits_of(trained, text).softmax(-1)
        assert answer["label"] == trained.run.labels[int(shares.argmax())]
        expected = dict(zip(trained.run.labels, shares.tolist(), strict=True))
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)
        found = list(answer["probabilities"].values())
        assert found == sorted(found, reverse=True)
    assert len({answer["label"] for answer in answers}) == 2


@pytest.mark.parametrize("kind", ["classification", "native"])
def test_classes_have_the_accuracy_of_the_report(kind: str, finished_run: Finished) -> None:
    """Counting right answers gives what the run reported."""
    rows = own_rows(open_run(finished_run(kind)))
    answers = list(predict(open_(finished_run, kind), rows))
    right = [answer["label"] == row["label"] for answer, row in zip(answers, rows, strict=True)]
    assert np.mean(right) == pytest.approx(metrics_of(finished_run, kind)["accuracy"])


def test_several_labels_are_those_over_one_half(finished_run: Finished) -> None:
    """Names over 0.5, and no others; counting right sets gives what the run reported."""
    trained = open_(finished_run, "multi-label")
    rows = own_rows(trained.run)
    answers = list(predict(trained, rows))
    for row, answer in zip(rows, answers, strict=True):
        chances = logits_of(trained, row["text"]).sigmoid().tolist()
        expected = dict(zip(trained.run.labels, chances, strict=True))
        assert answer["labels"] == [name for name, chance in expected.items() if chance > 0.5]
        assert answer["probabilities"] == pytest.approx(expected, abs=1e-5)
    exact = [set(a["labels"]) == set(row["labels"]) for a, row in zip(answers, rows, strict=True)]
    assert np.mean(exact) == pytest.approx(metrics_of(finished_run, "multi-label")["exact_match"])
    assert len({len(answer["labels"]) for answer in answers}) > 1


def test_tags_have_the_f1_of_the_report(finished_run: Finished) -> None:
    """The entities of the predicted tags of listed words have the F1 that the run reported."""
    trained = open_(finished_run, "token-classification")
    rows = own_rows(trained.run)
    answers = list(predict(trained, rows))
    assert [answer["words"] for answer in answers] == [row["words"] for row in rows]
    tags = [answer["tags"] for answer in answers]
    expected = metrics_of(finished_run, "token-classification")["f1"]
    pairs = [(entities(own), entities(row["tags"])) for own, row in zip(tags, rows, strict=True)]
    right, both = (sum(len(a & b) for a, b in pairs), sum(len(a) + len(b) for a, b in pairs))
    assert 2 * right / both == pytest.approx(expected, abs=1e-6)
    assert expected > 0.1
    assert all("text" not in answer for answer in answers)


def test_entities_stand_in_the_text(finished_run: Finished) -> None:
    """An entity of a text is a piece of it: punctuation and odd space are where they were."""
    trained = open_(finished_run, "token-classification")
    text = "palpitations,  murmur; left\tfracture (swelling)"
    (answer,) = predict(trained, [{"words": text}])
    words = ["palpitations", ",", "murmur", ";", "left", "fracture", "(", "swelling", ")"]
    assert answer["words"] == words
    (as_list,) = predict(trained, [{"words": words}])
    assert as_list["tags"] == answer["tags"]
    assert answer["entities"]
    for entity, listed in zip(answer["entities"], as_list["entities"], strict=True):
        inside = words[entity["first_word"] : entity["last_word"] + 1]
        assert entity["text"] == text[entity["start"] : entity["end"]]
        assert entity["text"].split()[0].startswith(inside[0])
        assert listed["text"] == " ".join(inside)
        assert entity["score"] == pytest.approx(listed["score"])
        assert 0 < entity["score"] <= 1
        kinds = {answer["tags"][at][2:] for at in range(entity["first_word"], entity["last_word"] + 1)}
        assert kinds == {entity["kind"]}


def test_a_word_has_the_tag_of_its_first_piece(finished_run: Finished) -> None:
    """As in training: "fracture" is three pieces, and what is said of the first counts."""
    trained = open_(finished_run, "token-classification")
    words = ["fracture", "palpitations", "fracture", "swelling", "fracture"]
    batch = trained.model.tokenizer([words], is_split_into_words=True, return_tensors="pt")
    owners = batch.word_ids(0)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.inference_mode():
        shares = trained.model.adapter.network(**inputs).logits[0].softmax(-1)
    firsts = [owners.index(at) for at in range(len(words))]
    assert len(owners) > len(words) + 2
    (answer,) = predict(trained, [{"words": words}])
    assert answer["tags"] == [trained.run.labels[int(shares[at].argmax())] for at in firsts]
    assert answer["entities"]
    for entity in answer["entities"]:
        inside = firsts[entity["first_word"] : entity["last_word"] + 1]
        expected = np.mean([float(shares[at].max()) for at in inside])
        assert entity["score"] == pytest.approx(expected, abs=1e-5)


def test_the_next_token_follows_each_sequence(finished_run: Finished) -> None:
    """Sequences of several lengths share a pass; each one's chances are those behind its own end."""
    trained = open_(finished_run, "causal-lm")
    sequences = [tuple(range(9, 9 + length)) for length in (7, 3, 12, 3, 1)]
    found = next_chances(trained, sequences)
    assert found.shape == (5, trained.model.vocabulary)
    for sequence, shares in zip(sequences, found, strict=True):
        with torch.inference_mode():
            logits = trained.model.adapter.network(torch.tensor([sequence])).logits[0, -1]
        np.testing.assert_allclose(shares, logits.double().softmax(-1), atol=1e-6)


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "token-classification", "causal-lm"])
def test_answers_stand_in_the_order_of_the_rows(kind: str, finished_run: Finished) -> None:
    """One answer for each row, in order, over several pieces and lengths; rows without text say so."""
    trained = open_(finished_run, kind)
    column = trained.run.data.text_column
    texts = ["chest pain " * (1 + at % 7) + f"{at}" for at in range(20 if kind == "causal-lm" else 600)]
    texts[3] = " \n"
    rows: list[dict[str, Any]] = [{column: text} for text in texts]
    rows[4] = {column: None}
    answers = list(predict(trained, rows))
    assert [answer.get("text", "") for at, answer in enumerate(answers) if at not in (3, 4)] == [
        text for at, text in enumerate(texts) if at not in (3, 4)
    ]
    noted = [at for at, answer in enumerate(answers) if answer.get("note") == "no text"]
    assert noted == ([] if kind == "causal-lm" else [3, 4])  # a first word can be guessed from nothing


@pytest.mark.parametrize("kind", [*CLASSIFIERS, "token-classification", "causal-lm"])
def test_a_text_that_is_too_long_says_so(kind: str, finished_run: Finished) -> None:
    """Only a text that was cut is marked; words behind the cut have no tag."""
    trained = open_(finished_run, kind)
    column = trained.run.data.text_column
    short, long = predict(trained, [{column: "chest pain"}, {column: "wrist fracture " * 40}])
    assert "truncated" not in short
    assert long["truncated"] is True
    if kind == "token-classification":
        assert len(long["tags"]) == 80
        assert long["tags"][-1] is None
        assert long["tags"][0] is not None


@pytest.mark.parametrize("kind", ["causal-lm", "gpt2"])
def test_next_words_have_their_own_probability(kind: str, finished_run: Finished) -> None:
    """A word's probability is the product over its pieces, each behind the prompt and those before."""
    trained = open_(finished_run, kind)
    tokenizer, network = trained.model.tokenizer, trained.model.adapter.network
    (answer,) = predict(trained, [{"text": "pain chest"}])
    prompt = tokenizer("pain chest")["input_ids"][:-1]  # without what ends a whole text
    checked = 0
    for word, chance in ((each["word"], each["probability"]) for each in answer["next_words"]):
        whole = f"pain {word}" if word.startswith("chest") else f"pain chest {word}"
        ids = tokenizer(whole)["input_ids"][:-1]
        with torch.inference_mode():
            shares = network(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
        at = range(len(prompt), len(ids))
        product = float(np.prod([float(shares[here - 1, ids[here]]) for here in at]))
        checked += chance == pytest.approx(product, rel=1e-4)
    chances = [each["probability"] for each in answer["next_words"]]
    assert chances == sorted(chances, reverse=True)
    assert len(chances) == 3
    assert 0 < sum(chances) <= 1
    assert checked >= 2  # another spelling than the tokenizer's own may be likelier


@pytest.mark.parametrize(
    ("text", "following", "word", "expected"),
    [
        ("the hea", "rt is", "rt", "heart"),
        ("the", " heart", "heart", "heart"),
        ("the ", "heart", "heart", "heart"),
        ("pain", ", and", ",", ","),
        ("", "heart", "heart", "heart"),
    ],
)
def test_a_word_that_had_begun_is_shown_whole(
    text: str, following: str, word: str, expected: str
) -> None:
    """What goes on without a space completes the last word."""
    assert _joined(text, following, word) == expected


@pytest.mark.parametrize("kind", ["instruction", "seq2seq", "preference"])
def test_writing_tasks_point_to_generate(kind: str, finished_run: Finished) -> None:
    """A model that writes has no labels to give."""
    with pytest.raises(ConfigError, match="fedslm generate"):
        list(predict(open_(finished_run, kind), [{"text": "a"}]))


def test_a_list_is_no_text(finished_run: Finished) -> None:
    """A wrong type is named by its row, also behind the first piece."""
    rows: list[dict[str, Any]] = [{"text": "a"}] * 600
    rows[555] = {"text": ["a"]}
    with pytest.raises(DataError, match="row 556"):
        list(predict(open_(finished_run, "classification"), rows))
