"""Where a client's round starts: what the server sent, the frozen tensors, and what the client kept."""

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
    """Where a client's round starts.

    Attributes:
        adapter: The whole adapter, at the client's rank: what is beyond it is zero.
        kept: What the client kept of earlier rounds.
    """

    adapter: AdapterState
    kept: Kept


def start_of(request: Request, node: Node) -> Start:
    """Puts together what the server sent, what is shared by hash, and what the client kept.

    Raises:
        FrozenMissing: This client lacks the frozen tensors that the server names.
        FederationError: One of them does not fit the others; nothing was charged yet.
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
    """What a client keeps from round to round of the request's run."""
    return ClientMemory(node.run_directory(request.setup.run_id, request.setup.plan))


def _fits(kept: AdapterState, adapter: AdapterState) -> bool:
    """Whether tensors that were kept have the shapes of the adapter's: numpy would stretch others."""
    shapes = adapter.shapes
    return all(shapes.get(key, shape) == shape for key, shape in kept.shapes.items())


def _frozen_of(request: Request, node: Node) -> AdapterState:
    """The shared frozen tensors, checked against the hash that the server names.

    A simulated client reads the run directory's; a deployed node keeps those that it was sent last.
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
    """Reads frozen tensors of a hash."""
    try:
        state = load_adapter(path)
    except RunError as error:
        raise FrozenMissing(_NO_FROZEN) from error
    if state.sha256() != sha256:
        raise FrozenMissing(_NO_FROZEN)
    return state
