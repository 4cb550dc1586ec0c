"""The last known state of each admitted node's ledger, over all runs: no spend is forgotten.

The file is stored next to the server's list of nodes. It is written, and synced, before a round counts.

Formal guarantees:
    * A statement is accepted only if its ledger extends everything that the server has seen of this
      ledger key before, in whatever run: a deleted, replaced or restored ledger is detected by the
      first statement that follows, since a Merkle proof binds the lines before.
    * A node that failed once is excluded: it is not asked, and nothing of it counts, until the operator
      readmits it (:func:`readmit`) with a reason, which is kept for the audit.
    * A node that shows one ledger to one run and another to a second, concurrent run is detected when
      the second one saves, if the charges of both are more than either ledger has, and otherwise as
      soon as either asks again: each point that was seen must be extended.
    * Epsilon falls only where delta rises, or by up to 2 % (another version's accountant may be
      tighter): a statement is checked against every (delta, epsilon) that was stated before for the
      same or a larger delta.
    * Nothing is taken from the node but hashes and counts, all signed with its admitted ledger key.

What a node spent and never stated (its reply was lost, or another server asked it) shows in its next
statement: charges and epsilon are those of its whole ledger.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from fedslm.errors import PrivacyError, RunError, Unusable, printable
from fedslm.federation.standings import Readmission, Standing, as_values, standing_of
from fedslm.privacy.merkle import MOST_SEEN, extends
from fedslm.privacy.statement import Statement
from fedslm.storage import locked, write_text

SPENDS = "spends.json"
STANDING = "standing.json"  # in a run's directory: the standings of its nodes after its last round
_LOCK_SECONDS = 30.0
_LONGEST_REASON = 300
_MOST_RUNS, _MOST_STATED = 512, 16
_NEARLY = 0.98  # another version of an accountant may be a little tighter


@dataclass
class Spends:
    """The register of one server.

    Attributes:
        path: The file.
    """

    path: Path
    _standings: dict[str, Standing] = field(default_factory=dict)
    _news: dict[str, Standing] = field(default_factory=dict)

    def standing(self, key: str) -> Standing:
        """The current standing of a ledger key."""
        return self._news.get(key) or self._standings.get(key) or Standing()

    def refresh(self) -> None:
        """Reads the changes made by other runs, or by the operator.

        Raises:
            RunError: The file cannot be read: then no node is trusted.
        """
        self._standings = dict(read_standings(self.path))
        self._news.clear()

    def believe(
        self,
        statement: Statement,
        asked: Sequence[tuple[int, str]],
        proofs: Sequence[Sequence[str]],
    ) -> str | None:
        """Records a statement whose signature and admitted key were already checked.

        Args:
            statement: The statement.
            asked: What the request listed as seen by the server.
            proofs: One for each of ``asked``.

        Returns:
            Why the node is excluded from now on; None if the statement extends what was seen.
        """
        known, new = self.standing(statement.public_key), (statement.index + 1, statement.root_sha256)
        runs = _with_run(known.runs, statement.run, statement.num_charged)
        problem = known.out or _problem(replace(known, runs=runs), statement, asked, proofs)
        if problem is not None:
            self.put_out(statement.public_key, problem)
            return problem
        open_points = [point for point in known.seen if point not in asked and point != new]
        self._news[statement.public_key] = replace(
            known,
            ledger_id=statement.ledger_id,
            seen=(*open_points, new),
            charges=max(known.charges, statement.charges),
            epsilon=statement.epsilon,
            delta=statement.delta,
            stated=_strongest((*known.stated, (statement.delta, statement.epsilon))),
            runs=runs,
        )
        return None

    def put_out(self, key: str, reason: str) -> None:
        """Excludes a node; a node that is already excluded keeps its first reason."""
        known = self.standing(key)
        if not known.out:
            out = printable(reason, _LONGEST_REASON)
            self._news[key] = replace(known, out=out, since=_now())

    def save(self) -> None:
        """Writes what was learned, merged with the changes of other runs; synced on return.

        Raises:
            RunError: It cannot be written: the round must not count.
        """
        if not self._news:
            return
        with _locked(self.path):
            current = dict(read_standings(self.path))
            for key, news in self._news.items():
                current[key] = _merged(self._standings.get(key, Standing()), current.get(key), news)
            _write(self.path, current)
        self._standings = current
        self._news.clear()


def read_standings(path: Path) -> Mapping[str, Standing]:
    """Ledger key to standing.

    Raises:
        RunError: The file cannot be read.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["ledgers"]
        return {key: standing_of(each) for key, each in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PrivacyError) as error:
        raise RunError(
            f"{path} cannot be read: {error}; restore it from a backup: without it a node could deny "
            f"what it spent"
        ) from error


