"""Checks the spend statements that a server received against its rounds and against each ledger."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedslm.errors import LedgerError, PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.chain import LONGEST_LINE, Chain, check_head
from fedslm.privacy.keys import public_hex
from fedslm.privacy.lines import NO_UNIT, Entry
from fedslm.privacy.shares import least_honest
from fedslm.privacy.statement import Statement, read_statement
from fedslm.records import RoundRecord, within
from fedslm.storage import read_lines


def read_statements(path: Path, key: Ed25519PublicKey) -> tuple[Statement, ...]:
    """Returns the statements of one key in a server's ``statements.jsonl``.

    Raises:
        LedgerError: The file cannot be read.
    """
    try:
        lines = read_lines(path, LONGEST_LINE)
        statements = [read_statement(json.loads(line)["statement"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError, RecursionError, PrivacyError) as error:
        raise LedgerError(f"{path} cannot be read: {str(error)[:200]}") from error
    return tuple(each for each in statements if each.public_key == public_hex(key))


def check_statements(
    path: Path, chain: Chain, statements: Sequence[Statement], public_key: str
) -> Iterator[str]:
    """Yields the parts of a node's statements that its ledger does not confirm.

    Args:
        path: Path of the ledger.
        chain: The ledger's content.
        statements: Statements in the order in which the server received them.
        public_key: The ledger's public key (hexadecimal).
    """
    for statement in statements:
        yield from _check(path, chain, statement, public_key)
    for statement in {each.run: each for each in statements}.values():
        yield from _check_epsilon(chain, statement)


def check_received(
    run: str,
    names: Sequence[str],
    records: Sequence[RoundRecord],
    statements: Sequence[tuple[int, Statement]],
) -> Iterator[str]:
    """Yields the problems in a run's statements, with or without a ledger.

    Every update that a round used must be signed for by a different client; each client's statements
    belong to this run, and each continues the previous one; no two clients share a ledger. After a
    crash, there may be statements of one round that has no line in the round records.

    Args:
        run: Identifier of the run.
        names: Names of the run's clients.
        records: Records of the run's rounds.
        statements: (index of the client, statement), in the order in which the server received them.
    """
    if not records and not statements:
        yield "neither a round nor a statement is here: nothing shows what was spent"
    if [record.round for record in records] != list(range(1, len(records) + 1)):
        yield "rounds.jsonl does not hold every round once, in order"
    own: dict[int, list[Statement]] = {}
    for client, statement in statements:
        own.setdefault(client, []).append(statement)
        if statement.run != run:
            yield f"a statement is of another run, {statement.run[:80]!r}"
        elif statement.round > len(records) + 1:
            yield f"a statement is of round {statement.round}, and rounds.jsonl holds {len(records)}"
    for client in sorted(own.keys() - set(range(len(names)))):
        yield f"statements of client {client} are here, and the run has {len(names)} clients"
        del own[client]
    for client, each in sorted(own.items()):
        for earlier, later in pairwise(each):
            if not later.follows(earlier):
                yield (
                    f"{names[client]}: the statement of round {later.round} does not continue the one "
                    f"before it, of round {earlier.round}"
                )
    holders = Counter(ledger for each in own.values() for ledger in {s.ledger_id for s in each})
    for ledger in sorted(ledger for ledger, count in holders.items() if count > 1):
        yield f"{holders[ledger]} clients stated the same ledger, {ledger}"
    signed = Counter((each.round, client) for client, found in own.items() for each in found)
    for record in records:
        count = sum(number == record.round for number, _ in signed)
        if count < record.completed:
            yield (
                f"{record.completed} updates were used in round {record.round}, but {count} statements "
                f"are here"
            )


def _check(path: Path, chain: Chain, statement: Statement, public_key: str) -> Iterator[str]:
    """A statement's head must be in the ledger, and its release in a line of its run and round."""
    name = f"the statement of round {statement.round}"
    if statement.public_key != public_key:
        yield f"{name} is signed with another key, {statement.public_key}"
        return
    if chain.opening is None or statement.ledger_id != chain.opening.ledger_id:
        yield f"{name} is of another ledger, {statement.ledger_id}, under the same key"
        return
    try:
        check_head(path, chain, statement.index, statement.head_sha256)
    except LedgerError as error:
        yield f"{name}: {error}"
    if chain.root(statement.index + 1) != statement.root_sha256:
        yield f"{name} has another Merkle root than the ledger"
    lines = chain.entries[: statement.index + 1]
    charges = [entry.charge for entry in lines if entry.charge is not None]
    charged = Counter(charge.event for charge in charges if charge.run == statement.run)
    bare = sum(entry.unprotected is not None for entry in lines)
    same = charged == dict(statement.charged) and len(charges) == statement.charges
    same = same and bare == statement.unprotected
    if not same or statement.unit not in (NO_UNIT, chain.unit):
        yield f"{name} says other charges than the ledger"
    if (statement.run, statement.round, statement.release_sha256) not in _released(lines):
        yield f"{name} is for a release that the ledger does not hold"


def _released(lines: Sequence[Entry]) -> set[tuple[str, int, str | None]]:
    """Returns run, round and hash of every release in these lines, which begin a ledger."""
    found = set()
    for entry in lines:
        charge = None if entry.reserve is None else lines[entry.reserve].charge
        if charge is not None:
            found.add((charge.run, charge.round, entry.release_sha256))
        if entry.unprotected is not None:
            bare = entry.unprotected
            found.add((bare.run, bare.round, bare.release_sha256))
    return found


def _check_epsilon(chain: Chain, statement: Statement) -> Iterator[str]:
    """Checks that a statement's epsilon covers the whole ledger, over all runs, at its time."""
    lines = chain.entries[: statement.index + 1]
    events = [entry.charge.event for entry in lines if entry.charge is not None]
    is_lost = any(entry.unprotected is not None for entry in lines)
    honest, weaker = least_honest(events), 0.0
    try:
        spent = math.inf if is_lost else accounting.epsilon(events, statement.delta)
        if honest is not None:
            weaker = accounting.epsilon_if_all_collude(events, statement.delta)
    except PrivacyError as error:
        yield f"the statement of round {statement.round}: {error}"
        return
    if not within(spent, statement.epsilon):
        yield (
            f"the statement of round {statement.round} says epsilon={statement.epsilon:.3f}, and the "
            f"ledger cost {spent:.3f} until then"
        )
    if statement.honest_nodes != honest or (
        honest is not None and not within(weaker, statement.epsilon_if_all_collude or 0.0)
    ):
        yield (
            f"the statement of round {statement.round} says another assumption than the ledger, or "
            f"less epsilon without it"
        )
