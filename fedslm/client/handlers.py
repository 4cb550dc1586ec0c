"""Message handlers of a client: message in, training, reply out. They are the same on every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedslm
from fedslm.client.membership import answer_leg
from fedslm.client.node import FAILED, Node
from fedslm.client.personal import not_measured
from fedslm.client.private import answer_privately, check_affordable
from fedslm.client.round import ClientRound, admitted
from fedslm.client.update import make_update
from fedslm.errors import (
    BudgetExceeded,
    FederationError,
    FrozenMissing,
    NeedsTime,
    PolicyRefused,
    RolledBack,
)
from fedslm.privacy.lines import ADAPTER
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import MEASURE, Reply, Request, round_of
from fedslm.secagg.kept import KEYS

logger = logging.getLogger(__name__)


def hello(message: Message, context: Context) -> Message:
    """Answers with this client's index in the population and its version of fedslm."""
    values = ConfigRecord(
        {"client": int(context.node_config["partition-id"]), "version": fedslm.__version__}
    )
    return Message(RecordDict({"hello": values}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Trains for one round.

    Formal guarantees (under privacy):
        * Nothing is sent that the node's policy does not allow and that is not charged first: the
          charge is on disk before training starts. Policy and ledger refuse before a record is read: a
          refusal takes no time that depends on the records.
        * A reply contains noised tensors, a noised metric if one is allowed, a signed statement of what
          was charged, public hashes and public constants. A refusal states values of plan and policy;
          a failure is one fixed sentence.
        * At a deployed node a run keeps the records that it began with, so that neither a reply nor a
          refusal depends on records that are added or removed while it is running
          (:mod:`fedslm.client.kept_runs`).
        * The same request again gets the same bytes, free of charge, and no record is read for it.

    When a real node's reply leaves does not depend on how long this takes, if the policy says so
    (:mod:`fedslm.client.pace`).

    Without privacy, at a deployed node whose policy allows it:
        * Nothing is sent before the ledger has recorded it on disk as a release without privacy; the
          statement in the reply contains that record and an infinite epsilon. A failure of training is
          also such a release.
    """
    return _answered(message, context, _answer)


def secagg(message: Message, context: Context) -> Message:
    """Answers a leg of secure aggregation other than the one in which clients train.

    What it promises is in :func:`fedslm.client.membership.answer_leg`. A failure is one fixed sentence.
    """
    return _answered(message, context, _answer_leg)


def _answer_leg(client_round: ClientRound) -> Reply:
    """Answers a leg; a client that could not pay for the round takes no part in it from the start."""
    leg, plan = client_round.request.leg, client_round.plan
    if leg is not None and leg.name == KEYS and isinstance(plan, PrivatePlan):
        check_affordable(client_round, plan)
    return answer_leg(client_round)


def _answered(message: Message, context: Context, answer: Callable[[ClientRound], Reply]) -> Message:
    """Answers an admitted request; refusals and failures become replies."""
    round_number = 0
    try:
        round_number = round_of(message.content)
        request = Request.from_records(message.content)
        reply = answer(admitted(request, Node.of(context, request.setup.directory)))
        return Message(reply.to_records(request.packing), reply_to=message)
    except FrozenMissing as error:
        reply = Reply("needs-frozen", round_number, reason=str(error))
    except RolledBack as error:
        logger.error("round %d: %s", round_number, error)
        reply = Reply("rolled-back", round_number, reason=str(error))
    except (BudgetExceeded, PolicyRefused, FederationError) as error:  # these hold only public values
        return refusal(message, error)
    except Exception:  # boundary of the client: only a coarse status is sent
        logger.exception("the request could not be answered")
        reply = Reply("failed", round_number, reason=FAILED)
    return Message(reply.to_records(), reply_to=message)


def refusal(message: Message, error: PolicyRefused | BudgetExceeded | FederationError) -> Message:
    """The reply to a request that this node refuses, for a reason that contains only public values."""
    if message.metadata.message_type == MEASURE:
        return not_measured(message, error)
    number = round_of(message.content)
    logger.warning("round %d is refused: %s", number, error)
    if isinstance(error, NeedsTime):
        reply = Reply("needs-time", number, reason=str(error), answer_after_seconds=error.seconds)
    else:
        reply = Reply("refused", number, reason=str(error))
    return Message(reply.to_records(), reply_to=message)


def _answer(client_round: ClientRound) -> Reply:
    """Trains, privately or not."""
    setup, request, plan = client_round.setup, client_round.request, client_round.plan
    if isinstance(plan, PrivatePlan):
        return answer_privately(client_round, plan)
    node, ledger = client_round.node, client_round.node.open_ledger()
    if ledger is not None:
        ledger.extension(request.seen)
    client_round.prepare()  # a failure before the records are read is not a release
    with node.unprotected(plan, setup.run_id, request.round, ADAPTER) as record:
        examples = client_round.records(has_begun=False).trained
        release = make_update(client_round, examples)
        record(release.delta.sha256())
    weight = float(len(examples)) if setup.aggregation.weights == "records" else 1.0
    return client_round.reply(release, ledger=ledger, weight=weight)
