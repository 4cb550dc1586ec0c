"""Who takes part in one attempt at a round, and how many of them must survive it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from fedslm.errors import FederationError, PolicyRefused
from fedslm.privacy.keys import sha256_of

MOST_NODES = 256
"""Largest cohort. Each node shares a mask with every other (the complete graph).

The sparse graph of Bell et al. 2020 (ePrint 2020/704) saves nothing here: against a server that is not
merely curious its degree is about 300 of 10,000 nodes, which is more peers than this.
"""
MOST_VALUES = 1 << 28
MOST_CLIENT, MOST_ROUND, MOST_ATTEMPT = 10**6, 10**6, 1 << 31
_LONGEST_RUN = 200


def threshold_for(num_nodes: int, num_colluding: int) -> int:
    """Returns the least threshold t for a cohort: t ≥ ⌈2n/3⌉ and 2t > n + c.

    With 2t > n + c no two survivor sets can both collect t signatures, and no node's two secrets can
    both be reconstructed: each of the n − c honest nodes signs one set and gives one of the two shares
    (Bonawitz et al. 2017, section 6.3).

    Args:
        num_nodes: Nodes of the cohort, n.
        num_colluding: Nodes that may collude with the server, c.

    >>> threshold_for(10, 0), threshold_for(10, 3), threshold_for(10, 5)
    (7, 7, 8)
    """
    return max(-(-2 * num_nodes // 3), (num_nodes + num_colluding) // 2 + 1)


@dataclass(frozen=True)
class Cohort:
    """What all nodes of one attempt agree on; each signs its hash.

    Attributes:
        run: Identifier of the run.
        round: Round of the run, from 1.
        attempt: Attempt at this round, from 1; each has its own keys, masks and noise.
        clients: The nodes' numbers on the roster, ascending.
        threshold: Least number of survivors, t.
        num_colluding: Nodes that may collude with the server, c.
        num_values: Length of each vector.
        roster_sha256: Hash of the roster that all of them verified.
        plan_sha256: Hash of the plan that all of them follow: it says how much noise each adds.

    Raises:
        FederationError: A value is out of its range, or the threshold is too low or too high.
    """

    run: str
    round: int
    attempt: int
    clients: tuple[int, ...]
    threshold: int
    num_colluding: int
    num_values: int
    roster_sha256: str
    plan_sha256: str

    def __post_init__(self) -> None:
        _check_text("run", self.run, rf"[\x21-\x7e]{{1,{_LONGEST_RUN}}}")
        for key in ("roster_sha256", "plan_sha256"):
            _check_text(key, getattr(self, key), "[0-9a-f]{64}")
        check_count("round", self.round, 1, MOST_ROUND)
        check_count("attempt", self.attempt, 1, MOST_ATTEMPT)
        check_count("num_values", self.num_values, 1, MOST_VALUES)
        if type(self.clients) is not tuple or not 2 <= len(self.clients) <= MOST_NODES:
            raise FederationError(f"a cohort has from 2 to {MOST_NODES} nodes; choose fewer or more")
        for client in self.clients:
            check_count("client", client, 0, MOST_CLIENT)
        if not is_ascending(self.clients):
            raise FederationError("a cohort names each node once, in ascending order")
        num_nodes = len(self.clients)
        check_count("num_colluding", self.num_colluding, 0, num_nodes - 1)
        least = threshold_for(num_nodes, self.num_colluding)
        check_count("threshold", self.threshold, least, num_nodes)

    @cached_property
    def sha256(self) -> str:
        """Hash of all values."""
        return sha256_of({"purpose": "fedslm secagg cohort, version 1", **asdict(self)})

    @property
    def order(self) -> tuple[int, int]:
        """Round and attempt: a later attempt has a greater order."""
        return self.round, self.attempt

    @property
    def honest_survivors(self) -> int:
        """The least number of honest survivors, t − c: their noise must do."""
        return self.threshold - self.num_colluding

    def point(self, client: int) -> int:
        """The point at which a client holds its Shamir shares: its position, from 1."""
        return self.clients.index(client) + 1


@dataclass(frozen=True)
class Requirements:
    """What a node's own policy requires of a cohort.

    Attributes:
        num_colluding: The least number of colluding nodes that a cohort must allow for.
        least_honest_nodes: The least number of honest survivors, at least 2: with 1 the sum hides
            nothing.
        plan_sha256: Hash of the plan that every node of a cohort must follow. With another one a peer
            would add less noise than this node is charged for.

    Raises:
        FederationError: A value is out of its range.
    """

    num_colluding: int
    least_honest_nodes: int
    plan_sha256: str

    def __post_init__(self) -> None:
        check_count("num_colluding", self.num_colluding, 0, MOST_NODES)
        check_count("least_honest_nodes", self.least_honest_nodes, 2, MOST_NODES)

    def check(self, cohort: Cohort) -> None:
        """Refuses a cohort with fewer colluding nodes or honest survivors, or with another plan.

        Raises:
            PolicyRefused: It does.
        """
        if cohort.num_colluding < self.num_colluding:
            raise PolicyRefused(
                f"num_colluding={cohort.num_colluding} must be at least {self.num_colluding}, as this "
                f"node's policy says"
            )
        if cohort.honest_survivors < self.least_honest_nodes:
            raise PolicyRefused(
                f"threshold - num_colluding = {cohort.honest_survivors} must be at least "
                f"{self.least_honest_nodes}, as this node's policy says; ask more nodes"
            )
        if cohort.plan_sha256 != self.plan_sha256:
            raise PolicyRefused("the cohort has another plan than this node: all must add equal shares")


def check_count(key: str, value: Any, least: int, most: int) -> None:
    """Refuses what is not a whole number within bounds; a boolean is not one.

    Raises:
        FederationError: It is not.
    """
    if type(value) is not int or not least <= value <= most:
        shown = value if type(value) is int and abs(value) < 10**12 else type(value).__name__
        raise FederationError(f"{key}={shown} must be a whole number from {least} to {most}")


def is_ascending(values: Sequence[int]) -> bool:
    """Whether each value is greater than the one before.

    >>> is_ascending([1, 2, 4]), is_ascending([1, 1])
    (True, False)
    """
    return all(a < b for a, b in pairwise(values))


def _check_text(key: str, value: Any, pattern: str) -> None:
    """Refuses what is not a text of a form."""
    if type(value) is not str or re.fullmatch(pattern, value) is None:
        raise FederationError(f"{key} must be a text of the form {pattern}")
