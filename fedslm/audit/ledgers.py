"""Audits a ledger offline, with only the node's public key."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedslm import layout
from fedslm.audit.statements import check_statements
from fedslm.errors import LedgerError, PrivacyError, plural
from fedslm.extras import missing
from fedslm.privacy import accounting, clock
from fedslm.privacy.agreement import Accounts
from fedslm.privacy.calibration import largest
from fedslm.privacy.chain import (
    GENESIS,
    HEAD_SUFFIX,
    Chain,
    check_head,
    read_chain,
    read_head,
)
from fedslm.privacy.keys import public_hex
from fedslm.privacy.shares import assumption, least_honest
from fedslm.privacy.statement import Statement
from fedslm.records import Event, epsilon_as_json

_MOST_DELTAS = 20  # per ledger: composition is repeated for each
NO_WITNESS = (
    "a rollback cannot be excluded: neither a saved head (--head) nor a statement that a server "
    "received (--statements) was given, and ledger and head can be restored together"
)


@dataclass(frozen=True)
class Spent:
    """The total cost of a ledger's charges.

    Attributes:
        delta: The delta.
        accounts: Epsilon by three accountants, or two without Opacus, for plans that were fixed in
            advance.
        epsilon: Epsilon of record: the first accountant's, or infinite after a release without privacy.
        budget: Epsilon that the node allows at this delta; None if it was not given.
        adaptive: Epsilon if the plans were chosen after seeing earlier releases; None for one plan.
        adaptive_delta: The delta at which ``adaptive`` holds: twice ``delta``, once for stopping under
            the first plan and once for all later plans; None for one plan.
        honest_nodes: The most honest nodes that ``epsilon`` assumes; None: it assumes none.
        all_collude: Epsilon without that assumption; None without ``honest_nodes``.
        remaining_releases: Further releases like the last that fit the budget; None if no budget was
            given or nothing was charged.
    """

    delta: float
    accounts: Accounts
    epsilon: float
    budget: float | None = None
    adaptive: float | None = None
    adaptive_delta: float | None = None
    remaining_releases: int | None = None
    honest_nodes: int | None = None
    all_collude: float | None = None


@dataclass(frozen=True)
class LedgerAudit:
    """The result of an audit of one ledger.

    Attributes:
        path: Path of the ledger.
        public_key: The key that was used for the check.
        ledger_id: The ledger's random identifier.
        dataset: The node's name for its data.
        unit: The unit whose participation the charges protect.
        unit_column: Column that names a record's owner; None if the unit needs none, or no line states
            it.
        adjacency: Neighbouring relation of data sets.
        entries: Number of lines that were checked.
        charges: Number of releases that were charged.
        open_reservations: Number of charges without a release: failed or interrupted work.
        unprotected: Number of releases without privacy.
        head: Hash of the last line: save it, and give it to the next audit.
        runs: Run identifiers, in order.
        commitments: Data commitments, in order: more than one means that the data changed.
        spent: Privacy loss for each delta.
        findings: Problems; empty if the ledger is sound.
        open_questions: Problems that the evidence cannot rule out. The ledger may still be sound.
        notes: Useful information that is not a problem.
    """

    path: str
    public_key: str
    ledger_id: str = ""
    dataset: str = ""
    unit: str = ""
    unit_column: str | None = None
    adjacency: str = ""
    entries: int = 0
    charges: int = 0
    open_reservations: int = 0
    unprotected: int = 0
    head: str = ""
    runs: tuple[str, ...] = ()
    commitments: tuple[str, ...] = ()
    spent: tuple[Spent, ...] = ()
    findings: tuple[str, ...] = ()
    open_questions: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """True if there are no findings."""
        return not self.findings


@dataclass(frozen=True)
class Evidence:
    """The evidence that an auditor checks a ledger against.

    Attributes:
        heads: Hashes of earlier last lines, saved elsewhere.
        statements: Signed statements that a server received from the ledger's node.
        deltas: Deltas to report besides those in the ledger.
        budget: (epsilon, delta) that the node allows over its lifetime.

    Raises:
        LedgerError: A head is not a hash: no ledger contains it, which is not the ledger's fault.
        OutOfRange: A delta is not in (0, 0.1].
    """

    heads: tuple[str, ...] = ()
    statements: tuple[Statement, ...] = ()
    deltas: tuple[float, ...] = ()
    budget: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for head in self.heads:
            if not re.fullmatch("[0-9a-f]{64}", head):
                raise LedgerError(f"head={head[:80]!r} must be 64 hexadecimal digits, in small letters")
        for delta in self.deltas:
            accounting.check_delta(delta)

    @property
    def can_witness(self) -> bool:
        """Whether the evidence can reveal a rollback of the ledger: the head of an empty one cannot."""
        return bool(self.statements) or any(head != GENESIS for head in self.heads)


@dataclass
class _Findings:
    """Collects findings, open questions and notes."""

    wrong: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit_ledger(path: Path, key: Ed25519PublicKey, evidence: Evidence) -> LedgerAudit:
    """Checks a ledger and recomputes what was spent, using only files.

    Formal guarantees:
        * A sound result means: every line was signed by the key and follows the previous one; the
          ledger contains every given head and statement, and each statement's release, for its run and
          round; the last statement of each run states at least the epsilon that the ledger had cost
          until then; the accountants agree; the budget is kept; nothing was released without privacy;
          one unit and column are counted; a run has one plan and the same records throughout; no time
          is impossible, and none goes back by more than a recorded correction of the clock.
        * Without a head or a statement from elsewhere, an older copy of ledger and head passes as
          sound: the result lists that as an open question. The head of an empty ledger does not answer
          it.

    Args:
        path: The ledger, or the node directory that contains it.
        key: The node's public key, from a source that the auditor trusts.
        evidence: Heads, statements and budget to check the ledger against.
    """
    path = path / layout.LEDGER if path.is_dir() else path
    public_key = public_hex(key)
    if not path.exists():
        return LedgerAudit(str(path), public_key, findings=(f"there is no ledger {path}",))
    try:
        chain = read_chain(path, key)
    except LedgerError as error:
        return LedgerAudit(str(path), public_key, findings=(str(error),))
    found = _Findings()
    _check_completeness(path, chain, public_key, evidence, found)
    _check_lines(chain, found)
    spent = tuple(_spent(chain, evidence, found))
    opening = chain.opening
    return LedgerAudit(
        path=str(path),
        public_key=public_key,
        ledger_id=opening.ledger_id if opening else "",
        dataset=opening.dataset if opening else "",
        unit=chain.unit or "",
        unit_column=chain.unit_column,
        adjacency=opening.adjacency if opening else "",
        entries=len(chain.entries),
        charges=len(chain.charges),
        open_reservations=len(chain.charges) - sum(e.reserve is not None for e in chain.entries),
        unprotected=len(chain.unprotected),
        head=chain.head,
        runs=chain.runs,
        commitments=tuple(dict.fromkeys(charge.dataset_commitment for charge in chain.charges)),
        spent=spent,
        findings=tuple(found.wrong),
        open_questions=tuple(found.open),
        notes=tuple(found.notes),
    )


def as_json(audit: LedgerAudit) -> dict[str, object]:
    """Returns the audit as JSON values: an infinite epsilon becomes the word "infinite"."""
    spent = [
        {
            **asdict(each),
            "epsilon": epsilon_as_json(each.epsilon),
            "adaptive": None if each.adaptive is None else epsilon_as_json(each.adaptive),
            "all_collude": None if each.all_collude is None else epsilon_as_json(each.all_collude),
        }
        for each in audit.spent
    ]
    return {"sound": audit.sound, **asdict(audit), "spent": spent}


def _check_completeness(
    path: Path, chain: Chain, public_key: str, evidence: Evidence, found: _Findings
) -> None:
    """Checks the chain against the stored head file, saved heads and statements."""
    if chain.opening is not None and chain.opening.public_key != public_key:
        found.wrong.append("the ledger names another key than the one it is checked with")
    if chain.torn:
        found.notes.append("bytes follow the last line: a crash while it was written")
    try:
        beside = read_head(path.with_name(path.name + HEAD_SUFFIX))
        if beside is None:
            found.notes.append(
                "there is no head next to the ledger: lines cut off its end would not show"
            )
        elif beside[0] >= 0:
            check_head(path, chain, *beside)
        elif chain.entries:
            found.notes.append(
                "the head next to the ledger belongs to no line: lines cut off its end would not show"
            )
    except LedgerError as error:
        found.wrong.append(str(error))
    known = {entry.previous for entry in chain.entries} | {chain.head}
    for head in evidence.heads:
        if head not in known:
            found.wrong.append(f"the saved head {head[:16]}… is not in the ledger: it was rolled back")
    if not evidence.can_witness:
        found.open.append(NO_WITNESS)
    found.wrong += check_statements(path, chain, evidence.statements, public_key)


def _check_lines(chain: Chain, found: _Findings) -> None:
    """Checks the content of correctly signed lines."""
    if chain.unprotected:
        first, releases = chain.unprotected[0], plural(len(chain.unprotected), "release")
        found.wrong.append(
            f"{releases} without privacy, the first in round {first.round} of run {first.run[:80]!r}: "
            f"epsilon is infinite from then on"
        )
    units = {each.unit for each in chain.charges} - {None, chain.unit}
    columns = {each.unit_column for each in chain.charges} - {None, chain.unit_column}
    if units or columns:
        others = ", ".join(sorted(map(repr, units | columns)))
        found.wrong.append(f"charges count by {others} too: each sees only a part of what was spent")
    unnamed = sum(each.unit_column is None for each in chain.charges)
    if chain.unit == "user" and unnamed:
        found.notes.append(
            f"{unnamed} charges of an older version do not say by which column they count"
        )
    plans = {(each.run, each.plan_sha256) for each in chain.charges}
    records = {(each.run, each.dataset_commitment) for each in chain.charges}
    for what, pairs in (("under several plans", plans), ("for records that changed", records)):
        runs = Counter(run for run, _ in pairs)
        mixed = [run for run, count in runs.items() if count > 1]
        if mixed:
            found.wrong.append(f"run {min(mixed)[:80]!r} was charged {what}: no node does that")
    _check_times(chain, found)


def _check_times(chain: Chain, found: _Findings) -> None:
    """Checks for impossible times, times that go back, and clock corrections."""
    numbered = list(enumerate(chain.entries, 1))
    early = [number for number, entry in numbered if entry.time < clock.EARLIEST_TIME]
    if early:
        found.wrong.append(f"{len(early)} lines have a time before 2025, the first is line {early[0]}")
    before, latest, back = 0, 0, 0
    for number, entry in numbered:
        if entry.correction is None:
            back = max(back, before - entry.time)
            latest = max(latest, entry.time)
        else:
            ahead, latest = latest - entry.time, entry.time
            found.notes.append(
                f"line {number}: the operator corrected the clock by {entry.correction.ahead} s: "
                f"{entry.correction.reason!r}"
            )
            if abs(ahead - entry.correction.ahead) > clock.AHEAD_SECONDS:
                found.wrong.append(
                    f"line {number} says that it corrects the clock by {entry.correction.ahead} s, "
                    f"and goes back by {ahead} s"
                )
        before = entry.time
    if back > clock.AHEAD_SECONDS:
        found.wrong.append(f"a line is {back} s earlier than the line before it")
    elif back:
        found.notes.append(f"times go back by up to {back} s: a clock that was set by a little")
    if (ahead := clock.seconds_ahead(chain.entries)) > clock.AHEAD_SECONDS:
        found.notes.append(f"the last line is {ahead} s ahead of this machine's clock")


def _spent(chain: Chain, evidence: Evidence, found: _Findings) -> Sequence[Spent]:
    """Returns epsilon at each relevant delta; more deltas than an honest ledger has are a finding."""
    own = sorted({charge.delta for charge in chain.charges})
    if len(own) > _MOST_DELTAS:
        found.wrong.append(
            f"the charges name {len(own)} values of delta, and {_MOST_DELTAS} is the most: ε is "
            f"computed only for the {_MOST_DELTAS} smallest"
        )
    deltas = {*own[:_MOST_DELTAS], *evidence.deltas}
    if evidence.budget is not None:
        deltas.add(evidence.budget[1])
    if len({charge.plan_sha256 for charge in chain.charges}) > 1:
        found.notes.append(
            "several plans: ε at δ is for plans that were fixed beforehand. If one was chosen after "
            "seeing earlier releases, the adaptive ε holds (--policy computes it), at 2δ"
        )
    results = []
    for delta in sorted(deltas):
        try:
            results.append(_spent_at(chain, delta, evidence.budget, found))
        except PrivacyError as error:
            found.wrong.append(str(error))
    honest = least_honest(chain.events)
    if honest is not None:
        found.notes.append(f"ε holds if {assumption(honest)}; without that, see the column all collude")
    if any(charge.protocol == "ideal" for charge in chain.charges):
        found.notes.append(
            "charges by the protocol 'ideal', a simulation of secure aggregation: whoever saw a "
            "message of this node saw only its own share of the noise"
        )
    if any(each.accounts.prv is None for each in results):
        found.notes.append(
            f"only two accountants were asked, and PLD is at most RDP: {missing('opacus', 'PRV')}"
        )
    return results


def _spent_at(
    chain: Chain, delta: float, budget: tuple[float, float] | None, found: _Findings
) -> Spent:
    """Returns epsilon at one delta, and the remaining budget."""
    accounts = accounting.cross_check(chain.events, delta, needs_prv=False)
    epsilon = math.inf if chain.unprotected else accounts.epsilon
    honest = least_honest(chain.events)
    weaker = None if honest is None else chain.epsilon_if_all_collude(delta)
    if budget is None or budget[1] != delta:
        return Spent(delta, accounts, epsilon, honest_nodes=honest, all_collude=weaker)
    adaptive, twice = None, None
    if len({charge.plan_sha256 for charge in chain.charges}) > 1:
        adaptive, twice = accounting.adaptive_epsilon(chain.events, delta, budget[0]), 2 * delta
    exceeded = f"the budget ε = {budget[0]:g} at δ = {delta:g} is exceeded"
    if epsilon > budget[0]:
        found.wrong.append(f"{exceeded}: ε = {epsilon:.3f}")
    elif adaptive is not None and adaptive > budget[0]:
        found.wrong.append(
            f"{exceeded} if a plan was chosen after earlier releases: ε = {adaptive:.3f} at "
            f"δ = {2 * delta:g}"
        )
    if epsilon == math.inf:
        remaining: int | None = 0
    else:
        remaining = _remaining(chain.events, budget) if chain.events else None
    return Spent(delta, accounts, epsilon, budget[0], adaptive, twice, remaining, honest, weaker)


def _remaining(events: tuple[Event, ...], budget: tuple[float, float]) -> int:
    """Returns the number of further releases like the last that fit the budget."""
    last = events[-1]

    def fits(count: int) -> bool:
        more = replace(last, steps=last.steps * count)
        return accounting.epsilon([*events, more], budget[1]) <= budget[0]

    return largest(fits, 10_000)
