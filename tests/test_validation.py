"""Tests of what no single section of the configuration can see."""

from __future__ import annotations

from typing import Any

import pytest
from support.tiny import BASE, changed, problems

from fedslm import validation
from fedslm.config import from_mapping
from fedslm.privacy.accounting import MOST_STEPS

PATIENT = [
    ("privacy.unit", "user"),
    ("privacy.unit_column", "patient"),
    ("privacy.max_records_per_unit", 4),
]


@pytest.mark.parametrize("key", ["epsilon", "delta", "clip_norm", "sample_rate"])
@pytest.mark.parametrize("blank", [None, ""])
def test_nothing_that_makes_a_guarantee_has_a_default(key: str, blank: object) -> None:
    """Under privacy, epsilon, delta, clip norm and sample rate must be given."""
    message = problems(changed((f"privacy.{key}", blank)))[f"privacy.{key}"]
    assert "is required" in message
    assert "such as" in message


def test_all_that_is_required_is_asked_for_at_once() -> None:
    """Contradictions are reported together too."""
    found = problems({**changed(), "privacy": {"unit": "record"}})
    assert set(found) == {f"privacy.{key}" for key in ("epsilon", "delta", "clip_norm", "sample_rate")}


def test_without_privacy_nothing_is_required() -> None:
    """unit="none" needs no privacy parameters, and allows record weights and dropout."""
    values = changed(("aggregation.weights", "records"), ("lora.dropout", 0.1))
    values["privacy"] = {"unit": "none"}
    validation.check(from_mapping(values))


