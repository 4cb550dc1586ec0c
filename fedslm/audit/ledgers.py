"""A ledger, audited offline with the node's public key alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.accounting import Accounts
from fedslm.privacy.calibration import largest
from fedslm.privacy.chain import HEAD_SUFFIX, LONGEST_LINE, Chain, check_head, read_chain, read_head
from fedslm.privacy.keys import public_hex
from fedslm.privacy.statement import Statement, read_statement
from fedslm.records import Event
from fedslm.storage import read_lines

LEDGER_FILE = "ledger.jsonl"


@dataclass(frozen=True)
class Spent:
    """What a ledger's charges cost together.

    Attributes:
        delta: The delta.
        accounts: Epsilon by three accountants.
        budget: Epsilon that the node allows at this delta; None if it was not given.
        adaptive: Epsilon if the plans were chosen after seeing earlier releases; None for one plan.
        remaining_releases: Further releases like the last that the budget pays for; None without one.
    """

    delta: float
    accounts: Accounts
    budget: float | None = None
    adaptive: float | None = None
    remaining_releases: int | None = None


@dataclass(frozen=True)
class LedgerAudit:
    """What an audit of one ledger found.

    Attributes:
        path: The ledger.
        public_key: The key that it was checked with.
        ledger_id: Its random identifier.
        dataset: The node's name for its data.
        unit: Whose participation the charges protect.
        adjacency: Relation of neighbouring data sets.
        entries: Lines that were checked.
        charges: Releases that were charged.
        open_reservations: Charged, but nothing was released: failed or interrupted work.
        head: Hash of the last line: save it, and give it to the next audit.
        runs: Run identifiers, in order.
        commitments: Data commitments, in order: more than one means that the data changed.
        spent: What was spent, for each delta.
        findings: What is wrong; empty on a sound ledger.
        notes: What is worth knowing, but not wrong.
    """

    path: str
    public_key: str
    ledger_id: str = ""
    dataset: str = ""
    unit: str = ""
    adjacency: str = ""
    entries: int = 0
    charges: int = 0
    open_reservations: int = 0
    head: str = ""
    runs: tuple[str, ...] = ()
    commitments: tuple[str, ...] = ()
    spent: tuple[Spent, ...] = ()
    findings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sound(self) -> bool:
        """True if nothing is wrong."""
        return not self.findings


@dataclass(frozen=True)
class Evidence:
    """What an auditor holds a ledger against.

    Attributes:
        heads: Hashes of lines that were once the last, saved elsewhere.
        statements: Signed statements that a server received; those of other keys are left out.
        deltas: Deltas to report besides those in the ledger.
        budget: (epsilon, delta) that the node allows over its lifetime.
    """

    heads: tuple[str, ...] = ()
    statements: tuple[Statement, ...] = ()
    deltas: tuple[float, ...] = ()
    budget: tuple[float, float] | None = None


@dataclass
class _Findings:
    """Collects what is wrong and what is worth knowing."""

    wrong: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit_ledger(path: Path, key: Ed25519PublicKey, evidence: Evidence) -> LedgerAudit:
    """Checks a ledger and recomputes what was spent; nothing but files is needed.

    Formal guarantees:
        * A sound result means: every line was signed by the key and follows the one before; every head
          and statement that was given is in it; the last statement of each run states no less epsilon
          than the ledger cost until then; three accountants agree; the budget is kept.

    Args:
        path: The ledger, or the node directory that holds it.
        key: The node's public key, from a source that the auditor trusts.
        evidence: Heads, statements and budget to hold it against.
    """
    path = path / LEDGER_FILE if path.is_dir() else path
    public_key = public_hex(key)
    if not path.exists():
        return LedgerAudit(str(path), public_key, findings=(f"there is no ledger {path}",))
    try:
        chain = read_chain(path, key)
    except LedgerError as error:
        return LedgerAudit(str(path), public_key, findings=(str(error),))
    found = _Findings()
    _check_completeness(path, chain, public_key, evidence, found)
    spent = tuple(_spent(chain, evidence, found))
    opening = chain.opening
    return LedgerAudit(
        path=str(path),
        public_key=public_key,
        ledger_id=opening.ledger_id if opening else "",
        dataset=opening.dataset if opening else "",
        unit=opening.unit if opening else "",
        adjacency=opening.adjacency if opening else "",
        entries=len(chain.entries),
        charges=len(chain.charges),
        open_reservations=len(chain.charges) - sum(e.reserve is not None for e in chain.entries),
        head=chain.head,
        runs=tuple(dict.fromkeys(charge.run for charge in chain.charges)),
        commitments=tuple(dict.fromkeys(charge.dataset_commitment for charge in chain.charges)),
        spent=spent,
        findings=tuple(found.wrong),
        notes=tuple(found.notes),
    )


def read_statements(path: Path, key: Ed25519PublicKey) -> tuple[Statement, ...]:
    """The statements of one key in a server's ``statements.jsonl``.

    Raises:
        LedgerError: The file cannot be read.
    """
    try:
        lines = read_lines(path, LONGEST_LINE)
        statements = [read_statement(json.loads(line)["statement"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PrivacyError) as error:
        raise LedgerError(f"{path} cannot be read: {str(error)[:200]}") from error
    return tuple(each for each in statements if each.public_key == public_hex(key))


def as_json(audit: LedgerAudit) -> dict[str, object]:
    """The audit as JSON values."""
    return {"sound": audit.sound, **asdict(audit)}


def _check_completeness(
    path: Path, chain: Chain, public_key: str, evidence: Evidence, found: _Findings
) -> None:
    """Holds the chain against the head beside it, saved heads and statements."""
    if chain.opening is not None and chain.opening.public_key != public_key:
        found.wrong.append("the ledger names another key than the one it is checked with")
    if chain.torn:
        found.notes.append("bytes follow the last line: a crash while it was written")
    try:
        beside = read_head(path.with_name(path.name + HEAD_SUFFIX))
        if beside is None:
            found.notes.append("no head lies beside the ledger: lines cut off its end would not show")
        elif beside[0] >= 0:
            check_head(path, chain, *beside)
    except LedgerError as error:
        found.wrong.append(str(error))
    known = {entry.previous for entry in chain.entries} | {chain.head}
    for head in evidence.heads:
        if head not in known:
            found.wrong.append(f"the saved head {head[:16]}… is not in the ledger: it was rolled back")
    released = {entry.release_sha256 for entry in chain.entries}
    for statement in evidence.statements:
        _check_statement(path, chain, statement, released, found)
    for statement in {each.run: each for each in evidence.statements}.values():
        _check_epsilon(chain, statement, found)


def _check_statement(
    path: Path,
    chain: Chain,
    statement: Statement,
    released: set[str | None],
    found: _Findings,
) -> None:
    """A statement's head and release must be in the ledger."""
    name = f"the statement of round {statement.round}"
    if chain.opening is None or statement.ledger_id != chain.opening.ledger_id:
        found.wrong.append(f"{name} is of another ledger, {statement.ledger_id}, under the same key")
        return
    try:
        check_head(path, chain, statement.index, statement.head_sha256)
    except LedgerError as error:
        found.wrong.append(f"{name}: {error}")
    if chain.root(statement.index + 1) != statement.root_sha256:
        found.wrong.append(f"{name} has another Merkle root than the ledger")
    lines = chain.entries[: statement.index + 1]
    charged = Counter(
        entry.charge.event
        for entry in lines
        if entry.charge is not None and entry.charge.run == statement.run
    )
    in_all = sum(entry.charge is not None for entry in lines)
    same = charged == dict(statement.charged) and in_all == statement.charges
    if not same or chain.opening.unit != statement.unit:
        found.wrong.append(f"{name} says other charges than the ledger")
    if statement.release_sha256 not in released:
        found.wrong.append(f"{name} is for a release that the ledger does not hold")


