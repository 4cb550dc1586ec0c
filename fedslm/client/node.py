"""A node's own directory: policy, ledger, keys and the last release. No message can set or change it.

In a simulation it is ``nodes/client-NNNNN`` under the run directory, and a policy is optional. In a
deployment the node's operator sets it and the data directory (``node-directory`` and ``data-directory``
in the node's config), and nothing is trained without a policy. One node directory is for one data set.

policy.toml                  what the node allows
ledger.jsonl  .head          what was spent, and the last line that was synced
ledger-key.pem  .pub.pem     signs the ledger; the public half is for auditors
commitment.key               makes data commitments that reveal nothing
release.safetensors  .json   the last release, for a request that is sent again
attestations/…               which tests this code has passed here
runs/…                       what it keeps of each run, by a hash of the run's identifier and plan
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context

from fedslm import layout
from fedslm.attestations import Places, places_of_node, places_of_simulation
from fedslm.errors import FederationError, FedslmError
from fedslm.privacy import keys
from fedslm.privacy.encoding import Words, words_sha256
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, METRIC, NO_UNIT, Unprotected
from fedslm.privacy.plan import NoPrivacy, PrivatePlan, RunPlan
from fedslm.privacy.policy import NodePolicy, PlanRequest, check_protocol, read_policy
from fedslm.records import AdapterState
from fedslm.storage import load_tensors, save_adapter, save_tensors, write_text

FAILED = "failed; see the client's log"  # the only part of an exception that is sent
OWN_SHARD = 0  # a deployed node's data directory has only its own records, whatever its index in a run
_NO_BUDGET = (math.inf, 0.5)  # for a run that charges nothing
_NODE_DIRECTORY, _DATA_DIRECTORY = "node-directory", "data-directory"
_WORDS = "words"  # no tensor of an adapter has this name
_SIMULATED = {"partition-id", "num-partitions"}
_DEPLOYED = {"partition-id", _NODE_DIRECTORY, _DATA_DIRECTORY}


def deployed_config(directory: Path, data: Path, client: int) -> dict[str, str | int | float | bool]:
    """The node config of a deployed node, as :meth:`Node.of` reads it.

    Args:
        directory: The node's own directory.
        data: Directory of its records.
        client: Its index in the run.
    """
    return {"partition-id": client, _NODE_DIRECTORY: str(directory), _DATA_DIRECTORY: str(data)}


@dataclass(frozen=True)
class Release:
    """The data that a client sends in one round.

    Attributes:
        delta: The sent tensors: their values after training minus those before.
        metric: Noisy (sum of scores, number of units); None if none was requested.
        words: Instead of ``delta``, which is then empty: the client's part of a sum over clients.
    """

    delta: AdapterState
    metric: tuple[float, float] | None = None
    words: Words | None = None

    @property
    def sha256(self) -> str:
        """Hash of the tensors that are sent, or of the part of the sum."""
        return self.delta.sha256() if self.words is None else words_sha256(self.words)

    def hashes(self) -> dict[str, str]:
        """Hash of each part, by the purpose that it was charged for."""
        parts = {ADAPTER: self.sha256}
        if self.metric is not None:
            parts[METRIC] = keys.sha256_of(self.metric)
        return parts


@dataclass(frozen=True)
class Node:
    """A client's own directory and data.

    Attributes:
        directory: The node's directory.
        data: Directory of its records.
        client: Index in the population.
        deployed: True if the operator set the directory: then a policy is required.
    """

    directory: Path
    data: Path
    client: int
    deployed: bool

    @classmethod
    def of(cls, context: Context, run_directory: str) -> Node:
        """The node that a Flower context describes.

        Args:
            context: Its node config has exactly a simulation's keys, or both directories of the node: a
                misspelt key must not turn a hospital into a simulated client.
            run_directory: Parent of the directories of simulated clients; not used if deployed.

        Raises:
            FederationError: The node config is neither.
        """
        config = context.node_config
        if set(config) == _SIMULATED:
            client, run = int(config["partition-id"]), Path(run_directory)
            own = run / layout.NODES / layout.simulated(client)
            return cls(own, run / layout.DATA, client, deployed=False)
        if set(config) == _DEPLOYED and config[_NODE_DIRECTORY] and config[_DATA_DIRECTORY]:
            own, data = Path(str(config[_NODE_DIRECTORY])), Path(str(config[_DATA_DIRECTORY]))
            return cls(own, data, int(config["partition-id"]), deployed=True)
        raise FederationError(
            f"a node's config must have exactly {', '.join(sorted(_DEPLOYED))}; this one has other keys"
        )

    @property
    def shard(self) -> int:
        """Index of this client's shard in ``data``."""
        return OWN_SHARD if self.deployed else self.client

    @property
    def attestations(self) -> Places:
        """Where this node keeps results of its own tests; a deployed node believes no other place."""
        if self.deployed:
            return places_of_node(self.directory)
        return places_of_simulation(self.directory.parent)

    def run_directory(self, run_id: str, plan: RunPlan) -> Path:
        """The directory in which this node keeps the data of one run under one plan.

        The server chooses a run's identifier, and may reuse one under another plan. So the plan (with
        its unit) is part of the name, and a private run reads nothing from a run without privacy. The
        name is a whole SHA-256: nobody can find two runs with the same name.

        Args:
            run_id: As given by the server.
            plan: The run's plan.
        """
        name = hashlib.sha256(
            json.dumps([run_id, plan.to_json()], allow_nan=False).encode()
        ).hexdigest()
        return self.directory / layout.NODE_RUNS / name

    def policy(self) -> NodePolicy | None:
        """Reads the policy again; None in a simulation without one.

        Raises:
            PolicyRefused: It is invalid, or missing in a deployment.
        """
        own, shared = self.directory / layout.POLICY, self.directory.parent / layout.POLICY
        if self.deployed or own.exists():
            return read_policy(own)
        return read_policy(shared) if shared.exists() else None

    def admit(self, asked: PlanRequest) -> None:
        """Refuses what the policy does not allow.

        Raises:
            PolicyRefused: With every reason.
        """
        plan = asked.plan
        if self.deployed and isinstance(plan, PrivatePlan) and plan.shares is not None:
            check_protocol(plan.shares)
        policy = self.policy()
        if policy is not None:
            policy.check(asked)

    def may_fetch(self, base: str) -> bool:
        """Whether a base model may be fetched from a hub: a deployed node's policy must name it."""
        policy = self.policy()
        return not self.deployed or (policy is not None and base in policy.base_names)

    def limits(self, plan: PrivatePlan | NoPrivacy) -> Limits:
        """The limits that the ledger enforces for a plan: the run's budget, and the node's own."""
        policy = self.policy()
        if policy is not None:
            return policy.limits(plan)
        own = (plan.epsilon, plan.delta) if isinstance(plan, PrivatePlan) else _NO_BUDGET
        return Limits(own, allows_unprotected=True)

    def ledger(self, unit: str) -> Ledger:
        """The ledger, counting in a unit."""
        key = keys.signing_key(self.directory)
        return Ledger(self.directory / layout.LEDGER, key, unit=unit, dataset=self.directory.name)

    def open_ledger(self) -> Ledger | None:
        """The ledger that records releases without privacy; None for a simulated client without any.

        A simulation without privacy keeps no ledger: it guarantees nothing, and its node directories
        belong to one run. A deployed node's records outlive the run, so unprotected releases are
        recorded.
        """
        if not self.deployed and not (self.directory / layout.LEDGER).exists():
            return None
        return self.ledger(NO_UNIT)

    @contextmanager
    def unprotected(
        self, plan: NoPrivacy, run: str, round: int, purpose: str
    ) -> Iterator[Callable[[str], None]]:
        """Context for reading records without privacy: records every release in the ledger.

        Yields a function that records the hash of a release in the ledger, before it is sent. If the
        block fails, the failure is recorded instead: whether it fails may depend on one record.

        Raises:
            BudgetExceeded: A limit on rounds would be exceeded; the block was not run.
            LedgerError: The ledger cannot be written; nothing may be released.
        """
        ledger, limits = self.open_ledger(), self.limits(plan)

        def record(release_sha256: str) -> None:
            if ledger is not None:
                released = Unprotected(run, round, purpose, release_sha256)
                ledger.release_unprotected(released, limits)

        if ledger is not None:
            ledger.check_unprotected(run, round, purpose, limits)
        try:
            yield record
        except BaseException:
            record(hashlib.sha256(FAILED.encode()).hexdigest())
            raise

    def keep(self, release: Release) -> None:
        """Keeps a release in case its request is repeated."""
        if release.words is None:
            save_adapter(self.directory / layout.RELEASE_TENSORS, release.delta)
        else:
            save_tensors(self.directory / layout.RELEASE_TENSORS, {_WORDS: release.words})
        write_text(
            self.directory / layout.RELEASE, json.dumps({"metric": release.metric}, allow_nan=False)
        )

    def kept(self, hashes: dict[str, str]) -> Release | None:
        """The release with these hashes, if it is still stored and undamaged."""
        if not hashes:
            return None
        try:
            tensors = load_tensors(self.directory / layout.RELEASE_TENSORS)
            words = tensors.pop(_WORDS, None)
            delta = AdapterState(tensors)
            text = (self.directory / layout.RELEASE).read_text(encoding="utf-8")
            metric = json.loads(text)["metric"]
            release = Release(delta, None if metric is None else (metric[0], metric[1]), words)
        except (FedslmError, OSError, ValueError, KeyError, TypeError, IndexError):
            return None
        return release if release.hashes() == hashes else None
