"""The start of a client's round: the server's tensors, the frozen tensors, and the client's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fedslm import layout
from fedslm.aggregation.methods import rank_of_client
from fedslm.aggregation.ranks import crop, pad
from fedslm.client.memory import ClientMemory, Kept
from fedslm.client.node import Node
from fedslm.errors import FederationError, FrozenMissing, RunError
from fedslm.protocol.messages import Request
from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter

_NOTHING = AdapterState({})
_NO_FROZEN = "the frozen tensors here are not the server's"
NOT_FITTING = (
    "what this client kept of the run's earlier rounds does not fit the adapter that is asked for"
)


@dataclass(frozen=True)
class Start:
    """The state from which a client's round starts.

    Attributes:
        adapter: The whole adapter, at the client's rank: entries beyond it are zero.
        kept: The tensors that the client kept from earlier rounds.
    """

    adapter: AdapterState
    kept: Kept


def start_of(request: Request, node: Node) -> Start:
    """Combines the server's tensors, the frozen ones shared by hash, and the client's own.

    Raises:
        FrozenMissing: This client lacks the frozen tensors that the server requires.
        FederationError: Some tensors do not fit the others; nothing was charged yet.
    """
    setup = request.setup
    whole = _frozen_of(request, node).merged(request.adapter)
    rank = rank_of_client(setup.lora, node.client)
    if rank < setup.lora.rank:
        whole = pad(crop(whole, rank), whole)
    kept = memory_of(request, node).before(request.round)
    adapter = whole.merged(kept.local)
    sent = crop(adapter.select(set(kept.error) & set(adapter)), rank)
    if not (_fits(kept.control, adapter) and _fits(kept.error, sent)):
        raise FederationError(NOT_FITTING)
    return Start(adapter, kept)


def memory_of(request: Request, node: Node) -> ClientMemory:
    """The client's state between rounds, for the request's run."""
    return ClientMemory(node.run_directory(request.setup.run_id, request.setup.plan))


def _fits(kept: AdapterState, adapter: AdapterState) -> bool:
    """Whether kept tensors have exactly the adapter's shapes: numpy would broadcast others."""
    shapes = adapter.shapes
    return all(shapes.get(key, shape) == shape for key, shape in kept.shapes.items())


def _frozen_of(request: Request, node: Node) -> AdapterState:
    """The shared frozen tensors, checked against the hash that the server sent.

    A simulated client reads those of the run directory; a deployed node keeps those that it last
    received.
    """
    sha256 = request.setup.frozen_sha256
    if not node.deployed:
        return _frozen(Path(request.setup.directory) / layout.FROZEN, sha256)
    if sha256 == _NOTHING.sha256():
        return _NOTHING
    kept = node.directory / layout.FROZEN
    if request.frozen:
        if request.frozen.sha256() != sha256:
            raise FederationError("the frozen tensors that came are not those that the server names")
        save_adapter(kept, request.frozen)
    return _frozen(kept, sha256)


@lru_cache(maxsize=2)
def _frozen(path: Path, sha256: str) -> AdapterState:
    """Reads the frozen tensors with a given hash."""
    try:
        state = load_adapter(path)
    except RunError as error:
        raise FrozenMissing(_NO_FROZEN) from error
    if state.sha256() != sha256:
        raise FrozenMissing(_NO_FROZEN)
    return state
