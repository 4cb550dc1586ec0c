"""A client: message in, training, message out. The same functions run on every engine."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import lru_cache

from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedslm
from fedslm.aggregation.methods import trained_keys
from fedslm.data.columns import needed
from fedslm.data.shards import declared_columns
from fedslm.errors import BudgetExceeded, FederationError, PolicyRefused, PrivacyError, RolledBack
from fedslm.factors import delta_keys, key_of, layers_of
from fedslm.federation.attestation import attest
from fedslm.federation.kept_runs import forget_records, with_own_records
from fedslm.federation.loading import model_for
from fedslm.federation.node import FAILED, Node, Release
from fedslm.federation.shard import shard_of
from fedslm.federation.update import make_update, start_of
from fedslm.federation.wire import Reply, Request, Setup
from fedslm.models.base import base_sha256, resolve
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.lines import ADAPTER, METRIC, Charge
from fedslm.privacy.plan import (
    METRIC_SENSITIVITY,
    ExamplePlan,
    NoPrivacy,
    PatientPlan,
    Plan,
    PrivatePlan,
    from_json,
)
from fedslm.privacy.policy import Asked
from fedslm.records import AdapterState
from fedslm.tasks import build

logger = logging.getLogger(__name__)


def hello(message: Message, context: Context) -> Message:
    """Answers who this client is: its index in the population and its version of fedslm."""
    values = ConfigRecord(
        {"client": int(context.node_config["partition-id"]), "version": fedslm.__version__}
    )
    return Message(RecordDict({"hello": values}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Trains for one round.

    Formal guarantees (under privacy):
        * Nothing leaves that the node's policy does not allow and that is not charged first: the charge
          is on disk before training starts. What policy or ledger refuse, they refuse before a record
          is read: a refusal takes no time that depends on the records.
        * A reply holds noised tensors, a noised metric if one is allowed, a signed statement of what
          was charged, public hashes and public constants. A refusal states values of plan and policy;
          a failure is one fixed sentence.
        * A run keeps the records that it began with at a deployed node, so that neither a reply nor a
          refusal depends on records that come and go while it is under way
          (:mod:`fedslm.federation.kept_runs`).
        * The same request again gets the same bytes, free of charge, and no record is read for it.

    Without privacy, at a deployed node whose policy allows it:
        * Nothing leaves before the ledger has it on disk as a release without privacy; the statement in
          the reply says so, and that epsilon is infinite. That training failed is such a release, too.
    """
    round_number = 0
    try:
        request = Request.from_records(message.content)
        round_number = request.round
        reply = _answer(request, Node.of(context, request.setup.directory))
        return Message(reply.to_records(request.packing), reply_to=message)
    except RolledBack as error:
        logger.error("round %d: %s", round_number, error)
        reply = Reply("rolled-back", round_number, reason=str(error))
    except (BudgetExceeded, PolicyRefused, FederationError) as error:  # these hold public values only
        logger.warning("round %d is refused: %s", round_number, error)
        reply = Reply("refused", round_number, reason=str(error))
    except Exception:  # the edge of the client: a coarse status leaves, details stay here
        logger.exception("training failed")
        reply = Reply("failed", round_number, reason=FAILED)
    return Message(reply.to_records(), reply_to=message)


def admitted(request: Request, node: Node) -> ExamplePlan | PatientPlan | NoPrivacy:
    """Holds a request against this node before any of the base's files is interpreted.

    Returns:
        The plan.

    Raises:
        PolicyRefused: The policy does not allow it, or the plan is none.
        FederationError: Another version of fedslm, or another base model.
    """
    setup = request.setup
    if setup.version != fedslm.__version__:
        raise FederationError(f"server runs {setup.version}, this client {fedslm.__version__}")
    try:
        plan = from_json(setup.plan)
    except PrivacyError as error:
        raise PolicyRefused(f"the plan is refused: {error}") from error
    node.admit(Asked(plan, setup.base_sha256, setup.task.name, setup.model.base))
    if (
        base_sha256(resolve(setup.model, may_fetch=node.may_fetch(setup.model.base)))
        != setup.base_sha256
    ):
        raise FederationError("the base model here differs from the server's")
    _check_columns(request, node, plan)
    return plan


def _check_columns(request: Request, node: Node, plan: Plan) -> None:
    """Refuses a run that needs a column which this node's operator does not declare.

    What the records themselves have is not looked at: one record may bring a column.
    """
    declared = declared_columns(node.data)
    if declared is None:
        return
    wanted = set(needed(request.setup.data, request.setup.task).values())
    if isinstance(plan, PatientPlan):
        wanted.add(plan.unit_column)
    if missing := sorted(wanted - declared):
        raise FederationError(
            f"this node has no column {missing[0][:80]!r}; it declares {', '.join(sorted(declared))}"
        )


def _answer(request: Request, node: Node) -> Reply:
    """Checks a request and trains, privately or not."""
    setup, plan = request.setup, admitted(request, node)
    model = model_for(setup)
    if isinstance(plan, PrivatePlan):
        return _answer_privately(request, node, plan, model)
    ledger = node.open_ledger()
    if ledger is not None:
        ledger.extension(request.seen)
    with node.unprotected(plan, setup.run_id, request.round, ADAPTER) as record:
        node = with_own_records(setup, node, has_begun=False)
        examples = shard_of(setup, node).trained
        release = make_update(request, node, plan, model, examples)
        record(release.delta.sha256())
    weight = float(len(examples)) if setup.aggregation.weights == "records" else 1.0
    return _reply(request, model, release, ledger=ledger, weight=weight)


def _answer_privately(
    request: Request, node: Node, plan: ExamplePlan | PatientPlan, model: LoadedModel
) -> Reply:
    """Charges, trains, keeps the release for a repeated request, and answers."""
    from fedslm.training.checks import check_private_model

    _verify(plan)
    ledger = node.ledger(plan.unit)
    ledger.extension(request.seen)  # before anything is charged: a ledger that lost lines takes no more
    again = node.kept(ledger.released(_request_sha256(request)))
    if again is not None:
        return _reply(request, model, again, ledger=ledger)
    if request.control:
        raise PolicyRefused("control variates are refused under privacy")
    if request.setup.lora.dropout > 0:
        raise PolicyRefused("LoRA dropout couples the records of a batch; it must be 0 under privacy")
    check_private_model(model.adapter.network)
    _check_adapter(start_of(request, node).adapter, model)
    _rehearsed(request.setup)
    attest(node.directory if node.deployed else node.directory.parent)
    charged = _rounds_charged(request, ledger, plan)
    charges, limits = _charges(request, plan), node.limits(plan)
    ledger.check(charges, limits)  # before a record is read: the time of a refusal tells nothing
    node = with_own_records(request.setup, node, has_begun=charged > 0)
    shard = shard_of(request.setup, node)
    charges = [replace(charge, dataset_commitment=shard.commitment) for charge in charges]
    reserved = ledger.reserve(charges, limits)
    release = make_update(request, node, plan, model, shard.trained)
    if plan.metric_event is not None:
        release = replace(release, metric=_metric(request, node, plan, model))
    node.keep(release)
    for index, charge in zip(reserved, charges, strict=True):
        ledger.commit(index, release.hashes()[charge.purpose])
    if charged + 1 == plan.rounds:
        forget_records(request.setup, node)
    return _reply(request, model, release, ledger=ledger)


def _rounds_charged(request: Request, ledger: Ledger, plan: PrivatePlan) -> int:
    """How many rounds this run was charged for under its plan so far.

    Raises:
        BudgetExceeded: All that the plan pays for.
    """
    of_run = (request.setup.run_id, _plan_sha256(request.setup), ADAPTER)
    charged = sum(
        (charge.run, charge.plan_sha256, charge.purpose) == of_run for charge in ledger.read().charges
    )
    if charged >= plan.rounds:
        raise BudgetExceeded(
            f"budget exhausted: this run was charged for {charged} rounds here, and its plan pays for "
            f"{plan.rounds}"
        )
    return charged


def _check_adapter(whole: AdapterState, model: LoadedModel) -> None:
    """Refuses tensors that do not fit the model before anything is charged for them."""
    fitting = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    own = whole.select(set(whole) - delta_keys(whole))
    if own.shapes != fitting or not whole.is_finite() or not _deltas_fit(whole):
        raise FederationError("the adapter does not fit the model here, or is not finite")