def readmit(path: Path, key: str, reason: str) -> Standing:
    """Readmits a node that was excluded; its present ledger is the new beginning, whatever it is.

    Args:
        path: The register.
        key: The node's ledger key.
        reason: The operator's reason; kept for the audit.

    Returns:
        The previous standing of the node.

    Raises:
        RunError: The node is not excluded, the reason is empty, or the file cannot be written.
    """
    with _locked(path):
        current = dict(read_standings(path))
        known = current.get(key, Standing())
        if not known.out:
            raise Unusable("the node is not excluded; see `fedslm server status`")
        current[key] = _anew(known, reason)
        _write(path, current)
    return known


def succeed(path: Path, former: str, key: str, *, reason: str) -> None:
    """Keeps a node's standing under its new ledger key, whose ledger is a new beginning.

    Raises:
        RunError: The reason is empty, or the file cannot be written.
    """
    with _locked(path):
        current = dict(read_standings(path))
        known = replace(current.get(former, Standing()), out="it has another ledger key")
        current.setdefault(key, _anew(known, reason))
        _write(path, current)


def _anew(known: Standing, reason: str) -> Standing:
    """A standing for a new beginning, which keeps the previous figures."""
    if not reason.strip():
        raise Unusable("readmission needs a reason: the audit shows it")
    again = Readmission(
        at=_now(),
        reason=reason.strip()[:_LONGEST_REASON],
        was_out_for=known.out,
        ledger_id=known.ledger_id,
        charges=known.charges,
        epsilon=known.epsilon,
        delta=known.delta,
    )
    return Standing(readmissions=(*known.readmissions, again))


def standings_of_run(directory: Path) -> dict[str, Standing]:
    """Name to standing of a run's nodes, as after its last round; empty for a simulation.

    Raises:
        RunError: The file is damaged.
    """
    path = directory / STANDING
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {name: standing_of(each["standing"]) for name, each in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, PrivacyError) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _problem(
    known: Standing,
    statement: Statement,
    asked: Sequence[tuple[int, str]],
    proofs: Sequence[Sequence[str]],
) -> str | None:
    """Why a statement cannot come after what was seen; None if it can."""
    if known.ledger_id and statement.ledger_id != known.ledger_id:
        return "its ledger was replaced by another one"
    if statement.charges < known.charges:
        return f"its ledger had {known.charges} charges and has {statement.charges}: it was rolled back"
    if statement.charges < sum(known.runs.values()):
        return f"its ledger has {statement.charges} charges, and it stated more of them for its runs"
    longest = max((size for size, _ in known.seen), default=0)
    if statement.charges > known.charges and statement.index < longest:
        return "its ledger has more charges than before, but not more lines"
    if known.epsilon == math.inf and statement.epsilon != math.inf:  # at every delta
        return "its epsilon was infinite and is finite"
    for delta, epsilon in (*known.stated, (known.delta, known.epsilon)):
        if statement.delta <= delta and statement.epsilon < epsilon * _NEARLY:
            return (
                f"its epsilon was {epsilon:.3f} at delta={delta:g} and is {statement.epsilon:.3f} at "
                f"delta={statement.delta:g}"
            )
    if len(_strongest((*known.stated, (statement.delta, statement.epsilon)))) > _MOST_STATED:
        return f"it stated epsilon at more than {_MOST_STATED} deltas"
    if len(proofs) != len(asked):
        return "it does not prove that its ledger extends what was seen before"
    new = (statement.index + 1, _bytes(statement.root_sha256))
    for (size, root), proof in zip(asked, proofs, strict=True):
        if not extends((size, _bytes(root)), new, [_bytes(each) for each in proof]):
            return (
                f"its ledger does not extend the {size} lines that were seen before: it was rolled back"
            )
    return None


