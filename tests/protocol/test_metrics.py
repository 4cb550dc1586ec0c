"""Tests of what clients measure on their own records, and of its spread."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedslm.engines.local import LocalGrid
from fedslm.protocol.metrics import ClientMetrics, as_json, read_metrics, spread
from fedslm.workers import InlinePool

GOOD = {"records": 3, "shared": {"accuracy": 0.5}, "personal": {"accuracy": 0.75}}


def answer(status: str, text: str) -> Message:
    """A client's answer."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    record = ConfigRecord({"status": status, "metrics": text, "salt": "5a" * 16})
    return Message(RecordDict({"measured": record}), 2, "evaluate")


def test_the_worst_tenth_is_the_bad_end() -> None:
    """Of 20 clients the two worst: the lowest accuracies, the highest losses."""
    values = [{"accuracy": n / 20, "loss": float(n)} for n in range(1, 21)]
    found = spread(values)
    assert found["accuracy"] == {
        "min": 0.05,
        "median": pytest.approx(0.525),
        "max": 1.0,
        "worst_decile": pytest.approx((0.05 + 0.10) / 2),
    }
    assert found["loss"]["worst_decile"] == 19.5
    assert spread([]) == {}


def test_good_metrics_are_read() -> None:
    """What a client measured arrives; one that keeps it says nothing."""
    assert read_metrics(answer("ok", json.dumps(GOOD))) == ClientMetrics(**GOOD)
    assert read_metrics(answer("ok", "")) is None
    assert read_metrics(answer("refused because", "")) == "refused because"
    assert read_metrics(answer("x" * 1000, "")) == "x" * 300 + "…"


@pytest.mark.parametrize(
    "values",
    [
        [],
        {},
        {**GOOD, "records": -1},
        {**GOOD, "records": 10**13},
        {**GOOD, "shared": {str(number): 0.5 for number in range(101)}},
        {**GOOD, "shared": {"x" * 101: 0.5}},
        {**GOOD, "shared": {"": 0.5}},
        {**GOOD, "shared": {"\ud800": 0.5}},
        {**GOOD, "shared": {"a | b": 0.5}},
        {**GOOD, "personal": {"accuracy\n\n## Privacy": 0.5}},
        {**GOOD, "more": " " * 20_000},
        {**GOOD, "records": True},
        {**GOOD, "records": "3"},
        {**GOOD, "shared": {"accuracy": float("nan")}},
        {**GOOD, "shared": {"accuracy": "0.5"}},
        {**GOOD, "shared": {"accuracy": 1.7e308}},
        {**GOOD, "personal": 7},
        {**GOOD, "more": 1},
    ],
)
def test_what_is_no_metrics_is_refused(values: Any) -> None:
    """Whatever a client sends in their place is a reason why it has none, and no error."""
    found = read_metrics(answer("ok", json.dumps(values)))
    assert isinstance(found, str)
    assert found.startswith("the metrics cannot be read")
    assert len(found) <= 300


def test_a_report_has_each_client_and_the_spread() -> None:
    """Names, records, metrics, and their spread for the shared and the personal adapters."""
    found = as_json({"north": ClientMetrics(**GOOD), "south": ClientMetrics(1, {"accuracy": 1.0}, {})})
    assert found["clients"]["north"]["records"] == 3
    assert found["shared"]["accuracy"]["min"] == 0.5
    assert found["personal"]["accuracy"] == {
        "min": 0.75,
        "median": 0.75,
        "max": 0.75,
        "worst_decile": 0.75,
    }
