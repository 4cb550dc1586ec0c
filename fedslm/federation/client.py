"""A client: message in, training, message out. The same functions run on every engine."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedslm
from fedslm.aggregation.methods import trained_keys
from fedslm.errors import BudgetExceeded, FederationError, PolicyRefused, PrivacyError, TrainingError
from fedslm.federation.attestation import attest
from fedslm.federation.node import Node, Release
from fedslm.federation.shard import shard_of
from fedslm.federation.wire import Reply, Request, Setup, from_arrays, to_arrays
from fedslm.models.base import base_sha256, resolve
from fedslm.models.loaded import LoadedModel, load
from fedslm.privacy.chain import ADAPTER, METRIC, Charge
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.plan import (
    METRIC_SENSITIVITY,
    ExamplePlan,
    NoPrivacy,
    PatientPlan,
    PrivatePlan,
    from_json,
)
from fedslm.privacy.policy import Asked
from fedslm.records import AdapterState
from fedslm.storage import load_adapter
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
          is on disk before training starts.
        * A reply holds noised tensors, a noised metric if one is allowed, a signed statement of what
          was charged, public hashes and public constants. A refusal states values of plan and policy;
          a failure is one fixed sentence.
        * The same request again gets the same bytes, free of charge.
    """
    round_number = 0
    try:
        request = Request.from_records(message.content)
        round_number = request.round
        reply = _answer(request, Node.of(context, request.setup.directory))
    except (BudgetExceeded, PolicyRefused, FederationError) as error:  # these hold public values only
        reply = Reply("refused", round_number, reason=str(error))
    except Exception:  # the edge of the client: a coarse status leaves, details stay here
        logger.exception("training failed")
        reply = Reply("failed", round_number, reason="failed; see the client's log")
    return Message(reply.to_records(), reply_to=message)


def _answer(request: Request, node: Node) -> Reply:
    """Checks a request and trains, privately or not."""
    setup = request.setup
    if setup.version != fedslm.__version__:
        raise FederationError(f"server runs {setup.version}, this client {fedslm.__version__}")
    try:
        plan = from_json(setup.plan)
    except PrivacyError as error:
        raise PolicyRefused(f"the plan is refused: {error}") from error
    node.admit(Asked(plan, setup.base_sha256, setup.task.name))
    if base_sha256(resolve(setup.model)) != setup.base_sha256:  # before any of its files is interpreted
        raise FederationError("the base model here differs from the server's")
    model = load(setup.model, setup.lora, setup.task, len(setup.labels))
    if isinstance(plan, PrivatePlan):
        return _answer_privately(request, node, plan, model)
    adapter = _train(request, node, plan, model)
    weight = float(len(shard_of(setup, node).trained)) if setup.weights == "records" else 1.0
    return _reply(request, model, Release(adapter), weight=weight)


def _answer_privately(
    request: Request, node: Node, plan: ExamplePlan | PatientPlan, model: LoadedModel
) -> Reply:
    """Charges, trains, keeps the release for a repeated request, and answers."""
    from fedslm.training.checks import check_private_model

    _verify(plan)
    ledger, charges = node.ledger(plan.unit), _charges(request, node, plan)
    again = node.kept(ledger.released(charges[0].request_sha256))
    if again is not None:
        return _reply(request, model, again, ledger=ledger)
    if request.setup.lora.dropout > 0:
        raise PolicyRefused("LoRA dropout couples the records of a batch; it must be 0 under privacy")
    check_private_model(model.adapter.network)
    _check_adapter(_whole(request), model)
    _rehearsed(request.setup)
    attest(node.directory if node.deployed else node.directory.parent)
    reserved = ledger.reserve(charges, node.limits(plan))
    release = Release(_train(request, node, plan, model))
    if plan.metric_event is not None:
        release = Release(release.adapter, _metric(request, node, plan, model))
    node.keep(release)
    for index, charge in zip(reserved, charges, strict=True):
        ledger.commit(index, release.hashes()[charge.purpose])
    return _reply(request, model, release, ledger=ledger)


def _check_adapter(whole: AdapterState, model: LoadedModel) -> None:
    """Refuses tensors that do not fit the model before anything is charged for them."""
    fitting = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    if whole.shapes != fitting or not whole.is_finite():
        raise FederationError("the adapter does not fit the model here, or is not finite")


