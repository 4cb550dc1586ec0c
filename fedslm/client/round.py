"""One client's round: everything it works with, once this node has admitted the request.

The order of a round is fixed: :func:`admitted`, then the ledger, then the records. A
:class:`ClientRound` reads no record until :meth:`ClientRound.records` is called.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import cached_property, lru_cache

from fedslm.client.kept_runs import forget_records, with_own_records
from fedslm.client.memory import ClientMemory
from fedslm.client.node import Node, Release
from fedslm.client.records import ClientRecords, records_of
from fedslm.client.start import Start, memory_of, start_of
from fedslm.config import ModelConfig
from fedslm.data.columns import needed
from fedslm.data.store import declared_columns
from fedslm.errors import FederationError
from fedslm.models import precision
from fedslm.models.base import base_sha256, device_of, resolve
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.plan import RunPlan, UserPlan
from fedslm.privacy.policy import PlanRequest
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.messages import Reply, Request
from fedslm.protocol.setup import Setup
from fedslm.tasks.base import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClientRound:
    """A request that this node has admitted, and everything needed to answer it.

    Formal guarantees:
        * Only :func:`admitted` makes one: the node's policy allows the plan, and the base model here is
          the same as the server's.
        * Nothing but :meth:`records` reads a record.

    Attributes:
        request: The server's request.
        node: The client's own directory and data.
    """

    request: Request
    node: Node

    @property
    def setup(self) -> Setup:
        """The constants of the run."""
        return self.request.setup

    @property
    def plan(self) -> RunPlan:
        """The plan that the policy allows."""
        return self.request.setup.plan

    @cached_property
    def model(self) -> LoadedModel:
        """The base with its adapter, loaded once per process."""
        return model_for(self.setup)

    @cached_property
    def task(self) -> Task:
        """The task to learn."""
        return task_for(self.setup)

    @cached_property
    def start(self) -> Start:
        """The state from which the round starts.

        Raises:
            FederationError: The received or the kept tensors do not fit; nothing was charged yet.
        """
        return start_of(self.request, self.node)

    def prepare(self) -> None:
        """Loads the model and the start. No record is read, so a failure here depends on none.

        Raises:
            ModelError: The model cannot be loaded.
            FederationError: What came or what was kept does not fit.
        """
        _ = self.model, self.start

    @property
    def memory(self) -> ClientMemory:
        """The client's state between rounds."""
        return memory_of(self.request, self.node)

    @property
    def request_sha256(self) -> str:
        """Identifies the request: equal run, round, plan and starting adapter give equal hashes."""
        parts: tuple[str, ...] = (
            self.setup.to_json(),
            str(self.request.round),
            str(self.request.turn),
            self.request.adapter.sha256(),
            self.request.control.sha256(),
        )
        if self.request.leg is not None:
            parts += (hashlib.sha256(self.request.leg.body).hexdigest(),)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def records(self, *, has_begun: bool) -> ClientRecords:
        """Reads the records that the run began with: under privacy only after the ledger allows it.

        Args:
            has_begun: Whether something was charged for this run.

        Raises:
            FederationError: The run's records are no longer kept.
            RunError: They cannot be kept.
        """
        return records_of(self.setup, with_own_records(self.setup, self.node, has_begun=has_begun))

    def forget_records(self) -> None:
        """Removes a deployed node's records of this run, which can make no more charges."""
        forget_records(self.setup, self.node)
        if self.node.deployed:
            self.model.forget_records()

    def reply(self, release: Release, *, ledger: Ledger | None = None, weight: float = 1.0) -> Reply:
        """A reply with everything that the server checks."""
        delta_sha256, shared = release.sha256, release.words is not None
        run, number, seen = self.setup.run_id, self.request.round, self.request.seen
        return Reply(
            "ok",
            number,
            delta=None if shared else release.delta,
            words=release.words,
            delta_sha256=delta_sha256,
            base_sha256=self.model.base_sha256,
            weight=weight,
            statement="" if ledger is None else ledger.statement(run, number, delta_sha256).to_json(),
            extension=() if ledger is None else tuple(map(tuple, ledger.extension(seen))),
            metric=release.metric,
        )


def admitted(request: Request, node: Node) -> ClientRound:
    """Checks a request against this node before any of the base's files is interpreted.

    Raises:
        PolicyRefused: The policy does not allow it.
        FederationError: The base model differs, a column is one that this node does not declare, or
            nothing can be trained in the precision.
    """
    setup = request.setup
    if setup.model.dtype == "float16":
        raise FederationError(f"model.dtype: {precision.NO_FLOAT16}")
    node.admit(PlanRequest(setup.plan, setup.base_sha256, setup.task.name, setup.model.base))
    path = resolve(setup.model, may_fetch=node.may_fetch(setup.model.base))
    if base_sha256(path) != setup.base_sha256:
        raise FederationError("the base model here differs from the server's")
    _check_columns(setup, node)
    if node.deployed:  # in a simulation the server warns
        _warn_of_emulation(setup.model)
    return ClientRound(request, node)


@lru_cache(maxsize=8)
def _warn_of_emulation(model: ModelConfig) -> None:
    """Warns this node's operator, once per process, that the run's precision is slow here."""
    if warning := precision.warning(model, device_of(model)):
        logger.warning("%s", warning)


def _check_columns(setup: Setup, node: Node) -> None:
    """Refuses a run that needs a column that this node's operator does not declare.

    The records' own columns are not checked: one record may add a column.
    """
    declared = declared_columns(node.data)
    if declared is None:
        return
    wanted = set(needed(setup.data, setup.task).values())
    if isinstance(setup.plan, UserPlan):
        wanted.add(setup.plan.unit_column)
    if missing := sorted(wanted - declared):
        raise FederationError(
            f"this node has no column {missing[0][:80]!r}; it declares {', '.join(sorted(declared))}"
        )