@pytest.mark.parametrize(
    ("assignments", "key", "part"),
    [
        ([("aggregation.weights", "records")], "aggregation.weights", "reveals how many records"),
        (
            [*PATIENT, ("aggregation.weights", "records")],
            "aggregation.weights",
            "reveals how many records",
        ),
        ([("privacy.unit", "hospital")], "privacy.unit", "'none', 'record', 'user' or 'client'"),
        ([*PATIENT[:1], PATIENT[2]], "privacy.unit_column", "is required"),
        ([*PATIENT, ("privacy.unit_column", "")], "privacy.unit_column", "name the column"),
        (PATIENT[:2], "privacy.max_records_per_unit", "public constant"),
        ([PATIENT[1]], "privacy.unit_column", 'only for privacy.unit="user"'),
        ([PATIENT[2]], "privacy.max_records_per_unit", 'only for privacy.unit="user"'),
        (
            [*PATIENT, ("training.micro_batch_size", 3)],
            "privacy.max_records_per_unit",
            "value 4 exceeds training.micro_batch_size=3",
        ),
        ([("lora.dropout", 0.1)], "lora.dropout", "must be 0 under privacy"),
        ([("model.dtype", "float16")], "model.dtype", 'use "bfloat16" or "float32"'),
        ([("distill.dtype", "float16")], "distill.dtype", 'use "bfloat16" or "float32"'),
        (
            [("privacy.passes", "shared"), ("model.dtype", "bfloat16")],
            "model.dtype",
            'must be "auto" or "float32" with privacy.passes="shared"',
        ),
        (
            [("federation.clients_per_round", 6), ("federation.num_clients", 5)],
            "federation.clients_per_round",
            "federation.num_clients=5",
        ),
        (
            [("federation.clients_per_round", 2), ("federation.min_replies", 3)],
            "federation.min_replies",
            "cohort of 2",
        ),
        ([("federation.min_replies", 6)], "federation.min_replies", "cohort of 5"),
        ([("data.label_column", "")], "data.label_column", "classification"),
        (
            [
                ("task.name", "causal-lm"),
                ("data.label_column", ""),
                ("data.partition", "dirichlet"),
            ],
            "data.partition_column",
            "dirichlet",
        ),
        (
            [("task.name", "token-classification"), ("data.partition", "shard")],
            "data.partition_column",
            "one value for each record",
        ),
        (
            [("task.name", "multi-label"), ("data.partition", "dirichlet")],
            "data.partition_column",
            "one value for each record",
        ),
        ([("data.partition_column", "ward")], "data.partition_column", 'data.partition is "iid"'),
        ([("data.validation_fraction", 0.2)], "data.validation_fraction", "metric_noise_multiplier"),
        ([("data.train_query", "SELECT 1")], "data.train_query", "only for a database's URL"),
        (
            [("data.source", "sqlite:////notes.db"), ("data.evaluation_query", "SELECT 1")],
            "data.train_query",
            "SQL that gives the rows",
        ),
        (
            [("data.source", "sqlite:////notes.db"), ("data.train_query", "SELECT 1")],
            "data.evaluation_query",
            "SQL that gives the rows",
        ),
        ([("task.labels", ["only"])], "task.labels", "at least two"),
        ([("task.labels", ["a", "b", "a"])], "task.labels", "twice"),
        (
            [("task.name", "causal-lm"), ("task.pooling", "mean")],
            "task.pooling",
            "is for classification",
        ),
        (
            [("task.name", "preference"), ("data.text_column", "question")],
            "data.rejected_column",
            "is required",
        ),
        (
            [("task.name", "preference"), ("task.format", "columns")],
            "data.rejected_column",
            "is required",
        ),
        ([("data.rejected_column", "worse")], "data.rejected_column", "classification"),
        ([("task.name", "instruction"), ("task.labels", ["a", "b"])], "task.labels", "instruction"),
        ([("task.name", "seq2seq"), ("task.labels_file", "x")], "task.labels_file", "seq2seq"),
        (
            [("task.labels", ["a", "b"]), ("task.labels_file", "x")],
            "task.labels_file",
            "only one of them",
        ),
        (
            [("task.name", "token-classification"), ("task.labels", ["O", "Drug"])],
            "task.labels",
            "['Drug']",
        ),
        (
            [("task.name", "token-classification"), ("task.labels", ["B-Drug", "I-Drug"])],
            "task.labels",
            "['O']",
        ),
        ([("task.prompt", "{text}")], "task.prompt", "is for instruction"),
        ([("task.name", "instruction"), ("task.prompt", "text")], "task.prompt", "in braces"),
        ([("task.name", "instruction"), ("task.prompt", "{a} {a}")], "task.prompt", "once"),
        ([("task.name", "instruction"), ("task.prompt", "{a}" + "x" * 10_000)], "task.prompt", "10000"),
        ([("task.name", "instruction"), ("task.prompt", "{text")], "task.prompt", "'{text'"),
        ([("task.name", "instruction"), ("task.prompt", "{text.x}")], "task.prompt", "in braces"),
        ([("task.max_target_length", 9)], "task.max_target_length", "is for instruction"),
        (
            [
                ("task.name", "instruction"),
                ("task.max_length", 9),
                ("task.max_target_length", 9),
            ],
            "task.max_target_length",
            "no room",
        ),
        ([("task.name", "seq2seq"), ("task.prompt_format", "chat")], "task.prompt_format", "chat"),
        (
            [
                ("aggregation.method", "fed-sb"),
                ("personalization.method", "second-adapter"),
                ("data.validation_fraction", 0.2),
            ],
            "personalization.method",
            "no core",
        ),
    ],
)
def test_contradictions_are_refused(assignments: list[tuple[str, Any]], key: str, part: str) -> None:
    """Each contradiction is refused alone, named by its option."""
    found = problems(changed(*assignments))
    assert list(found) == [key]
    assert part in found[key]


@pytest.mark.parametrize("key", ["source", "evaluation_source"])
@pytest.mark.parametrize(
    "url",
    [
        "postgresql+psycopg://ada:s3cret@host:5432/notes",
        "postgresql://ada:s3/cret@host/notes",
        "postgresql:/ada:s3cret@host/notes",
        "postgresql://host/notes?password=s3cret",
        "host=localhost Password = s3cret",
        "$NOTES_URL",
    ],
)
def test_a_password_is_refused_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, key: str, url: str
) -> None:
    """A password in a URL, even a mistyped one or one from a variable, would end in files and logs."""
    monkeypatch.setenv("NOTES_URL", "postgresql://ada:s3cret@host/notes")
    queries = [("data.train_query", "SELECT 1"), ("data.evaluation_query", "SELECT 2")]
    found = problems(changed((f"data.{key}", url), *queries))
    assert "FEDSLM_DATABASE_PASSWORD in the environment" in found[f"data.{key}"]
    assert "cret" not in "".join(found.values())


def test_a_database_without_a_password_is_accepted() -> None:
    """A URL may name a user and a port."""
    url = "postgresql+psycopg://ada@host:5432/notes"
    queries = [("data.train_query", "SELECT 1"), ("data.evaluation_query", "SELECT 2")]
    validation.check(from_mapping(changed(("data.source", url), *queries)))


