"""States of a run, round after round, as its directory keeps them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm import config as configuration
from fedslm.aggregation.server import ServerState
from fedslm.federation.checkpoint import Checkpoint, RunDirectory
from fedslm.privacy.chain import Chain
from fedslm.privacy.keys import public_hex
from fedslm.privacy.lines import ADAPTER, ADJACENCY, Charge, Entry, Opening
from fedslm.privacy.statement import Statement, signed
from fedslm.records import AdapterState, Event, RoundRecord

CONFIG = configuration.from_mapping(
    {
        "model": {"base": "demo"},
        "data": {"source": "demo"},
        "task": {"name": "classification"},
        "privacy": {"unit": "none", "passes": "isolated"},
    }
).resolved()
EVENT = Event(0.05, 1.25, 10)


def adapter(value: float) -> AdapterState:
    """An adapter that names its round."""
    return AdapterState({"a": np.full((2, 3), value, np.float32)})


def server(number: int) -> ServerState:
    """What aggregation carries after a round: from the second on with all that it may have."""
    if number < 2:
        return ServerState(adapter(number))
    rest = AdapterState({"m/a": np.full(3, number, np.float32)})
    return ServerState(adapter(number), number + 1, rest, adapter(-number), {"odd": 0.5, "even": 2.0})


def record(number: int) -> RoundRecord:
    """A round's line."""
    return RoundRecord(
        round=number,
        cohort=3,
        completed=2,
        failed=1,
        late=0,
        refused=0,
        kept=False,
        epsilon=0.5 * number,
        metrics={"accuracy": 0.1 * number},
        signal_to_noise=None,
        bytes_down=30,
        bytes_up=20,
        seconds=1.5,
        reasons=("client 1: TrainingError; see the client's log — ü",),
    )


@lru_cache
def statement(number: int) -> Statement:
    """What a node stated after a round."""
    key = Ed25519PrivateKey.from_private_bytes(b"0" * 32)
    ledger = Opening("1d" * 16, "data", "record", ADJACENCY, public_hex(key.public_key()))
    charge = Charge(EVENT, ADAPTER, 1.0, 1e-5, "run", 1, "p", "q", "b", "c", "0.1.0", "d")
    entries = (
        Entry(0, "", 0, opening=ledger),
        *(Entry(n + 1, "", 0, charge=charge) for n in range(number)),
    )
    return signed(
        key, Chain(entries, f"{number:064}", torn=False), run="run", round=number, release_sha256="a"
    )


def after(directory: RunDirectory, rounds: int) -> Checkpoint:
    """Saves the state before the first round, and then after each."""
    state = Checkpoint(0, server(0), {"accuracy": 0.0}, {"accuracy": 0.0})
    directory.save(state)
    for number in range(1, rounds + 1):
        statements = {0: statement(number), 11: statement(1)}
        changes: dict[str, Any] = {
            "server": server(number),
            "failed_in_row": 1,
            "statements": statements,
        }
        state = state.after(record(number), **changes)
        directory.save(state, record(number))
    return state


def assert_same(one: Checkpoint | None, other: Checkpoint) -> None:
    """Both hold the same, bit for bit."""
    assert one is not None
    for part in ("moving", "memory", "control"):
        assert getattr(one.server, part).sha256() == getattr(other.server, part).sha256()
    assert (one.server.turn, one.server.norms) == (other.server.turn, other.server.norms)
    for name in ("round", "metrics_before", "metrics", "failed_in_row", "statements"):
        assert getattr(one, name) == getattr(other, name)
