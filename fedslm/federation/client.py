"""A client: message in, training, message out. The same functions run on every engine."""

from __future__ import annotations

import hashlib
import logging
from functools import lru_cache
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

import fedslm
from fedslm.aggregation.methods import trained_keys
from fedslm.data import shards
from fedslm.errors import BudgetExceeded, FederationError, RunError, TrainingError
from fedslm.federation.wire import Reply, Request, Setup, from_arrays, to_arrays
from fedslm.models.loaded import LoadedModel, load
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.plan import ExamplePlan, NoPrivacy, from_json
from fedslm.records import AdapterState
from fedslm.storage import load_adapter, save_adapter
from fedslm.tasks import build
from fedslm.tasks.base import Prepared

logger = logging.getLogger(__name__)
_CACHED_CLIENTS = 64


def hello(message: Message, context: Context) -> Message:
    """Answers who this client is: its index in the population and its version of fedslm."""
    values = ConfigRecord(
        {"client": int(context.node_config["partition-id"]), "version": fedslm.__version__}
    )
    return Message(RecordDict({"hello": values}), reply_to=message)


def train(message: Message, context: Context) -> Message:
    """Trains for one round.

    Formal guarantees (under privacy):
        * Nothing leaves that is not charged first: the charge is on disk before training starts.
        * A reply holds noised tensors, public hashes and public constants. A failure is one fixed
          sentence.
        * The same request again gets the same bytes, free of charge.
    """
    round_number = 0
    try:
        request = Request.from_records(message.content)
        round_number = request.round
        reply = _answer(request, int(context.node_config["partition-id"]))
    except (BudgetExceeded, FederationError) as error:  # their texts hold public values only
        reply = Reply("refused", round_number, reason=str(error))
    except Exception:  # the edge of the client: a coarse status leaves, details stay here
        logger.exception("training failed")
        reply = Reply("failed", round_number, reason="failed; see the client's log")
    return Message(reply.to_records(), reply_to=message)


def _answer(request: Request, client: int) -> Reply:
    """Checks a request and trains, privately or not."""
    setup = request.setup
    if setup.version != fedslm.__version__:
        raise FederationError(f"server runs {setup.version}, this client {fedslm.__version__}")
    plan = from_json(setup.plan)
    model = load(setup.model, setup.lora, setup.task, len(setup.labels))
    if model.base_sha256 != setup.base_sha256:
        raise FederationError("the base model here differs from the server's")
    if isinstance(plan, ExamplePlan):
        return _answer_privately(request, client, plan, model)
    adapter = _train(request, client, plan, model)
    weight = float(len(_examples(setup, client).examples)) if setup.weights == "records" else 1.0
    return _reply(request, model, adapter, weight=weight)


def _answer_privately(request: Request, client: int, plan: ExamplePlan, model: LoadedModel) -> Reply:
    """Charges, trains, keeps the release for a repeated request, and answers."""
    from fedslm.training.checks import check_private_model

    directory = Path(request.setup.directory) / "ledger"
    ledger = Ledger(directory / f"client-{client:05d}.jsonl")
    kept = directory / f"client-{client:05d}.release.safetensors"
    asked = _request_sha256(request)
    again = _kept_release(kept, ledger.released(asked))
    if again is not None:
        return _reply(request, model, again, ledger=ledger)
    check_private_model(model.adapter.network)
    reserved = ledger.reserve(
        plan.round_event,
        run=request.setup.run_id,
        round=request.round,
        request_sha256=asked,
        budget=(plan.epsilon, plan.delta),
    )
    adapter = _train(request, client, plan, model)
    save_adapter(kept, adapter)
    ledger.commit(reserved, adapter.sha256())
    return _reply(request, model, adapter, ledger=ledger)


def _kept_release(path: Path, sha256: str | None) -> AdapterState | None:
    """The release that was charged under this hash, if it is still there undamaged."""
    if sha256 is None or not path.exists():
        return None
    try:
        adapter = load_adapter(path)
    except RunError:
        return None
    return adapter if adapter.sha256() == sha256 else None


def _train(
    request: Request, client: int, plan: ExamplePlan | NoPrivacy, model: LoadedModel
) -> AdapterState:
    """Trains, and checks that the bytes that will be sent reload to what the model holds."""
    from fedslm.training.local import LocalWork
    from fedslm.training.local import train as train_locally

    setup = request.setup
    whole = _frozen(Path(setup.directory), setup.frozen_sha256).merged(request.adapter)
    trained = trained_keys(setup.method, whole)
    work = LocalWork(whole, trained, setup.seed, request.round, client)
    task = build(setup.task, setup.data, setup.labels)
    examples = _examples(setup, client).examples
    adapter = train_locally(model, task, examples, plan, setup.training, work)
    if from_arrays(to_arrays(adapter)).sha256() != model.adapter.read(sorted(trained)).sha256():
        raise TrainingError("the bytes to be sent do not reload to the trained adapter")
    return adapter


def _reply(
    request: Request,
    model: LoadedModel,
    adapter: AdapterState,
    *,
    ledger: Ledger | None = None,
    weight: float = 1.0,
) -> Reply:
    """A reply with everything that the server checks."""
    return Reply(
        "ok",
        request.round,
        adapter=adapter,
        adapter_sha256=adapter.sha256(),
        base_sha256=model.base_sha256,
        weight=weight,
        events=() if ledger is None else ledger.events(),
    )


@lru_cache(maxsize=2)
def _frozen(directory: Path, sha256: str) -> AdapterState:
    """The shared frozen tensors, checked against the hash that the server names."""
    state = load_adapter(directory / "frozen.safetensors")
    if state.sha256() != sha256:
        raise FederationError("the frozen tensors here differ from the server's")
    return state


@lru_cache(maxsize=_CACHED_CLIENTS)
def _examples(setup: Setup, client: int) -> Prepared:
    """A client's examples, tokenised once per process."""
    model = load(setup.model, setup.lora, setup.task, len(setup.labels))
    task = build(setup.task, setup.data, setup.labels)
    prepared = task.prepare(shards.read_client(Path(setup.directory) / "data", client), model.tokenizer)
    if prepared.num_skipped:
        text = "client %d: %d records have no tokens or an unknown label"
        logger.warning(text, client, prepared.num_skipped)
    return prepared


def _request_sha256(request: Request) -> str:
    """Names a request: the same run, round, plan and starting adapter give the same name."""
    parts = (request.setup.to_json(), str(request.round), request.adapter.sha256())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
