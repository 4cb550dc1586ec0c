"""The planted facts: signs are nobody's name, and test notes are new."""

from __future__ import annotations

import itertools

import pytest

from fedslm.data import demo
from fedslm.data.facts import SIGNS, Counts, generate_facts
from fedslm.rng import stream

COUNTS = Counts(ordinary=200, signs=40, public=100, mentions=20, test=20, probe=10)
Rows = list[dict[str, str]]


@pytest.fixture(scope="module", params=range(3))
def parts(request: pytest.FixtureRequest) -> dict[str, Rows]:
    """The notes of a seed."""
    return generate_facts(stream(request.param, "demo-facts"), COUNTS)


def signs_in(text: str) -> set[str]:
    """The signs whose name stands anywhere in a text."""
    return {sign for sign in SIGNS if sign.lower() in text.lower()}


def test_no_name_that_can_be_drawn_holds_a_sign() -> None:
    """Of all first names and surnames that the demo can put together, none is or holds a sign."""
    surnames = map("".join, itertools.product(demo._LAST_STARTS, demo._LAST_ENDS))
    first_names = map("".join, itertools.product(demo._FIRST_STARTS, demo._FIRST_ENDS))
    assert not {name for name in itertools.chain(surnames, first_names) if signs_in(name)}
    assert len(set(SIGNS)) == 12


def test_ordinary_notes_hold_no_sign(parts: dict[str, Rows]) -> None:
    """Whoever sees a sign sees a note about it; notes about a sign hold just that one."""
    rows = parts["train"] + parts["test"] + parts["public"] + parts["probe"]
    assert all(bool(signs_in(row["text"])) == (" sign" in row["text"]) for row in rows)
    assert max(len(signs_in(row["text"])) for row in rows) == 1
    ordinary = sum(" sign" not in row["text"] for row in parts["train"])
    assert ordinary == len(demo.HOSPITALS) * COUNTS.ordinary


def test_no_test_note_was_trained_on(parts: dict[str, Rows]) -> None:
    """Private texts do not stand in the test or the probe, and all have the counts that were asked."""
    train, test, probe = ({row["text"] for row in parts[name]} for name in ("train", "test", "probe"))
    assert not train & (test | probe)
    assert len(parts["train"]) == 5 * COUNTS.ordinary + 2 * len(SIGNS) * COUNTS.signs
    assert len(parts["test"]) == 2 * len(SIGNS) * COUNTS.test
    assert len(parts["probe"]) == len(SIGNS) * COUNTS.probe
