"""Nodes without a model for ``many_nodes.py``: many of them in one process, each a thread.

A light node has what a real node has towards its server: its own key, its own admission, its own ledger
with a ledger key, Flower's Fleet API over TLS, the check of each instruction, and a signed reply. What
it lacks are records, a policy and training: its update is noise of the shapes that were asked for. Each
reply is charged to its ledger first, and states what was charged.

    python benchmarks/light_nodes.py CALLS.json POLL_SECONDS NODE_DIRECTORY ...
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from flwr.app import Message

import fedslm
from fedslm import layout
from fedslm.deployment.admission import ADMISSION, read_admission
from fedslm.deployment.bundle import bundle, sha256_of
from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.instructions import Instructions
from fedslm.deployment.link import Link
from fedslm.federation.replies import expected_shapes
from fedslm.privacy.keys import signing_key
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge
from fedslm.privacy.plan import PrivatePlan
from fedslm.protocol.messages import Reply, Request
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState
from fedslm.storage import write_text

CALLS = ("receive", "send", "get_run", "get_fab", "pull_object", "push_object", "confirm")
_AGAIN_SECONDS, _WRITE_SECONDS, _MESSAGE_BYTES = 2.0, 0.25, 1 << 30
_UPDATE_SCALE = 1e-4


class LightNode:
    """One node: answers training requests with noise that it is charged for.

    Args:
        directory: Its directory: keys, admission and ledger.
        calls: Counts the calls to the server by name.
        poll_seconds: How often it asks for work when there is none.
    """

    def __init__(self, directory: Path, calls: Counter[str], poll_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._admission, self._key = read_admission(directory / ADMISSION), node_key(directory)
        self._instructions = Instructions(directory, self._admission)
        ledger_key = signing_key(directory)
        self._ledger = Ledger(directory / layout.LEDGER, ledger_key, dataset=directory.name)
        self._noise, self._calls = np.random.default_rng(self._admission.node_id), calls
        self._lock = threading.Lock()
        self.is_connected = False

    def serve(self) -> None:
        """Answers the server for ever; connects again if the connection breaks."""
        address, authority = self._admission.address, self._admission.authority.encode()
        approved = frozenset({sha256_of(bundle())})
        while True:
            try:
                with connected(address, authority, self._key) as (number, functions):
                    self.is_connected = True
                    counted = tuple(map(self._counted, CALLS, functions))
                    Link(number, counted, approved, _MESSAGE_BYTES).serve(
                        self.answer, _waited, self._poll_seconds
                    )
            except httpx.TransportError as error:
                logging.warning("node %d: %s", self._admission.node_id, error)
                time.sleep(_AGAIN_SECONDS)

    def answer(self, message: Message, run_id: int) -> Message:
        """The signed reply to a training request."""
        believed = self._instructions.believed(message, run_id)
        request = Request.from_records(message.content)
        delta = self._update(request)
        self._pay(request, believed.request_sha256, delta.sha256())
        sha256, number = delta.sha256(), request.round
        reply = Reply(
            "ok",
            number,
            delta=delta,
            delta_sha256=sha256,
            base_sha256=request.setup.base_sha256,
            statement=self._ledger.statement(request.setup.run_id, number, sha256).to_json(),
            extension=tuple(map(tuple, self._ledger.extension(request.seen))),
        )
        answer = Message(reply.to_records(request.packing), reply_to=message)
        return self._instructions.signed(answer, message, believed)

    def _update(self, request: Request) -> AdapterState:
        """Noise of the shapes that a client sends; another in each round, as a real update is."""
        shapes = expected_shapes(request, 0)
        return AdapterState(
            {
                key: (_UPDATE_SCALE * self._noise.standard_normal(shape)).astype(np.float32)
                for key, shape in shapes.items()
            }
        )

    def _pay(self, request: Request, request_sha256: str, release_sha256: str) -> None:
        """Charges the round to the ledger, and commits it to the update."""
        setup = request.setup
        plan = setup.plan
        assert isinstance(plan, PrivatePlan)
        charge = Charge(
            event=plan.training_event,
            purpose=ADAPTER,
            clip_norm=plan.clip_norm,
            delta=plan.delta,
            run=setup.run_id,
            round=request.round,
            plan_sha256=_plan_sha256(setup),
            request_sha256=request_sha256,
            base_sha256=setup.base_sha256,
            config_sha256=setup.config_sha256,
            code_version=fedslm.__version__,
            dataset_commitment=hashlib.sha256(b"no records").hexdigest(),
            unit=plan.unit,
            normaliser=plan.normaliser,
        )
        (reserved,) = self._ledger.reserve([charge], Limits((plan.epsilon, plan.delta)))
        self._ledger.commit(reserved, release_sha256)

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; counts its calls."""

        def counted(*arguments: Any) -> Any:
            with self._lock:  # objects are pulled and pushed by several threads
                self._calls[name] += 1
            return call(*arguments)

        return counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("calls", type=Path, help="file for the number of calls so far")
    parser.add_argument("poll", type=float, help="how often a node asks for work, in seconds")
    parser.add_argument("directories", type=Path, nargs="+", help="directories of admitted nodes")
    arguments = parser.parse_args()
    counters = [Counter[str]() for _ in arguments.directories]
    nodes = [
        LightNode(directory, counter, arguments.poll)
        for directory, counter in zip(arguments.directories, counters, strict=True)
    ]
    for node in nodes:
        threading.Thread(target=node.serve, daemon=True).start()
    while True:
        total = sum((Counter(dict(each)) for each in counters), Counter[str]())
        total["connected"] = sum(node.is_connected for node in nodes)
        write_text(arguments.calls, json.dumps(total))
        time.sleep(_WRITE_SECONDS)


def _waited(seconds: float) -> bool:
    """Waits; a light node never stops by itself."""
    time.sleep(seconds)
    return True


@cache
def _plan_sha256(setup: Setup) -> str:
    """Hash that identifies a plan in the ledger."""
    return hashlib.sha256(setup.plan.to_json().encode()).hexdigest()


if __name__ == "__main__":
    main()
