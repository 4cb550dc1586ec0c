"""The norm bound: no update is longer than a few times the median norm. It is always on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NormBound:
    """Scales down an update that is longer than ``slack`` times a reference length.

    What it guarantees: one update moves a mean by at most slack · reference · weight / total weight.
    With fewer than half of the clients hostile the reference, a median, is within the honest norms.
    Scaling by min(1, limit / ‖u‖) projects onto a ball: see Sun et al. 2019 (arXiv 1911.07963).
    What it does not: many small hostile updates in one direction add up; that needs a robust rule.

    Attributes:
        slack: The largest norm of an update, in multiples of the reference, >= 1.
        reference: The median norm of comparable updates; None means no bound yet.
    """

    slack: float
    reference: float | None

    @property
    def limit(self) -> float:
        """The largest norm that is left unscaled; infinite without a reference.

        >>> NormBound(3.0, 2.0).limit, NormBound(3.0, None).limit
        (6.0, inf)
        """
        return math.inf if self.reference is None else self.slack * self.reference

    def factor(self, norm: float) -> float:
        """Returns the factor by which an update of this norm is scaled, in (0, 1].

        >>> NormBound(3.0, 2.0).factor(12.0), NormBound(3.0, 2.0).factor(5.0)
        (0.5, 1.0)
        """
        return 1.0 if norm <= self.limit else self.limit / norm


def median_norm(norms: Sequence[float]) -> float:
    """Returns the lower median: with an even count, no huge hostile norm is averaged into it.

    >>> median_norm([1.0, 900.0, 2.0, 1000.0])
    2.0
    """
    return float(np.sort(np.asarray(norms))[(len(norms) - 1) // 2])
