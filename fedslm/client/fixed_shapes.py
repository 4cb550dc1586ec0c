"""The public shapes of private passes that hold on this node: measured once, kept, withdrawn."""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fedslm.adapter_keys import delta_keys
from fedslm.aggregation.methods import trained_keys
from fedslm.attestations import Places, attested, keep
from fedslm.client.round import ClientRound
from fedslm.errors import RunError
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.setup import Setup

if TYPE_CHECKING:
    from fedslm.training.shapes import Shapes

logger = logging.getLogger(__name__)
_KIND = "bit-proof"


def shapes_here(client_round: ClientRound) -> Shapes | None:
    """Returns the shapes that a round may use, and measures them if nothing is known about them here.

    Formal guarantees:
        * No record is read, and the answer depends on nothing in a data set.
        * A result counts only for this code, machine, base, precision, adapter and task, the same
          trained tensors, threads and CPU kernels (:mod:`fedslm.attestations`).
        * None if the plan shares no passes of public shapes, if the adapter carries remainders of
          aggregation, which were not measured, or if the result cannot be kept: the round is then
          isolated.

    Args:
        client_round: An admitted request.
    """
    setup = client_round.setup
    if not isinstance(setup.plan, PrivatePlan) or setup.plan.passes != "fixed":
        return None
    if delta_keys(client_round.start.adapter):
        logger.info("the adapter carries remainders of aggregation: each unit has its own pass")
        return None
    try:
        shapes = _measured(setup, client_round.request.turn, client_round.node.attestations)
        return shapes if shapes.proved and not shapes.withdrawn else None
    except RunError:
        logger.exception("the measured shapes cannot be kept: each unit has its own pass")
        return None


def withdraw(client_round: ClientRound) -> None:
    """Records that a pass did not repeat: this node uses no shapes until its operator removes the file.

    Args:
        client_round: The round in which it happened.
    """
    setup, places = client_round.setup, client_round.node.attestations
    try:
        keep(places, _KIND, _key(setup, client_round.request.turn), {"shapes": {}, "withdrawn": True})
    except RunError:
        logger.exception("that the shapes are withdrawn cannot be kept; this process uses none")
    logger.error("delete %s-*.json in %s to measure the shapes again", _KIND, places[0])


@lru_cache(maxsize=8)
def _measured(setup: Setup, turn: int, places: Places) -> Shapes:
    """Returns the shapes for a setup, once per process: a withdrawal holds for every later round."""
    from fedslm.training.shapes import Shapes

    found = attested(places, _KIND, _key(setup, turn), lambda: _measure(setup, turn))
    proved = {int(length): tuple(counts) for length, counts in found["shapes"].items()}
    if not proved:
        logger.warning("records share no passes on this machine: each unit has its own pass")
    return Shapes(proved, withdrawn=bool(found["withdrawn"]))


def _measure(setup: Setup, turn: int) -> dict[str, Any]:
    """Runs the bit-proof with the model that is loaded for a setup."""
    from fedslm.verification.bit_proof import proved_shapes

    logger.info("the shapes of private passes are measured, once on this machine")
    model = model_for(setup)
    shapes = proved_shapes(
        model,
        task_for(setup),
        frozenset(trained_keys(setup.method, model.adapter.parameters, turn)),
        setup.task.max_length,
        setup.training.micro_batch_size,
    )
    return {
        "shapes": {str(length): list(counts) for length, counts in shapes.proved.items()},
        "withdrawn": False,
    }


def _key(setup: Setup, turn: int) -> dict[str, Any]:
    """Everything that the bits of a pass may depend on, besides code and machine."""
    from fedslm.verification.self_test import kernels

    model = model_for(setup)
    trained = sorted(trained_keys(setup.method, model.adapter.parameters, turn))
    return {
        "kernels": kernels(setup.model.device),
        "base": setup.base_sha256,
        "model": setup.model.model_dump(mode="json"),
        "lora": setup.lora.model_dump(mode="json"),
        "task": setup.task.model_dump(mode="json"),
        "dtype": str(model.dtype),
        "trained": hashlib.sha256("\0".join(trained).encode()).hexdigest(),
        "records": setup.training.micro_batch_size,
    }
