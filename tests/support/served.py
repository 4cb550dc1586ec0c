"""Runs and requests that the tests of this directory share: everything in them is the real thing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict

from fedslm import simulation
from fedslm.client.handlers import train
from fedslm.config import Config
from fedslm.engines.local import LocalGrid
from fedslm.errors import PrivacyError
from fedslm.federation import rounds
from fedslm.federation.checkpoint import RunDirectory
from fedslm.federation.observers import Observer
from fedslm.privacy.chain import Chain, read_chain
from fedslm.privacy.keys import PUBLIC_KEY, read_public_key
from fedslm.privacy.plan import from_json
from fedslm.protocol.messages import TRAIN, Reply, Request
from fedslm.records import AdapterState, RoundRecord
from fedslm.workers import InlinePool
from support.tiny import PRIVATE

POLICY: dict[str, Any] = {
    "unit": "record",
    "epsilon": 8.0,
    "delta": 1e-5,
    "min_noise_multiplier": 0.6,
    "max_clip_norm": 1.0,
    "max_sample_rate": 0.2,
    "max_steps_per_round": 2,
    "max_rounds_per_day": 50,
    "base_models": ["any"],
    "tasks": ["classification"],
    "weakest_passes": "fixed",
}


class StopAfter(Observer):
    """Interrupts a run after a round, as Ctrl-C does."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_round(self, record: RoundRecord) -> None:
        """Interrupts."""
        if record.round == self.round:
            raise KeyboardInterrupt


class StopDuring(Observer):
    """Interrupts a run when one client of a round has answered."""

    def __init__(self, round: int) -> None:
        self.round = round

    def on_client(self, round: int, done: int, cohort: int) -> None:
        """Interrupts."""
        if round == self.round and done == 1:
            raise KeyboardInterrupt


class HostileGrid(LocalGrid):
    """A grid on which some clients answer something else."""

    answers: dict[int, Callable[[Message], Message]]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replaces the answers of hostile clients."""
        for reply in super().pull_messages(message_ids):
            node = reply.metadata.src_node_id - 2
            is_training = reply.metadata.message_type == TRAIN
            yield self.answers[node](reply) if is_training and node in self.answers else reply


def new_directory(config: Config) -> RunDirectory:
    """The run directory of a config."""
    return RunDirectory.create(Path(str(config.run.directory)), config)


def run_with(
    config: Config,
    answers: dict[int, Callable[[Message], Message]],
    directory: RunDirectory | None = None,
) -> dict[str, Any]:
    """Runs a federation with hostile clients."""
    config = config.resolved()
    directory, pool = directory or new_directory(config), InlinePool()
    grid = HostileGrid(config.federation.num_clients, pool)
    grid.answers = answers
    run = simulation.Run(config, directory)
    return run.serve(lambda plan, labels: run.rounds_on(grid, pool, plan, labels))


def changed(
    change: Callable[[AdapterState], AdapterState], **fields: Any
) -> Callable[[Message], Message]:
    """An answer whose update was changed; its hash is made to fit."""

    def answer(message: Message) -> Message:
        reply = Reply.from_records(message.content)
        assert reply.delta is not None
        delta = change(reply.delta)
        values = {**vars(reply), "delta": delta, "delta_sha256": delta.sha256(), **fields}
        message.content = Reply(**values).to_records()
        return message

    return answer


def failing(message: Message) -> Message:
    """Flower's error for a client that raised; made as Flower makes it."""
    message.__dict__["_content"] = None
    message.__dict__["_error"] = Error(code=2, reason="boom")
    return message


def records_of(config: Config) -> list[dict[str, Any]]:
    """The lines of rounds.jsonl."""
    lines = (Path(str(config.run.directory)) / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def chain_of(node: Path) -> Chain:
    """A node's ledger, as an auditor reads it: with the public key alone."""
    return read_chain(node / "ledger.jsonl", read_public_key(node / PUBLIC_KEY))


def first_request(config: Config) -> Request:
    """The request of a run's first round, made by the server's own code; the data is shared out."""
    config = config.resolved()
    directory, pool = new_directory(config), InlinePool()
    data, plan = simulation._prepare(config, directory)
    grid = LocalGrid(config.federation.num_clients, pool)
    federation = rounds.Federation(config, grid, pool, directory)
    told, state = federation._begin(plan, data.labels)
    moving, control = state.server.moving, state.server.control
    return Request(told.setup, 1, moving, control=control, frozen=told.frozen)


def with_plan(request: Request, **values: Any) -> Request:
    """The request with some values of its plan changed, as a hostile server would: in the JSON."""
    return with_raw_plan(request, {**json.loads(request.setup.plan.to_json()), **values})


@dataclass(frozen=True)
class RawPlan:
    """A plan as a hostile server writes it."""

    text: str

    def to_json(self) -> str:
        """The text."""
        return self.text


def with_raw_plan(request: Request, values: object) -> Request:
    """The request with another plan, which need not be one."""
    text = json.dumps(values)
    try:
        plan: Any = from_json(text)
    except PrivacyError:
        plan = RawPlan(text)
    return replace(request, setup=replace(request.setup, plan=plan))


def context_of(index: int, directory: Path | None = None) -> Context:
    """The Flower context of a simulated node, or of a deployed one whose operator names a directory."""
    values: dict[str, Any] = {"partition-id": index, "num-partitions": 3}
    if directory is not None:
        values = {"partition-id": index, "node-directory": str(directory)}
    return Context(run_id=0, node_id=2 + index, node_config=values, state=RecordDict(), run_config={})


def message_to(request: Request, context: Context) -> Message:
    """Sends a request to a node and gives its answer."""
    LocalGrid(1, InlinePool())  # tells Flower who sends
    if "node-directory" in context.node_config:  # its operator knows where the run's data is
        data = str(Path(request.setup.directory) / "data")
        context.node_config.setdefault("data-directory", data)
    message = Message(request.to_records(), context.node_id, TRAIN)
    message.metadata.__dict__["_message_id"] = "1"
    return train(message, context)


def ask(request: Request, context: Context) -> Reply:
    """A node's answer, read as the server reads it."""
    return Reply.from_records(message_to(request, context).content)


def masked(make_config: Callable[..., Config], threshold: int = 2, **secure: Any) -> Config:
    """A config of three clients that add masked parts, in this process."""
    return make_config(
        privacy={**PRIVATE, "noise": "distributed"},
        training={"local_steps": 1, "optimizer": "sgd", "learning_rate": 0.05, "batch_size": 6},
        secure_aggregation={"threshold": threshold, **secure},
        engine={"workers": 0},
    )


def write_policy(directory: Path, **values: Any) -> Path:
    """Writes a node's policy: the usual one with some values changed, or taken out by None."""
    directory.mkdir(parents=True, exist_ok=True)
    policy = {key: value for key, value in {**POLICY, **values}.items() if value is not None}
    lines = [f"{key} = {json.dumps(value)}" for key, value in policy.items()]
    (directory / "policy.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory
