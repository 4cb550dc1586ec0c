"""Checks of replies at the server: a reply that is not exactly right is failed, never a zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flwr.app import Message

from fedslm.aggregation.methods import rank_of_client, sent_keys
from fedslm.aggregation.ranks import crop
from fedslm.aggregation.summed import num_values
from fedslm.errors import FedslmError
from fedslm.privacy import accounting
from fedslm.privacy.encoding import words_sha256
from fedslm.privacy.plan import Plan, PrivatePlan
from fedslm.privacy.statement import Statement, read_statement
from fedslm.protocol.bounds import cut
from fedslm.protocol.messages import Reply, Request
from fedslm.records import within

_LARGEST_VALUE = 1e4
_LARGEST_WEIGHT = 2**31
_ANOTHER_HASH = "the update does not match its hash"


def checked(message: Message, request: Request, client: int) -> Reply | str:
    """Checks one reply; one that is not exactly right counts as failed, never as zero.

    Args:
        message: The reply.
        request: The server's request.
        client: Index of the client that was asked.

    Returns:
        The reply, or the reason why it cannot be used.
    """
    if message.has_error():
        return cut(f"error {message.error.code}: {message.error.reason}")
    shapes = expected_shapes(request, client)
    try:
        reply = Reply.from_records(message.content, request.packing, shapes)
    except FedslmError as error:
        return str(error)
    if reply.status != "ok":
        return replace(reply, delta=None, words=None, statement="", metric=None)
    if (problem := _problem_of_statement(request.setup.plan, request, reply)) is not None:
        return problem
    if (problem := _problem_of_values(request.setup.plan, reply, shapes)) is not None:
        return problem
    if reply.round != request.round:
        return f"the update is for round {reply.round}"
    if reply.base_sha256 != request.setup.base_sha256:
        return "the update was trained on another base model"
    largest = 1 if request.setup.aggregation.weights == "uniform" else _LARGEST_WEIGHT
    if not (1 <= reply.weight <= largest and reply.weight == int(reply.weight)):
        return f"weight={reply.weight} is not allowed"
    return reply


def _problem_of_values(plan: Plan, reply: Reply, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why a reply's update, or its part of a sum, cannot be used; None if it can."""
    delta, words = reply.delta, reply.words
    if isinstance(plan, PrivatePlan) and plan.shares is not None:
        size = num_values(shapes)
        if words is None or words.size != size:
            return f"the reply has no part of the sum of {size} values"
        return None if words_sha256(words) == reply.delta_sha256 else _ANOTHER_HASH
    if delta is None or delta.shapes != shapes:
        return "the update has tensors or shapes that differ from the request"
    if not delta.is_finite():
        return "the update contains NaN or infinity"
    if delta.largest() > _LARGEST_VALUE:
        return f"the update contains values beyond {_LARGEST_VALUE:g}"
    return None if delta.sha256() == reply.delta_sha256 else _ANOTHER_HASH


def expected_shapes(request: Request, client: int) -> dict[str, tuple[int, ...]]:
    """The tensors that a client must send: those of its method and turn, at its own rank."""
    setup = request.setup
    sent = sent_keys(setup.method, request.adapter, request.turn)
    return crop(request.adapter.select(sent), rank_of_client(setup.lora, client)).shapes


def _problem_of_statement(plan: Plan, request: Request, reply: Reply) -> str | None:
    """Why a reply's spend statement cannot be right; None if it can."""
    metric = plan.metric_event if isinstance(plan, PrivatePlan) else None
    if (reply.metric is None) != (metric is None):
        return "the reply has another metric than the plan"
    if not isinstance(plan, PrivatePlan) and not reply.statement:
        return None  # in a simulation, which keeps no ledger without privacy
    try:
        statement = read_statement(reply.statement)
    except FedslmError as error:
        return str(error)
    unit = plan.unit if isinstance(plan, PrivatePlan) else statement.unit
    asked = (request.setup.run_id, request.round, unit, reply.delta_sha256)
    if (statement.run, statement.round, statement.unit, statement.release_sha256) != asked:
        return "the spend statement is for another release"
    if not isinstance(plan, PrivatePlan):
        honest = not statement.charged and statement.unprotected > 0
        return None if honest else "the reply states charges that this plan does not make"
    charged = dict(statement.charged)
    if not set(plan.round_events) >= set(charged):
        return "the spend statement has charges that this plan does not make"
    counts = [charged.get(event, 0) for event in plan.round_events]
    if max(counts) > plan.rounds:
        return "the spend statement has fewer or more charges than the plan allows"
    try:
        spent = accounting.epsilon(statement.events, plan.delta)
        allowed = min(counts) >= 1 and within(spent, plan.epsilon)
        if not (statement.delta == plan.delta and within(spent, statement.epsilon)):
            return "the spend statement has another delta, or less epsilon in all than in this run"
    except FedslmError as error:
        return str(error)
    return None if allowed else "the spend statement has fewer or more charges than the plan allows"


def continued(reply: Reply, statements: dict[int, Statement], client: int) -> Reply | str:
    """Records a client's statement; a statement that does not continue its ledger is not used."""
    statement, earlier = read_statement(reply.statement), statements.get(client)
    if earlier is not None and not statement.follows(earlier):
        return "the spend statement does not extend this client's ledger: it was rolled back"
    statements[client] = statement
    return reply
