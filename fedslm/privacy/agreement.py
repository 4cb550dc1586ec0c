"""Whether several accountants agree on epsilon: only then is it reported or trained with.

PRV comes from Opacus, which a core installation lacks. Without it a report may answer with two
accountants and says so; training needs all three (:func:`fedslm.privacy.accounting.cross_check`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedslm.errors import PrivacyError
from fedslm.extras import missing

DISCRETISATION = 1e-3
"""Interval to which PLD rounds each step's loss, up."""
_TOLERANCE = 1e-3
_PRV_TOLERANCE = (0.02, 0.005)  # absolute, relative
_PRV_MESH = 0.01  # Opacus' default eps_error
_MOST_POINTS = 10_000_000  # of a PRV, at about 350 bytes each
_LARGEST_CHECKED = 1_000  # a larger epsilon guarantees nothing


@dataclass(frozen=True)
class Accounts:
    """Epsilon of the same events by three accountants, or by two where Opacus is not installed.

    The privacy losses of the steps add up: PLD and PRV convolve their distributions (PLD a pessimistic
    one). RDP adds the divergence of each order; the best order gives epsilon (Balle et al. 2020,
    arXiv 1905.09982).

    Attributes:
        pld: From dp-accounting's privacy loss distributions: the number of record.
        prv: From Opacus' privacy random variables: an estimate plus its error bound. Its domain comes
            from Opacus' Rényi accountant; the PLD shares no code with either. None: not available.
        rdp: From Opacus' Rényi accountant, or without Opacus from dp-accounting's: an upper bound, 10
            to 25 % larger. For noise that nodes share: by dp-accounting at whole orders, where it is
            exact for the discrete Gaussian.
        of_record: The accountant that is reported: RDP for noise that nodes share, whose PLD is that
            of a continuous Gaussian.
    """

    pld: float
    prv: float | None
    rdp: float
    of_record: Literal["PLD", "RDP"] = "PLD"

    @property
    def epsilon(self) -> float:
        """The epsilon that is reported."""
        return self.rdp if self.of_record == "RDP" else self.pld

    def in_words(self) -> str:
        """Which accountants agreed, with their figures.

        >>> Accounts(2.0, 2.01, 2.3).in_words()
        'PLD 2.000 (reported), PRV 2.010, RDP 2.300'
        >>> print(Accounts(2.0, None, 2.3).in_words().partition(" (opacus")[0])
        PLD 2.000 (reported), RDP 2.300; only two accountants: PRV needs fedslm[train]
        """
        figures = {"PLD": self.pld, "PRV": self.prv, "RDP": self.rdp}
        words = ", ".join(
            f"{name} {figure:.3f}{' (reported)' * (name == self.of_record)}"
            for name, figure in figures.items()
            if figure is not None
        )
        if self.prv is None:
            return f"{words}; only two accountants: {missing('opacus', 'PRV')}"
        return words


def of_opacus(
    history: Sequence[tuple[float, float, int]], delta: float, orders: Sequence[float] | None = None
) -> tuple[float, float]:
    """Epsilon by PRV and by RDP, both from Opacus. An estimate below 0 counts as 0.

    Args:
        history: (noise multiplier, sample rate, steps) of each kind of step.
        delta: The delta of the budget.
        orders: Orders of RDP; None: Opacus' own.

    Raises:
        PrivacyError: RDP exceeds 1,000, or PRV would take gigabytes.
    """
    import warnings

    from opacus.accountants import PRVAccountant, RDPAccountant

    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = list(history)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the best order at the edge of the range, and log(0)
        loose = max(0.0, float(rdp.get_epsilon(delta, orders)))
        # PRV truncates its domain at the epsilon of a smaller delta.
        _check_size(loose, float(rdp.get_epsilon(delta / 4000)), history, delta)
        return max(0.0, float(prv.get_epsilon(delta))), loose


def _check_size(
    rdp: float, width: float, history: Sequence[tuple[float, float, int]], delta: float
) -> None:
    """Refuses a cross-check that would take gigabytes.

    Args:
        rdp: Epsilon by RDP.
        width: Epsilon by RDP at the delta at which Opacus' PRV truncates its domain.
        history: The charged events.
        delta: The delta of the budget.
    """
    steps = sum(count for _, _, count in history)
    points = 2 * (width + 3) * math.sqrt(steps * math.log(12_000 / delta) / 2) / _PRV_MESH
    if not (rdp <= _LARGEST_CHECKED and points <= _MOST_POINTS):
        raise PrivacyError(
            f"epsilon is {rdp:,.1f} by RDP over {steps:,} steps and cannot be checked by three "
            f"accountants: it must be at most {_LARGEST_CHECKED:,}, and PRV would need {points:,.0f} "
            f"points, at most {_MOST_POINTS:,}; raise noise_multiplier or take fewer steps"
        )


def check_agreement(accounts: Accounts) -> None:
    """Refuses figures that cannot all be correct.

    Raises:
        PrivacyError: RDP is below PLD, or PRV differs from PLD by more than 0.02 + 0.5 %. If both are
            below PLD, the PLD's discretisation is too coarse. Without PRV, RDP is at most 1,000.
    """
    if accounts.prv is None:
        _check_two(accounts.pld, accounts.rdp)
        return
    absolute, relative = _PRV_TOLERANCE
    allowed = absolute + relative * accounts.pld
    is_bounded = accounts.rdp >= accounts.pld - _TOLERANCE
    if accounts.prv < accounts.rdp < accounts.pld < math.inf and not is_bounded:
        raise PrivacyError(
            f"epsilon cannot be told: PLD, which rounds each step's loss to {DISCRETISATION:g}, says "
            f"{accounts.pld:.4f}, and RDP at most {accounts.rdp:.4f}; take fewer steps, or less noise"
        )
    if not (is_bounded and abs(accounts.prv - accounts.pld) <= allowed):
        raise PrivacyError(
            f"the accountants disagree: PLD {accounts.pld:.4f}, PRV {accounts.prv:.4f}, RDP "
            f"{accounts.rdp:.4f}; RDP must be at least PLD, and PRV within {allowed:.3f} of it"
        )


def _check_two(pld: float, rdp: float) -> None:
    """Refuses figures of PLD and RDP of which one must be wrong, or that guarantee nothing."""
    if not rdp <= _LARGEST_CHECKED:
        raise PrivacyError(
            f"epsilon is {rdp:,.1f} by RDP and cannot be checked by two accountants: it must be at "
            f"most {_LARGEST_CHECKED:,}; raise noise_multiplier or take fewer steps"
        )
    if not pld - _TOLERANCE <= rdp:
        raise PrivacyError(
            f"the accountants disagree: PLD {pld:.4f}, RDP {rdp:.4f}; RDP must be at least PLD. If "
            f"PLD's rounding of each step's loss to {DISCRETISATION:g} is the reason, fewer steps agree"
        )
