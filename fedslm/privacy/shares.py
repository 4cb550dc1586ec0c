"""Noise that several nodes add together: each its share, the sum all of it.

Node i adds discrete Gaussian noise of variance s² = S² / m to its sum of clipped gradients. Whoever
sees only the sum over all nodes, and knows what up to ``max_colluding`` of them sent, still faces the
noise of m = threshold - max_colluding honest nodes: at least variance S². So the ε of a charge rests on
an assumption, which :attr:`fedslm.records.Event.honest_nodes` names; :func:`if_all_collude` gives the
same charge without it.

References:
    Kairouz, Liu and Steinke 2021, the distributed discrete Gaussian (arXiv 2102.06387).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal, get_args

from fedslm.errors import OutOfRange
from fedslm.privacy.encoding import COARSE_BITS, LEAST_COARSE_BITS, grid_of
from fedslm.records import Event, is_count

Protocol = Literal["masked", "ideal"]
PROTOCOLS = get_args(Protocol)
MOST_NODES = 2**20
_LEAST_STDDEV = 16


@dataclass(frozen=True)
class NoiseShares:
    """How a sum's noise is divided among nodes.

    Attributes:
        threshold: Fewest nodes whose sum is formed, >= 2.
        max_colluding: Most of them that may tell the server what they sent, 0 to ``threshold`` - 2.
        grid_bits: Grid of the sum, see :func:`fedslm.privacy.encoding.grid_of`.
        protocol: How the sum is formed. "masked": by secure aggregation (:mod:`fedslm.secagg`).
            "ideal": by the server, from vectors that it can read; only in simulations.
    """

    threshold: int
    max_colluding: int
    grid_bits: int
    protocol: Protocol

    def __post_init__(self) -> None:
        colluding = type(self.max_colluding) is int and self.max_colluding >= 0
        if not (is_count(self.threshold) and self.threshold <= MOST_NODES and colluding):
            raise OutOfRange(
                f"threshold={self.threshold} and max_colluding={self.max_colluding} must be whole "
                f"numbers from 2 and from 0, up to {MOST_NODES:,}"
            )
        if self.honest_nodes < 2:
            raise OutOfRange(
                f"threshold={self.threshold} - max_colluding={self.max_colluding} must be at least 2: "
                f"with fewer honest nodes there is nobody to share the noise with"
            )
        bits = self.grid_bits
        if type(bits) is not int or not LEAST_COARSE_BITS <= bits <= COARSE_BITS:
            raise OutOfRange(f"grid_bits={bits} must be in {LEAST_COARSE_BITS}..{COARSE_BITS}")
        if self.protocol not in PROTOCOLS:
            raise OutOfRange(f"protocol={self.protocol!r} must be one of {', '.join(PROTOCOLS)}")

    @property
    def honest_nodes(self) -> int:
        """m: nodes that are assumed to add their share and to keep it to themselves."""
        return self.threshold - self.max_colluding

    def variance(self, clip_norm: float, noise_multiplier: float) -> int:
        """Returns s², the variance of one node's noise in steps of the grid.

        Formal guarantees:
            * m · s² >= (``noise_multiplier`` · C / γ)² exactly, and C / γ bounds what one unit moves.
            * s >= 16. So the sum of any m <= 2^20 shares is within e^±τ of one discrete Gaussian of
              variance m·s² at each coordinate, with log τ < -2500 (:func:`log_closeness`). Over 2^32
              coordinates and 10^6 steps that adds less than 10^-1000 to ε.

        Raises:
            OutOfRange: The grid is too coarse for so little noise.

        >>> NoiseShares(3, 1, 20, "ideal").variance(1.0, 1.0) == 2**40 // 2
        True
        """
        reach = Fraction(clip_norm) / Fraction(grid_of(clip_norm, self.grid_bits))
        variance = math.ceil((Fraction(noise_multiplier) * reach) ** 2 / self.honest_nodes)
        if variance < _LEAST_STDDEV**2:
            raise OutOfRange(
                f"noise_multiplier={noise_multiplier:g} is a share of {math.sqrt(variance):.1f} steps "
                f"of the grid for each of {self.honest_nodes} nodes; it must be {_LEAST_STDDEV} or more"
            )
        return variance


def if_all_collude(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same charges if everybody but this node colludes: only its own share counts.

    >>> if_all_collude([Event(0.1, 2.0, 5, honest_nodes=4), Event(0.1, 1.0, 5)])[0].noise_multiplier
    1.0
    """
    return tuple(
        event
        if event.honest_nodes is None
        else replace(
            event,
            noise_multiplier=event.noise_multiplier / math.sqrt(event.honest_nodes),
            honest_nodes=1,
        )
        for event in events
    )


def least_honest(events: Iterable[Event]) -> int | None:
    """The most honest nodes that any of the charges assumes, this node included; None: it assumes none.

    >>> least_honest([Event(0.1, 2.0, 5, honest_nodes=4), Event(0.1, 1.0, 5)])
    4
    """
    return max((each.honest_nodes for each in events if each.honest_nodes is not None), default=None)


def assumption(honest_nodes: int) -> str:
    """What an epsilon of shared noise rests on, as the end of a sentence.

    >>> assumption(4)[:48]
    'at least 4 of the nodes in every sum, the node i'
    """
    return (
        f"at least {honest_nodes} of the nodes in every sum, the node itself included, add their share "
        f"of the noise and tell nobody what they sent"
    )


def log_closeness(variance: float, nodes: int) -> float:
    """Returns log τ: a sum of discrete Gaussians has every probability of one within e^±τ.

    τ = 10 · Σ exp(-2π²s²·k / (k + 1)) over k from 1 to ``nodes`` - 1.

    Args:
        variance: s² of each.
        nodes: Number of discrete Gaussians, >= 2.

    References:
        Kairouz, Liu and Steinke 2021 (arXiv 2102.06387), theorem 9.

    >>> round(log_closeness(256, 2**20) + 2 * math.pi**2 * 128)
    2
    """
    exponents = [-2 * math.pi**2 * variance * k / (k + 1) for k in range(1, min(nodes, 1_000))]
    most = exponents[0]
    tail = max(0, nodes - 1_000) * math.exp(exponents[-1] - most)  # each is smaller than the last
    return math.log(10) + most + math.log(sum(math.exp(each - most) for each in exponents) + tail)