def test_what_is_held_out_may_be_measured() -> None:
    """With a charged metric a share may be held out, with and without privacy for comparison."""
    held_out = [("data.validation_fraction", 0.2), ("privacy.metric_noise_multiplier", 5.0)]
    validation.check(from_mapping(changed(*held_out)))
    validation.check(from_mapping(changed(*held_out, ("privacy.unit", "none"))))


@pytest.mark.parametrize("overlapping", [False, True])
def test_rounds_that_cannot_be_accounted_for_are_refused(overlapping: bool) -> None:
    """A million steps of whoever is accounted together pass; one round more is refused before any runs."""
    clients = 20 if overlapping else 1
    sections: list[tuple[str, Any]] = [
        ("privacy.overlapping", overlapping),
        ("privacy.spare_rounds", 1),
        ("privacy.metric_noise_multiplier", 30.0),
        ("training.local_steps", 9),
        ("federation.num_clients", 1000),
        ("federation.clients_per_round", 20),
    ]
    rounds = MOST_STEPS // (10 * clients) - 1
    validation.check(from_mapping(changed(*sections, ("federation.rounds", rounds))))
    found = problems(changed(*sections, ("federation.rounds", rounds + 1)))
    assert "epsilon can be computed for 1,000,000 at most" in found["federation.rounds"]
    assert ("20 clients together" in found["federation.rounds"]) == overlapping


def test_everything_that_a_patient_needs_is_asked_for_at_once() -> None:
    """unit="user" alone: each of its requirements is named, none is assumed."""
    keys = ("epsilon", "delta", "clip_norm", "sample_rate", "unit_column", "max_records_per_unit")
    found = problems({**changed(), "privacy": {"unit": "user"}})
    assert set(found) == {f"privacy.{key}" for key in keys}


def test_a_patient_may_fill_a_micro_batch() -> None:
    """A cap of exactly micro_batch_size fits, and a sound patient config has no contradiction."""
    config = from_mapping(changed(*PATIENT, ("training.micro_batch_size", 4)))
    validation.check(config)
    assert validation.warnings(config) == []


def test_a_sound_config_has_no_contradiction() -> None:
    """The base of these tests is fine, so that each refusal above has its one cause."""
    config = from_mapping(BASE)
    validation.check(config)
    assert validation.warnings(config) == []


@pytest.mark.parametrize(
    ("delta", "warned"), [(1e-5, False), (0.0031, False), (1 / 320, True), (0.1, True)]
)
def test_a_delta_of_one_record_or_more_warns(delta: float, warned: bool) -> None:
    """16 records at a rate of 0.05 are about 320: from 1/320 on, publishing a record would pass."""
    config = from_mapping(changed(("privacy.delta", delta)))
    found = validation.warnings(config)
    assert bool(found) is warned
    assert all("privacy.delta" in text and "1/320" in text and "3e-04" in text for text in found)


@pytest.mark.parametrize(("epsilon", "warned"), [(20.0, False), (21.0, True)])
def test_a_huge_epsilon_warns(epsilon: float, warned: bool) -> None:
    """An epsilon that promises little is allowed, with a warning."""
    found = validation.warnings(from_mapping(changed(("privacy.epsilon", epsilon))))
    assert any("weak guarantee" in text for text in found) is warned


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ([("aggregation.rule", "krum")], "tolerates no hostile client"),
        (
            [("aggregation.rule", "median"), ("attack.kind", "backdoor"), ("attack.clients", 1)],
            "more than",
        ),
        ([("lora.client_ranks", [2, 2, 2, 2, 2, 2, 2, 2])], "names 8 ranks"),
        ([("training.proximal_strength", 1.0)], "training.proximal_strength=1 has no effect"),
        ([("aggregation.rotation_strength", 0.9)], "aggregation.rotation_strength=0.9 has no effect"),
    ],
)
def test_what_does_nothing_warns(changes: list[tuple[str, Any]], part: str) -> None:
    """Settings that do less than they seem to are allowed, with a warning."""
    assert any(part in text for text in validation.warnings(from_mapping(changed(*changes))))


def test_without_privacy_nothing_warns() -> None:
    """There is no guarantee to warn about."""
    assert validation.warnings(from_mapping(changed(("privacy.unit", "none")))) == []