@lru_cache(maxsize=8)
def _rehearsed(setup: Setup) -> None:
    """Rehearses with the model that is loaded for a setup, once per process."""
    from fedslm.training.local import rehearse

    model = load(setup.model, setup.lora, setup.task, len(setup.labels))
    plan, task = from_json(setup.plan), build(setup.task, setup.data, setup.labels)
    if isinstance(plan, PrivatePlan):
        rehearse(model, task, plan, trained_keys(setup.method, model.adapter.read()))


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


def _charges(request: Request, node: Node, plan: ExamplePlan | PatientPlan) -> list[Charge]:
    """What a round costs, and everything that it is bound to."""
    setup = request.setup
    training = Charge(
        event=plan.training_event,
        purpose=ADAPTER,
        clip_norm=plan.clip_norm,
        delta=plan.delta,
        run=setup.run_id,
        round=request.round,
        plan_sha256=hashlib.sha256(setup.plan.encode()).hexdigest(),
        request_sha256=_request_sha256(request),
        base_sha256=setup.base_sha256,
        config_sha256=setup.config_sha256,
        code_version=fedslm.__version__,
        dataset_commitment=shard_of(setup, node).commitment,
    )
    metric = plan.metric_event
    if metric is None:
        return [training]
    return [
        training,
        replace(training, event=metric, purpose=METRIC, clip_norm=METRIC_SENSITIVITY),
    ]


def _train(
    request: Request, node: Node, plan: ExamplePlan | PatientPlan | NoPrivacy, model: LoadedModel
) -> AdapterState:
    """Trains, and checks that the bytes that will be sent reload to what the model holds."""
    from fedslm.training.local import LocalWork
    from fedslm.training.local import train as train_locally

    setup, whole = request.setup, _whole(request)
    trained = trained_keys(setup.method, whole)
    work = LocalWork(whole, trained, setup.seed, request.round, node.client)
    task = build(setup.task, setup.data, setup.labels)
    examples = shard_of(setup, node).trained
    adapter = train_locally(model, task, examples, plan, setup.training, work)
    if from_arrays(to_arrays(adapter)).sha256() != model.adapter.read(sorted(trained)).sha256():
        raise TrainingError("the bytes to be sent do not reload to the trained adapter")
    return adapter


def _metric(
    request: Request, node: Node, plan: ExamplePlan | PatientPlan, model: LoadedModel
) -> tuple[float, float]:
    """How right the server's adapter is on the client's own (or held-out) records, with noise."""
    from fedslm.training.metric import noisy_metric

    setup = request.setup
    task = build(setup.task, setup.data, setup.labels)
    return noisy_metric(model, task, shard_of(setup, node).measured, _whole(request), plan)


def _whole(request: Request) -> AdapterState:
    """The whole adapter to start from."""
    setup = request.setup
    return _frozen(Path(setup.directory), setup.frozen_sha256).merged(request.adapter)


def _reply(
    request: Request,
    model: LoadedModel,
    release: Release,
    *,
    ledger: Ledger | None = None,
    weight: float = 1.0,
) -> Reply:
    """A reply with everything that the server checks."""
    adapter_sha256 = release.adapter.sha256()
    run, number = request.setup.run_id, request.round
    return Reply(
        "ok",
        number,
        adapter=release.adapter,
        adapter_sha256=adapter_sha256,
        base_sha256=model.base_sha256,
        weight=weight,
        statement="" if ledger is None else ledger.statement(run, number, adapter_sha256).to_json(),
        metric=release.metric,
    )


@lru_cache(maxsize=2)
def _frozen(directory: Path, sha256: str) -> AdapterState:
    """The shared frozen tensors, checked against the hash that the server names."""
    state = load_adapter(directory / "frozen.safetensors")
    if state.sha256() != sha256:
        raise FederationError("the frozen tensors here differ from the server's")
    return state


def _request_sha256(request: Request) -> str:
    """Names a request: the same run, round, plan and starting adapter give the same name."""
    parts = (request.setup.to_json(), str(request.round), request.adapter.sha256())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
