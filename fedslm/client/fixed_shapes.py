"""The public shapes of private passes that hold on this node: measured once, kept, withdrawn."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from fedslm.adapter_keys import delta_keys
from fedslm.aggregation.methods import trained_keys
from fedslm.attestations import Places, attested, keep, known
from fedslm.client.round import ClientRound
from fedslm.errors import RunError
from fedslm.privacy.plan import ClientPlan, PrivatePlan
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.setup import Setup

if TYPE_CHECKING:
    from fedslm.training.shapes import Shapes

logger = logging.getLogger(__name__)
_KIND, _WITHDRAWN = "bit-proof", "shapes-withdrawn"
_withdrawn_here: set[Places] = set()  # where a withdrawal could not be kept


def shapes_here(client_round: ClientRound) -> Shapes | None:
    """Returns the shapes that a round may use, and measures them if nothing is known about them here.

    Formal guarantees:
        * No record is read, and the answer depends on nothing in a data set.
        * A result counts only for this code, machine, base, precision, adapter and task, the same
          trained tensors, threads and CPU kernels (:mod:`fedslm.attestations`).
        * None if the plan shares no passes of public shapes, if the adapter carries remainders of
          aggregation, which were not measured, or if the result cannot be kept: the round is then
          isolated.
        * None after a pass of any round here did not repeat, whatever a server requests then, until the
          operator removes the file that says so.

    Args:
        client_round: An admitted request that the ledger allows.
    """
    from fedslm.training.shapes import Shapes
    from fedslm.verification.self_test import kernels

    setup, places = client_round.setup, client_round.node.attestations
    plan = setup.plan
    if not isinstance(plan, PrivatePlan) or isinstance(plan, ClientPlan) or plan.passes != "fixed":
        return None
    if delta_keys(client_round.start.adapter):
        logger.info("the adapter carries remainders of aggregation: each unit has its own pass")
        return None
    if places in _withdrawn_here or known(places, _WITHDRAWN, {}) is not None:
        logger.warning("a pass did not repeat here: each unit has its own pass")
        return None
    try:
        proved = _measured(setup, client_round.request.turn, places, kernels(setup.model.device))
    except RunError:
        logger.exception("the measured shapes cannot be kept: each unit has its own pass")
        return None
    return Shapes(proved, on_withdrawal=partial(_withdraw, places)) if proved else None


def _withdraw(places: Places) -> None:
    """Records that a pass did not repeat: this node uses no shapes until its operator removes the file.

    Whatever was measured under other settings is not trusted either: a server chooses the settings.
    """
    try:
        keep(places, _WITHDRAWN, {}, {})
    except RunError:
        _withdrawn_here.add(places)
        logger.exception("that the shapes are withdrawn cannot be kept; this process uses none")
    logger.error("delete %s-*.json in %s to use fixed shapes again", _WITHDRAWN, places[0])


@lru_cache(maxsize=8)
def _measured(setup: Setup, turn: int, places: Places, kernels: str) -> Mapping[int, tuple[int, ...]]:
    """Returns the numbers of slots for each padded length; looks them up once per process."""
    key = _key(setup, turn, kernels)
    asked = _Asked(json.dumps(key, sort_keys=True, allow_nan=False), setup, turn)
    found = attested(places, _KIND, key, lambda: _measure(asked))
    proved = {int(length): tuple(counts) for length, counts in found["shapes"].items()}
    if not proved:
        logger.warning("records share no passes on this machine: each unit has its own pass")
    return proved


@dataclass(frozen=True)
class _Asked:
    """What is to be measured; equal keys measure the same, whichever run needs it."""

    key: str
    setup: Setup = field(compare=False)
    turn: int = field(compare=False)


@lru_cache(maxsize=8)
def _measure(asked: _Asked) -> dict[str, Any]:
    """Runs the bit-proof with the model that is loaded for a setup, once per process and key."""
    from fedslm.verification.bit_proof import proved_shapes

    logger.info("the shapes of private passes are measured, once on this machine")
    setup, turn = asked.setup, asked.turn
    model = model_for(setup)
    shapes = proved_shapes(
        model,
        task_for(setup),
        frozenset(trained_keys(setup.method, model.adapter.parameters, turn)),
        setup.task.max_length,
        setup.training.micro_batch_size,
    )
    return {"shapes": {str(length): list(counts) for length, counts in shapes.proved.items()}}


def _key(setup: Setup, turn: int, kernels: str) -> dict[str, Any]:
    """Everything that the bits of a pass may depend on, besides code and machine."""
    model = model_for(setup)
    trained = trained_keys(setup.method, model.adapter.parameters, turn)
    tensors = [  # a head's shape depends on the number of classes
        [key, list(each.shape), key in trained] for key, each in model.adapter.parameters.items()
    ]
    return {
        "kernels": kernels,
        "base": setup.base_sha256,
        "model": setup.model.model_dump(mode="json"),
        "lora": setup.lora.model_dump(mode="json"),
        "task": setup.task.model_dump(mode="json"),
        "dtype": str(model.dtype),
        "tensors": hashlib.sha256(json.dumps(tensors, allow_nan=False).encode()).hexdigest(),
        "records": setup.training.micro_batch_size,
    }
