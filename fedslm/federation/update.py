"""From a request to what is sent: the start at the client's rank, local training, and its difference.

Under privacy everything after local training reads noised values and public constants alone: it is
post-processing and costs nothing. What a client kept of earlier rounds is of the same run under the
same private plan, and so noised and charged as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from fedslm.aggregation.compression import compress, with_feedback
from fedslm.aggregation.methods import rank_of_client, sent_keys, trained_keys
from fedslm.aggregation.ranks import crop, pad
from fedslm.aggregation.rotation import rotated
from fedslm.errors import FederationError, RunError, TrainingError
from fedslm.federation.client_memory import ClientMemory, Kept
from fedslm.federation.node import Node, Release
from fedslm.federation.wire import Request
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.plan import Plan
from fedslm.records import AdapterState
from fedslm.rng import seed_of
from fedslm.storage import load_adapter, save_adapter
from fedslm.tasks import build
from fedslm.tasks.base import Example

_NOTHING = AdapterState({})
NO_FROZEN = "the frozen tensors here are not the server's"
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
        FederationError: One of them does not fit the others; nothing was charged yet.
    """
    setup = request.setup
    whole = _frozen_of(request, node).merged(request.adapter)
    rank = rank_of_client(setup.lora, node.client)
    if rank < setup.lora.rank:
        whole = pad(crop(whole, rank), whole)
    kept = ClientMemory(node.run_directory(setup.run_id, setup.plan)).before(request.round)
    adapter = whole.merged(kept.local)
    sent = crop(adapter.select(set(kept.error) & set(adapter)), rank)
    if not (_fits(kept.control, adapter) and _fits(kept.error, sent)):
        raise FederationError(NOT_FITTING)
    return Start(adapter, kept)


def _fits(kept: AdapterState, adapter: AdapterState) -> bool:
    """Whether tensors that were kept have the shapes of the adapter's: numpy would stretch others."""
    shapes = adapter.shapes
    return all(shapes.get(key, shape) == shape for key, shape in kept.shapes.items())


def make_update(
    request: Request, node: Node, plan: Plan, model: LoadedModel, examples: Sequence[Example]
) -> Release:
    """Trains on a client's examples and gives what is sent.

    Raises:
        TrainingError: A self-check failed, or training diverged.
    """
    setup, start = request.setup, start_of(request, node)
    after = _trained(request, node, plan, model, examples=examples, start=start)
    sent = sent_keys(setup.method, after, request.turn)
    local = start.kept.local.merged(after.select(set(after) - sent))
    control = _control(request, plan, start, after)
    if setup.method == "fedrot":
        turned = rotated(
            start.adapter.merged(after),
            request.adapter,
            request.turn,
            setup.aggregation.rotation_strength,
        )
        after = turned.select(set(after))
    rank = rank_of_client(setup.lora, node.client)
    delta, error = _compressed(
        request, node, crop(after.select(sent).minus(start.adapter), rank), start.kept.error
    )
    kept = Kept(
        local,
        start.kept.control.plus(control) if start.kept.control else control,
        start.kept.error.merged(error),  # RoLoRA's other factor keeps its own
    )
    ClientMemory(node.run_directory(setup.run_id, setup.plan)).keep(request.round, kept)
    return Release(delta)


def _trained(
    request: Request,
    node: Node,
    plan: Plan,
    model: LoadedModel,
    *,
    examples: Sequence[Example],
    start: Start,
) -> AdapterState:
    """The trained tensors, as the model holds them."""
    from fedslm.training.local import LocalWork, train

    setup = request.setup
    trained = trained_keys(setup.method, start.adapter, request.turn)
    correction = _NOTHING
    if request.control:
        mine = start.kept.control
        correction = request.control.minus(mine) if mine else request.control
    work = LocalWork(
        start.adapter, trained, setup.seed, request.round, node.client, correction=correction
    )
    task = build(setup.task, setup.data, setup.labels)
    after = train(model, task, examples, plan, setup.training, work)
    if after.sha256() != model.adapter.read(sorted(trained)).sha256():
        raise TrainingError("what will be sent is not what the model holds")
    return after


def _control(request: Request, plan: Plan, start: Start, after: AdapterState) -> AdapterState:
    """SCAFFOLD: how far the client's control variate moves (Karimireddy et al. 2020, option II)."""
    if not request.control:
        return _NOTHING
    scale = np.float32(1 / (plan.steps_per_round * request.setup.training.learning_rate))
    return AdapterState(
        {
            key: (start.adapter[key] - after[key]) * scale - request.control[key]
            for key in request.control
        }
    )


def _compressed(
    request: Request, node: Node, delta: AdapterState, error: AdapterState
) -> tuple[AdapterState, AdapterState]:
    """What of a difference the wire can carry, and what is left for the next round."""
    setup = request.setup
    if request.packing.is_whole:
        return delta, _NOTHING
    feedback = setup.compression.error_feedback
    seed = seed_of(setup.seed, "rounding", request.round, node.client)
    wanted = with_feedback(delta, error) if feedback else delta
    sent = compress(wanted, request.packing, np.random.default_rng(seed), unbiased=not feedback)
    return sent, wanted.minus(sent) if feedback else _NOTHING


def _frozen_of(request: Request, node: Node) -> AdapterState:
    """The shared frozen tensors, checked against the hash that the server names.

    A simulated client reads the run directory's; a deployed node keeps those that it was sent last.
    """
    sha256 = request.setup.frozen_sha256
    if not node.deployed:
        return _frozen(Path(request.setup.directory) / "frozen.safetensors", sha256)
    if sha256 == _NOTHING.sha256():
        return _NOTHING
    kept = node.directory / "frozen.safetensors"
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
        raise FederationError(NO_FROZEN) from error
    if state.sha256() != sha256:
        raise FederationError(NO_FROZEN)
    return state