def _check_epsilon(chain: Chain, statement: Statement, found: _Findings) -> None:
    """A statement's epsilon is of the whole ledger, over all runs, when it was made."""
    lines = chain.entries[: statement.index + 1]
    events = [entry.charge.event for entry in lines if entry.charge is not None]
    spent = accounting.epsilon(events, statement.delta)
    if not accounting.within(spent, statement.epsilon):
        found.wrong.append(
            f"the statement of round {statement.round} says epsilon={statement.epsilon:.3f}, and the "
            f"ledger cost {spent:.3f} until then"
        )


def _spent(chain: Chain, evidence: Evidence, found: _Findings) -> Sequence[Spent]:
    """Epsilon at every delta of interest."""
    deltas = {charge.delta for charge in chain.charges} | set(evidence.deltas)
    if evidence.budget is not None:
        deltas.add(evidence.budget[1])
    results = []
    for delta in sorted(deltas):
        try:
            results.append(_spent_at(chain, delta, evidence.budget, found))
        except PrivacyError as error:
            found.wrong.append(str(error))
    return results


def _spent_at(
    chain: Chain, delta: float, budget: tuple[float, float] | None, found: _Findings
) -> Spent:
    """Epsilon at one delta, and what the budget leaves."""
    accounts = accounting.cross_check(chain.events, delta)
    if budget is None or budget[1] != delta:
        return Spent(delta, accounts)
    adaptive = None
    if len({charge.plan_sha256 for charge in chain.charges}) > 1:
        adaptive = accounting.adaptive_epsilon(chain.events, delta, budget[0])
    if max(accounts.pld, adaptive or 0.0) > budget[0]:
        found.wrong.append(
            f"the budget ε = {budget[0]:g} at δ = {delta:g} is exceeded: ε = {accounts.pld:.3f}"
        )
    remaining = _remaining(chain.events, budget) if chain.events else None
    return Spent(delta, accounts, budget[0], adaptive, remaining)


def _remaining(events: tuple[Event, ...], budget: tuple[float, float]) -> int:
    """Further releases like the last that fit."""
    last = events[-1]

    def fits(count: int) -> bool:
        more = Event(last.sample_rate, last.noise_multiplier, last.steps * count)
        return accounting.epsilon([*events, more], budget[1]) <= budget[0]

    return largest(fits, 10_000)
