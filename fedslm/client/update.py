"""From the start of a round to the update: local training, compression, and the difference.

Under privacy everything after local training reads only noised values and public constants: it is
post-processing and costs nothing. The client's state from earlier rounds belongs to the same run under
the same private plan, and so it was noised and charged as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedslm.aggregation.compression import compress, with_feedback
from fedslm.aggregation.methods import rank_of_client, sent_keys, trained_keys
from fedslm.aggregation.ranks import crop
from fedslm.aggregation.rotation import rotated
from fedslm.client.memory import Kept
from fedslm.client.node import Release
from fedslm.client.round import ClientRound
from fedslm.errors import PolicyRefused, TrainingError
from fedslm.privacy.plan import ClientPlan, PrivatePlan
from fedslm.records import AdapterState
from fedslm.rng import seed_of
from fedslm.tasks.base import Example

if TYPE_CHECKING:
    from fedslm.training.shapes import Shapes

_NOTHING = AdapterState({})


def make_update(
    client_round: ClientRound, examples: Sequence[Example], shapes: Shapes | None = None
) -> Release:
    """Trains on a client's examples and returns the release.

    Args:
        client_round: An admitted request.
        examples: The client's examples.
        shapes: The public shapes that were measured here.

    Raises:
        TrainingError: A self-check failed, or training diverged.
    """
    request, setup, start = client_round.request, client_round.setup, client_round.start
    after = _trained(client_round, examples, shapes)
    sent = sent_keys(setup.method, after, request.turn)
    local = start.kept.local.merged(after.select(set(after) - sent))
    control = _control(client_round, after)
    if setup.method == "fedrot":
        whole, strength = start.adapter.merged(after), setup.aggregation.rotation_strength
        after = rotated(whole, request.adapter, request.turn, strength).select(set(after))
    rank = rank_of_client(setup.lora, client_round.node.client)
    difference = crop(after.select(sent).minus(start.adapter), rank)
    delta, error = _compressed(client_round, difference)
    kept = Kept(
        local,
        start.kept.control.plus(control) if start.kept.control else control,
        start.kept.error.merged(error),  # the compression error of RoLoRA's other factor is kept
    )
    client_round.memory.keep(request.round, kept)
    return Release(delta)


def make_share(
    client_round: ClientRound, examples: Sequence[Example], shapes: Shapes | None = None
) -> Release:
    """Returns a client's part of a sum over clients, with its share of the noise.

    Args:
        client_round: An admitted request, whose plan shares the noise.
        examples: The client's examples.
        shapes: The public shapes that were measured here.

    Raises:
        PolicyRefused: The plan shares no noise.
        TrainingError: A self-check failed.
    """
    from fedslm.training.local import LocalWork, share_of_sum
    from fedslm.training.whole_update import share_of_update

    request, setup, plan = client_round.request, client_round.setup, client_round.plan
    if not isinstance(plan, PrivatePlan):
        raise PolicyRefused("only a private plan shares noise")
    start = client_round.start.adapter
    trained = trained_keys(setup.method, start, request.turn)
    work = LocalWork(start, trained, setup.seed, request.round, client_round.node.client, shapes=shapes)
    model = client_round.model
    if isinstance(plan, ClientPlan):
        words = share_of_update(model, client_round.task, examples, plan, setup.training, work)
    else:
        words = share_of_sum(model, client_round.task, examples, plan, setup.training, work)
    return Release(_NOTHING, words=words)


def _trained(
    client_round: ClientRound, examples: Sequence[Example], shapes: Shapes | None
) -> AdapterState:
    """The trained tensors, as stored in the model."""
    from fedslm.training.local import LocalWork, train

    request, setup, start = client_round.request, client_round.setup, client_round.start
    trained = trained_keys(setup.method, start.adapter, request.turn)
    correction = _NOTHING
    if request.control:
        mine = start.kept.control
        correction = request.control.minus(mine) if mine else request.control
    client = client_round.node.client
    work = LocalWork(
        start.adapter, trained, setup.seed, request.round, client, correction=correction, shapes=shapes
    )
    model = client_round.model
    after = train(model, client_round.task, examples, setup.plan, setup.training, work)
    if after.sha256() != model.adapter.read(sorted(trained)).sha256():
        raise TrainingError("what will be sent is not what the model holds")
    return after


def _control(client_round: ClientRound, after: AdapterState) -> AdapterState:
    """SCAFFOLD: the change of the client's control variate (Karimireddy et al. 2020, option II).

    c_i' - c_i = (x - y_i) / (K η) - c: start x, end y_i, K local steps, rate η, server's variate c.
    """
    request, setup, start = client_round.request, client_round.setup, client_round.start
    if not request.control:
        return _NOTHING
    scale = np.float32(1 / (setup.plan.steps_per_round * setup.training.learning_rate))
    return AdapterState(
        {
            key: (start.adapter[key] - after[key]) * scale - request.control[key]
            for key in request.control
        }
    )


def _compressed(client_round: ClientRound, delta: AdapterState) -> tuple[AdapterState, AdapterState]:
    """The part of a difference that compression transmits, and the rest for the next round."""
    request, setup = client_round.request, client_round.setup
    if request.packing.is_whole:
        return delta, _NOTHING
    feedback = setup.compression.error_feedback
    seed = seed_of(setup.seed, "rounding", request.round, client_round.node.client)
    wanted = with_feedback(delta, client_round.start.kept.error) if feedback else delta
    sent = compress(wanted, request.packing, np.random.default_rng(seed), unbiased=not feedback)
    return sent, wanted.minus(sent) if feedback else _NOTHING
