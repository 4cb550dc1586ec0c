"""Tests of the cohort: the threshold's bounds, against brute force, and what nodes require."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from fedslm.errors import FederationError, PolicyRefused
from fedslm.secagg.cohort import MOST_NODES, Cohort, Requirements, threshold_for

COHORT = Cohort("run", 1, 1, (0, 1, 2, 3, 4, 5), 4, 1, 10, "ab" * 32, "cd" * 32)


def can_have_two_sums(num_nodes: int, num_colluding: int, threshold: int) -> bool:
    """Whether some split of the honest nodes lets two survivor sets both collect enough signatures."""
    honest = num_nodes - num_colluding
    return any(
        first + num_colluding >= threshold and honest - first + num_colluding >= threshold
        for first in range(honest + 1)
    )


def test_the_threshold_is_the_least_that_is_safe() -> None:
    """For all small cohorts: no two survivor sets can be signed, and one less could be, or is below 2n/3."""
    for num_nodes, num_colluding in itertools.product(range(2, 40), range(40)):
        if num_colluding >= num_nodes:
            continue
        threshold = threshold_for(num_nodes, num_colluding)
        assert not can_have_two_sums(num_nodes, num_colluding, threshold)
        assert 3 * threshold >= 2 * num_nodes
        less = threshold - 1
        assert can_have_two_sums(num_nodes, num_colluding, less) or 3 * less < 2 * num_nodes
        assert threshold > num_colluding
        assert threshold <= num_nodes


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 3},  # below 2n/3
        {"threshold": 7},  # t > n
        {"threshold": True},
        {"threshold": 4.0},
        {"num_colluding": 2},  # 2t > n + c no longer
        {"num_colluding": -1},
        {"num_colluding": 6, "threshold": 6},
        {"clients": (0,)},
        {"clients": ()},
        {"clients": (0, 1, 2, 3, 4, 4)},
        {"clients": (1, 0, 2, 3, 4, 5)},
        {"clients": (-1, 1, 2, 3, 4, 5)},
        {"clients": (False, 1, 2, 3, 4, 5)},
        {"clients": [0, 1, 2, 3, 4, 5]},
        {"clients": tuple(range(MOST_NODES + 1)), "threshold": MOST_NODES},
        {"clients": (0, 1, 2, 3, 4, 10**6 + 1)},
        {"run": ""},
        {"run": "a b"},
        {"run": "x" * 201},
        {"run": 1},
        {"round": 0},
        {"round": 10**7},
        {"attempt": 0},
        {"attempt": 1 << 32},
        {"num_values": 0},
        {"num_values": (1 << 28) + 1},
        {"roster_sha256": "AB" * 32},
        {"roster_sha256": "ab" * 31},
    ],
)
def test_a_cohort_out_of_its_bounds(changes: dict[str, Any]) -> None:
    """Each value has a type and bounds; the error names it."""
    with pytest.raises(FederationError, match=r"must be|has from|names each"):
        replace(COHORT, **changes)


def test_the_largest_cohort() -> None:
    """256 nodes are accepted."""
    clients = tuple(range(MOST_NODES))
    assert replace(COHORT, clients=clients, threshold=171).honest_survivors == 170


def test_the_hash_covers_everything() -> None:
    """Each value changes it."""
    changed = [
        replace(COHORT, run="other"),
        replace(COHORT, round=2),
        replace(COHORT, attempt=2),
        replace(COHORT, clients=(0, 1, 2, 3, 4, 6)),
        replace(COHORT, threshold=5),
        replace(COHORT, num_colluding=0),
        replace(COHORT, num_values=11),
        replace(COHORT, roster_sha256="cd" * 32),
        replace(COHORT, plan_sha256="ef" * 32),
    ]
    assert len({each.sha256 for each in [COHORT, *changed]}) == 10
    assert replace(COHORT).sha256 == COHORT.sha256


def test_a_node_requires() -> None:
    """Colluding nodes that the cohort allows for, and honest survivors, at least as many; its plan."""
    Requirements(1, 3, COHORT.plan_sha256).check(COHORT)
    with pytest.raises(PolicyRefused, match="num_colluding=1 must be at least 2"):
        Requirements(2, 3, COHORT.plan_sha256).check(COHORT)
    with pytest.raises(PolicyRefused, match="= 3 must be at least 4"):
        Requirements(1, 4, COHORT.plan_sha256).check(COHORT)
    with pytest.raises(PolicyRefused, match="another plan"):
        Requirements(1, 3, "ef" * 32).check(COHORT)
    for wrong in ((-1, 2), (0, 1), (0, True), (300, 2)):
        with pytest.raises(FederationError):
            Requirements(*wrong, COHORT.plan_sha256)
