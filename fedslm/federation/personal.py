"""After the last round: each client measures the shared adapter on its held-out records, and its own.

Formal guarantees (under privacy):
    * A deployed node answers the same word before it reads a record: it trains and measures nothing on
      a server's word, since the time that takes would tell of the records, free of charge.
    * In a simulation, whose server and nodes are one researcher, numbers and personal adapters stay in
      the node's own directory. Nothing is charged, since nothing leaves.

Without privacy numbers leave: a deployed node's ledger records them before, as a release without
privacy, and so it does if measuring fails.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import assert_never

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedslm.aggregation.factor_methods import set_aside
from fedslm.aggregation.methods import trained_keys
from fedslm.errors import FederationError, PolicyRefused
from fedslm.factors import delta_keys
from fedslm.federation.bounds import LONGEST_REASON, cut
from fedslm.federation.client import admitted
from fedslm.federation.fairness import ClientMetrics, Metrics
from fedslm.federation.kept_runs import with_own_records
from fedslm.federation.loading import model_for
from fedslm.federation.node import FAILED, Node
from fedslm.federation.shard import Shard, shard_of
from fedslm.federation.update import start_of
from fedslm.federation.wire import Request, Setup
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel
from fedslm.models.plain import save_plain
from fedslm.privacy.lines import METRIC
from fedslm.privacy.plan import NoPrivacy, PrivatePlan
from fedslm.records import AdapterState
from fedslm.storage import json_text, write_text
from fedslm.tasks import build

logger = logging.getLogger(__name__)


def measure(message: Message, context: Context) -> Message:
    """Measures, and personalises if the setup says so."""
    answer = {"status": "ok", "metrics": ""}
    try:
        request = Request.from_records(message.content)
        node = Node.of(context, request.setup.directory)
        answer["metrics"] = _measured(request, node)
    except (PolicyRefused, FederationError) as error:  # these hold public values only
        answer = {"status": cut(error, LONGEST_REASON - 1), "metrics": ""}
    except Exception:  # the edge of the client: details stay here
        logger.exception("measuring failed")
        answer = {"status": FAILED, "metrics": ""}
    return Message(
        RecordDict({"measured": ConfigRecord({**answer, "salt": secrets.token_hex(16)})}),
        reply_to=message,
    )


def _measured(request: Request, node: Node) -> str:
    """Measures; the answer's text is empty under privacy."""
    plan = admitted(request, node)
    if not isinstance(plan, PrivatePlan):
        with node.unprotected(plan, request.setup.run_id, request.round, METRIC) as record:
            node = with_own_records(request.setup, node, has_begun=False)
            text = json_text(asdict(_both(request, node)))
            record(hashlib.sha256(text.encode()).hexdigest())
        return text
    if node.deployed:
        return ""
    try:
        found = _both(request, node)
        write_text(_own(request, node) / "metrics.json", json_text(asdict(found)))
    except Exception:  # whatever the records do, it must not show
        logger.exception("measuring failed")
    return ""


def _both(request: Request, node: Node) -> ClientMetrics:
    """Measures the shared adapter, trains the client's own, and measures that."""
    setup, model = request.setup, model_for(request.setup)
    shard, start = shard_of(setup, node), start_of(request, node).adapter
    shared = _metrics(setup, model, shard, start)
    personal: Metrics = {}
    if setup.personalization.method != "none":
        adapter = _personal(request, node, model, shard, start)
        personal = _metrics(setup, model, shard, adapter)
        save_plain(model.adapter, adapter, setup.lora, _own(request, node))
    elif setup.method == "fedsa":
        save_plain(model.adapter, start, setup.lora, _own(request, node))
    return ClientMetrics(len(shard.measured), shared, personal)


def _own(request: Request, node: Node) -> Path:
    """Where a run's personal adapter is, for PEFT."""
    name = node.run_directory(request.setup.run_id, request.setup.plan).name
    return node.directory / "personal" / name


def _metrics(setup: Setup, model: LoadedModel, shard: Shard, adapter: AdapterState) -> Metrics:
    """Metrics of an adapter on the held-out records; empty if there are none."""
    from fedslm.training.evaluation import count

    task = build(setup.task, setup.data, setup.labels)
    sums = count(model, task, shard.measured, adapter)
    return dict(task.metrics(sums)) if sums else {}


def _personal(
    request: Request, node: Node, model: LoadedModel, shard: Shard, start: AdapterState
) -> AdapterState:
    """Trains the client's own adapter; nothing of it leaves."""
    from fedslm.training.local import LocalWork, train

    setup = request.setup
    match setup.personalization.method:
        case "none" | "fine-tune":
            keys = trained_keys(setup.method, start, 1) | trained_keys(setup.method, start, 2)
        case "second-adapter" if setup.method == "fed-sb":
            raise FederationError("a second adapter has no core to go with Fed-SB's")
        case "second-adapter":
            own = start.select(set(start) - delta_keys(start))
            start = set_aside(start, setup.lora.scaling, initial_state(own.shapes, setup.seed))
            keys = frozenset(set(start) - delta_keys(start))
        case other:
            assert_never(other)
    plan = NoPrivacy(setup.training.batch_size, setup.personalization.steps)
    work = LocalWork(start, keys, setup.seed, request.round, node.client)
    task = build(setup.task, setup.data, setup.labels)
    after = train(model, task, shard.trained, plan, setup.training, work)
    return start.merged(after)
