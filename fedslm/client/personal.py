"""After the last round: each client measures the shared adapter on its held-out records, and its own.

Formal guarantees (under privacy):
    * A deployed node gives the same answer before it reads a record: it neither trains nor measures on
      a server's request, since the time that this takes would depend on the records, free of charge.
    * In a simulation, whose server and nodes are one researcher's, numbers and personal adapters stay
      in the node's own directory. Nothing is charged, since nothing is sent.

Without privacy the numbers are sent: a deployed node's ledger records them before, as a release without
privacy, and also records a failure to measure.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from dataclasses import asdict
from pathlib import Path
from typing import assert_never

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedslm.adapter_keys import delta_keys, part_of
from fedslm.aggregation.factor_methods import set_aside
from fedslm.aggregation.methods import trained_keys
from fedslm.client.node import FAILED, Node
from fedslm.client.records import ClientRecords
from fedslm.client.round import ClientRound, admitted
from fedslm.errors import FederationError, FedslmError, PolicyRefused
from fedslm.models.initial import initial_state
from fedslm.models.peft_export import save_plain
from fedslm.privacy.lines import METRIC
from fedslm.privacy.plan import NoPrivacy, PrivatePlan
from fedslm.protocol.bounds import LONGEST_REASON, cut
from fedslm.protocol.messages import Request
from fedslm.protocol.metrics import ClientMetrics, Metrics
from fedslm.records import AdapterState
from fedslm.storage import json_text, write_text

logger = logging.getLogger(__name__)


def measure(message: Message, context: Context) -> Message:
    """Measures, and personalises if the setup requests it."""
    try:
        request = Request.from_records(message.content)
        node = Node.of(context, request.setup.directory)
        return _reply(message, "ok", _measured(admitted(request, node)))
    except (PolicyRefused, FederationError) as error:  # these contain only public values
        return not_measured(message, error)
    except Exception:  # boundary of the client: details stay here
        logger.exception("measuring failed")
        return _reply(message, FAILED)


def not_measured(message: Message, error: FedslmError) -> Message:
    """The reply to a request that this node refuses, for a reason that contains only public values."""
    return _reply(message, cut(error, LONGEST_REASON - 1))


def _reply(message: Message, status: str, metrics: str = "") -> Message:
    """The reply to a request to measure."""
    values = ConfigRecord({"status": status, "metrics": metrics, "salt": secrets.token_hex(16)})
    return Message(RecordDict({"measured": values}), reply_to=message)


def _measured(client_round: ClientRound) -> str:
    """Measures; the text of the answer is empty under privacy."""
    node, plan, setup = client_round.node, client_round.plan, client_round.setup
    if not isinstance(plan, PrivatePlan):
        client_round.prepare()  # a failure before the records are read is not a release
        with node.unprotected(plan, setup.run_id, client_round.request.round, METRIC) as record:
            text = json_text(asdict(_both(client_round)))
            record(hashlib.sha256(text.encode()).hexdigest())
        return text
    if node.deployed:
        return ""
    try:
        found = _both(client_round)
        write_text(_own(client_round) / "metrics.json", json_text(asdict(found)))
    except Exception:  # no effect of the records may be visible
        logger.exception("measuring failed")
    return ""


def _both(client_round: ClientRound) -> ClientMetrics:
    """Measures the shared adapter, and trains and measures the client's own."""
    setup, model = client_round.setup, client_round.model
    records, start = client_round.records(has_begun=False), client_round.start.adapter
    shared = _metrics(client_round, records, start)
    personal: Metrics = {}
    if setup.personalization.method != "none":
        adapter = _personal(client_round, records)
        personal = _metrics(client_round, records, adapter)
        save_plain(model.adapter, adapter, setup.lora, _own(client_round))
    elif setup.method == "fedsa":
        save_plain(model.adapter, start, setup.lora, _own(client_round))
    return ClientMetrics(len(records.measured), shared, personal)


def _own(client_round: ClientRound) -> Path:
    """Directory of a run's personal adapter, in PEFT format."""
    node, setup = client_round.node, client_round.setup
    return node.directory / "personal" / node.run_directory(setup.run_id, setup.plan).name


def _metrics(client_round: ClientRound, records: ClientRecords, adapter: AdapterState) -> Metrics:
    """Metrics of an adapter on the held-out records; empty if there are none."""
    from fedslm.training.evaluation import count

    sums = count(client_round.model, client_round.task, records.measured, adapter)
    return dict(client_round.task.metrics(sums)) if sums else {}


def _personal(client_round: ClientRound, records: ClientRecords) -> AdapterState:
    """Trains the client's own adapter; nothing of it is sent."""
    from fedslm.training.local import LocalWork, train

    setup, start = client_round.setup, client_round.start.adapter
    match setup.personalization.method:
        case "none" | "fine-tune":
            keys = trained_keys(setup.method, start, 1) | trained_keys(setup.method, start, 2)
        case "second-adapter" if setup.method == "fed-sb":
            raise FederationError("a second adapter has no core to go with Fed-SB's")
        case "second-adapter":
            own = start.select(set(start) - delta_keys(start))
            center = start.select({key for key in start if part_of(key) == "center"})
            new = initial_state(own.shapes, setup.seed).merged(center)
            start = set_aside(start, setup.lora.scaling, new)
            keys = frozenset(set(start) - delta_keys(start) - set(center))
        case other:
            assert_never(other)
    plan = NoPrivacy(setup.training.batch_size, setup.personalization.steps)
    work = LocalWork(start, keys, setup.seed, client_round.request.round, client_round.node.client)
    after = train(client_round.model, client_round.task, records.trained, plan, setup.training, work)
    return start.merged(after)