def _with_run(before: Mapping[str, int], run: str, charges: int) -> dict[str, int]:
    """Charges by run, with those stated for one run added; only the latest runs are kept."""
    runs = dict(before)
    runs[run] = max(runs.pop(run, 0), charges)
    while len(runs) > _MOST_RUNS:
        runs.pop(next(iter(runs)))
    return runs


def _strongest(stated: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The (delta, epsilon) pairs that no other pair implies: larger delta and epsilon are implied.

    >>> _strongest([(1e-5, 8.0), (1e-6, 7.0), (1e-6, 9.0), (1e-4, 2.0)])
    ((0.0001, 2.0), (1e-05, 8.0), (1e-06, 9.0))
    """
    found: list[tuple[float, float]] = []
    for delta, epsilon in sorted(stated, reverse=True):
        if not found or epsilon > found[-1][1]:
            found.append((delta, epsilon))
    return tuple(found)


def _merged(before: Standing, current: Standing | None, news: Standing) -> Standing:
    """Merges what this run learned with later changes by another run or the operator."""
    if current is None or current == before:
        return news
    others = [point for point in current.seen if point not in before.seen and point not in news.seen]
    seen, runs = (*others, *news.seen), current.runs
    for run, charges in news.runs.items():
        if before.runs.get(run) != charges:
            runs = _with_run(runs, run, charges)
    charges = max(news.charges, current.charges)
    latest = max(news, current, key=lambda each: (each.epsilon == math.inf, each.charges))
    out, since = (current.out, current.since) if current.out else (news.out, news.since)
    if not out and (problem := _contradiction(seen, runs, charges)) is not None:
        out, since = problem, _now()
    return replace(
        news,
        seen=seen[-MOST_SEEN:],
        charges=charges,
        epsilon=latest.epsilon,
        delta=latest.delta,
        stated=_strongest((*current.stated, *news.stated)),
        runs=runs,
        readmissions=current.readmissions,
        out=out,
        since=since,
    )


def _contradiction(
    seen: Sequence[tuple[int, str]], runs: Mapping[str, int], charges: int
) -> str | None:
    """Why two runs' observations of one ledger cannot both be true; None if they can."""
    if len(seen) > MOST_SEEN:
        return f"more than {MOST_SEEN} runs saw its ledger at different points"
    if (together := sum(runs.values())) > charges:
        return f"it showed two ledgers: one of {charges} charges, and its runs have {together}"
    return None


def _bytes(text: str) -> bytes:
    """Hexadecimal digits as bytes; empty if they are invalid, which equals no hash."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        return b""


def _write(path: Path, standings: Mapping[str, Standing]) -> None:
    """Replaces the file atomically and syncs it to disk."""
    values = {key: as_values(each) for key, each in sorted(standings.items())}
    write_text(path, json.dumps({"ledgers": values}, indent=2, allow_nan=False) + "\n")


def _locked(path: Path) -> AbstractContextManager[None]:
    """Locks out other processes between reading and writing."""
    problem = f"{path} is in use by another process; try again"
    return locked(path.with_name(f"{path.name}.lock"), _LOCK_SECONDS, problem)


def _now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