def _deltas_fit(whole: AdapterState) -> bool:
    """True if what aggregation put aside has the layers' own widths, and both factors."""
    shapes, layers = whole.shapes, set(layers_of(whole))
    if {key.rsplit(".", 2)[0] for key in delta_keys(whole)} - layers:
        return False
    for layer in layers:
        right, left = shapes.get(key_of(layer, "delta_A")), shapes.get(key_of(layer, "delta_B"))
        width, height = shapes[key_of(layer, "lora_A")][1], shapes[key_of(layer, "lora_B")][0]
        if (right, left) == (None, None):
            continue
        if right is None or left is None or len(right) != 2 or len(left) != 2:
            return False
        if (right[1], left[0], right[0]) != (width, height, left[1]) or right[0] > min(width, height):
            return False
    return True


@lru_cache(maxsize=8)
def _rehearsed(setup: Setup) -> None:
    """Rehearses with the model that is loaded for a setup, once per process."""
    from fedslm.training.local import rehearse

    model = model_for(setup)
    plan, task = from_json(setup.plan), build(setup.task, setup.data, setup.labels)
    if isinstance(plan, PrivatePlan):
        for turn in (1, 2):
            rehearse(model, task, plan, trained_keys(setup.method, model.adapter.parameters, turn))


@lru_cache(maxsize=8)
def _verify(plan: ExamplePlan | PatientPlan) -> None:
    """Holds the server's claim against this node's own accountants.

    Raises:
        PolicyRefused: The plan costs more than it says, or the accountants disagree.
    """
    try:
        plan.verify()
    except PrivacyError as error:
        raise PolicyRefused(f"the plan is refused: {error}") from error


def _charges(request: Request, plan: ExamplePlan | PatientPlan) -> list[Charge]:
    """What a round costs, and everything that it is bound to, but for the records."""
    setup = request.setup
    training = Charge(
        event=plan.training_event,
        purpose=ADAPTER,
        clip_norm=plan.clip_norm,
        delta=plan.delta,
        run=setup.run_id,
        round=request.round,
        plan_sha256=_plan_sha256(setup),
        request_sha256=_request_sha256(request),
        base_sha256=setup.base_sha256,
        config_sha256=setup.config_sha256,
        code_version=fedslm.__version__,
        dataset_commitment="",
        unit=plan.unit,
        unit_column=plan.unit_column if isinstance(plan, PatientPlan) else None,
        max_records_per_unit=plan.max_records_per_unit if isinstance(plan, PatientPlan) else None,
        normaliser=plan.normaliser,
    )
    metric = plan.metric_event
    if metric is None:
        return [training]
    return [
        training,
        replace(training, event=metric, purpose=METRIC, clip_norm=METRIC_SENSITIVITY),
    ]


def _plan_sha256(setup: Setup) -> str:
    """Names a plan in the ledger."""
    return hashlib.sha256(setup.plan.encode()).hexdigest()


def _metric(
    request: Request, node: Node, plan: ExamplePlan | PatientPlan, model: LoadedModel
) -> tuple[float, float]:
    """How right the server's adapter is on the client's own (or held-out) records, with noise."""
    from fedslm.training.metric import noisy_metric

    setup = request.setup
    task, start = build(setup.task, setup.data, setup.labels), start_of(request, node).adapter
    return noisy_metric(model, task, shard_of(setup, node).measured, start, plan)


def _reply(
    request: Request,
    model: LoadedModel,
    release: Release,
    *,
    ledger: Ledger | None = None,
    weight: float = 1.0,
) -> Reply:
    """A reply with everything that the server checks."""
    delta_sha256 = release.delta.sha256()
    run, number = request.setup.run_id, request.round
    return Reply(
        "ok",
        number,
        delta=release.delta,
        delta_sha256=delta_sha256,
        base_sha256=model.base_sha256,
        weight=weight,
        statement="" if ledger is None else ledger.statement(run, number, delta_sha256).to_json(),
        extension=() if ledger is None else tuple(map(tuple, ledger.extension(request.seen))),
        metric=release.metric,
    )


def _request_sha256(request: Request) -> str:
    """Names a request: the same run, round, plan and starting adapter give the same name."""
    parts = (
        request.setup.to_json(),
        str(request.round),
        str(request.turn),
        request.adapter.sha256(),
        request.control.sha256(),
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
