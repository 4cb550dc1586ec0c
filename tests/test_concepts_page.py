"""The table of docs/concepts.md: its numbers are computed again, by the formula and by the accountant."""

from __future__ import annotations

import re
from math import exp
from pathlib import Path

import pytest

from fedslm.privacy import accounting
from fedslm.privacy.calibration import calibrate
from fedslm.privacy.plan import Event

PAGE = Path(__file__).parent.parent / "docs" / "concepts.md"
FALSE_POSITIVES, DELTA, STEPS = 0.01, 1e-5, 16


def rows() -> list[tuple[float, str, str, str]]:
    """The table: epsilon, and the three shares as they are written."""
    table = PAGE.read_text().split("<!-- table -->")[1].split("<!-- end of table -->")[0]
    cells = [re.findall(r"[\d.]+(?: %)?", line) for line in table.splitlines() if line.startswith("| ")]
    return [(float(row[0]), row[1], row[2], row[3]) for row in cells[1:]]


def by_the_pair(epsilon: float) -> float:
    """Kairouz et al. 2015, theorem 2.1: the bound of one pair."""
    above = exp(epsilon) * FALSE_POSITIVES + DELTA
    return min(above, 1 - exp(-epsilon) * (1 - DELTA - FALSE_POSITIVES))


def test_the_table_is_there() -> None:
    """Five values of epsilon."""
    assert [row[0] for row in rows()] == [0.5, 1, 2, 3, 8]


@pytest.mark.parametrize("row", rows(), ids=lambda row: str(row[0]))
def test_each_number(row: tuple[float, str, str, str]) -> None:
    """Written to one decimal, or to a whole percent; the whole curve never bounds less than the pair."""
    epsilon, pair, curve, belief = row
    noise = calibrate(epsilon, DELTA, 1.0, STEPS)
    bound = accounting.true_positive_bound([Event(1.0, noise, STEPS)], FALSE_POSITIVES)
    assert pair == f"{100 * by_the_pair(epsilon):.1f} %"
    assert curve == f"{100 * bound:.1f} %"
    assert belief == f"{100 * exp(epsilon) / (1 + exp(epsilon)):.0f} %"
    assert FALSE_POSITIVES < bound <= by_the_pair(epsilon)
