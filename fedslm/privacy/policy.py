"""The node's own policy: what it allows a server to request, whatever the server sends.

The file is stored on the node and read again for every request; no message can set or change it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedslm.config import Names, OptionalCount, OptionalNumber, OptionalText, Section, Unit, read_file
from fedslm.errors import ConfigError, PolicyRefused
from fedslm.privacy.limits import Limits
from fedslm.privacy.plan import WEAKEST_FIRST, ClientPlan, NoPrivacy, Passes, PrivatePlan, UserPlan
from fedslm.privacy.shares import NoiseShares
from fedslm.records import LARGEST_DELTA

ANY = "any"
LONGEST_PERIOD_SECONDS = 43_200.0  # a request is worked on for a day at most
_STRENGTH = {"none": 0, "record": 1, "user": 2, "client": 3}

EXAMPLE = """\
# The requests that this node accepts from a server. No message can change this file.
unit = "patient"              # the weakest unit: "record", or "patient" (which refuses "record")
unit_column = "patient"       # the column that identifies the patient
epsilon = 8.0                 # lifetime budget of this data set, over all runs ...
delta = 1e-5                  # ... at this delta; a larger one is refused
max_epsilon_per_run = 0.8     # the part of it that one run may spend ...
max_epsilon_per_day = 0.8     # ... and that all runs may spend within 24 hours
min_noise_multiplier = 0.5
max_clip_norm = 10.0
max_sample_rate = 0.1
max_records_per_unit = 16
max_steps_per_round = 100
max_rounds_per_day = 50
# max_rounds = 500                      # over the ledger's lifetime, whatever epsilon is left
# min_seconds_between_rounds = 3600.0
answer_after_seconds = 300.0  # replies leave this long after their request, so that their time does not
                              # show who was sampled: more than a round takes here (the node logs it)
base_models = ["any"]         # sha256 of allowed base models (fedslm prints it in report.md), or "any"
base_names = ["any"]          # names or paths that a server may request, or "any"
tasks = ["classification"]    # allowed tasks: "classification", "multi-label", "token-classification",
                              # "causal-lm", "instruction", "seq2seq", "preference"
allow_distributed_noise = false # true: this node adds only a share of the noise to a sum over nodes;
                              # epsilon then holds only if others are honest:
# least_honest_nodes = 5      # ... so many of any sum, this node included
# most_colluding_nodes = 2    # of all admitted nodes; a server chooses which of them are in a sum
weakest_passes = "fixed"      # "isolated": no two units in one pass, whatever this node's own test of
                              # fixed shapes says; "shared": any, exact only up to rounding
metrics = "none"              # "noisy" allows a metric as a separate Gaussian release
min_metric_noise_multiplier = 5.0
"""


@dataclass(frozen=True)
class PlanRequest:
    """A server's request, as far as a policy checks it.

    Attributes:
        plan: The plan.
        base_sha256: Hash of the base model on the node.
        task: Name of the task.
        base: Name by which the server requests the base model.
    """

    plan: PrivatePlan | NoPrivacy
    base_sha256: str
    task: str
    base: str


class NodePolicy(Section):
    """A node's policy. No setting that protects people has a default."""

    unit: Unit
    """Weakest allowed unit ("patient" is read as "user"). "none" lets a server train without privacy,
    and then nothing protects the people in the data: only for data that are already public."""
    unit_column: OptionalText = None
    """Column that identifies the unit of a record; the server cannot choose another."""
    epsilon: float = Field(gt=0)
    """Budget over the node's lifetime, over all runs on this data set."""
    delta: float = Field(gt=0, le=LARGEST_DELTA)
    """Delta of the budget; a plan with a larger one is refused."""
    max_epsilon_per_run: OptionalNumber = Field(None, gt=0)
    """Most epsilon, at the budget's delta, that one run may spend, even in one round and whatever
    the run's plan says. Absent: one request can spend the whole budget."""
    max_epsilon_per_day: OptionalNumber = Field(None, gt=0)
    """Most epsilon, at the budget's delta, that all runs together may spend within 24 hours."""
    min_noise_multiplier: float = Field(gt=0)
    """Least noise / clip norm."""
    max_clip_norm: OptionalNumber = Field(None, gt=0)
    """Largest clip norm."""
    max_sample_rate: float = Field(1.0, gt=0, le=1)
    """Largest sample rate."""
    max_records_per_unit: OptionalCount = Field(None, ge=1)
    """Most records of one user in a step."""
    max_steps_per_round: int = Field(ge=1)
    """Most steps in a round."""
    max_rounds_per_day: int = Field(ge=1)
    """Most rounds within 24 hours."""
    max_rounds: OptionalCount = Field(None, ge=1)
    """Most rounds over the ledger's lifetime."""
    min_seconds_between_rounds: OptionalNumber = Field(None, gt=0)
    """Least time from one round to the next."""
    answer_after_seconds: OptionalNumber = Field(None, gt=0, le=LONGEST_PERIOD_SECONDS)
    """A deployed node's replies leave this long after their request, or 2, 4, 8 … times as long
    (:mod:`fedslm.client.pace`); set it to more than a round takes here. Absent: the time of a reply
    shows about how many records were sampled."""
    base_models: Names
    """SHA-256 of the allowed base models, or "any"."""
    base_names: Names = (ANY,)
    """Names or paths that a server may request as a base model, or "any": no other is looked up, on the
    node or on a hub."""
    tasks: Names
    """Allowed tasks."""
    weakest_passes: Passes = "isolated"
    """Weakest allowed way to share passes: "isolated", "fixed" (public shapes that this node has tested
    bit by bit), or "shared", where rounding couples units."""
    allow_distributed_noise: bool = False
    """Whether this node may add only a share of the noise to its part of a sum over nodes. Epsilon then
    holds only if enough other nodes are honest."""
    least_honest_nodes: OptionalCount = Field(None, ge=2)
    """With allow_distributed_noise: of the nodes in any sum, the fewest that this node's operator
    trusts to add their share and to keep it to themselves, this node included. A plan that assumes
    more honest nodes is refused."""
    most_colluding_nodes: OptionalCount = Field(None, ge=0)
    """With allow_distributed_noise: of all admitted nodes, the most that may add no noise, or tell the
    server what they sent. A plan that allows for fewer is refused: a server that works with these nodes
    could else ask a small cohort with all of them in it."""
    metrics: Literal["none", "noisy"] = "none"
    """Whether a metric may leave the node, as a separate Gaussian release."""
    min_metric_noise_multiplier: OptionalNumber = Field(None, gt=0)
    """Least noise of a metric."""

    def check(self, asked: PlanRequest) -> None:
        """Refuses a request that is weaker than this policy.

        Formal guarantees:
            * Returns only if every bound of the policy holds for the request.
            * The reason contains only values of plan and policy, nothing computed from records.

        Raises:
            PolicyRefused: With every reason.
        """
        reasons = list(self._reasons(asked))
        if reasons:
            raise PolicyRefused("refused by the node's policy: " + "; ".join(reasons))

    def limits(self, plan: PrivatePlan | NoPrivacy) -> Limits:
        """The limits that the ledger enforces for a plan."""
        run, day = self.max_epsilon_per_run, self.max_epsilon_per_day
        return Limits(
            run=(plan.epsilon, plan.delta) if isinstance(plan, PrivatePlan) else (math.inf, self.delta),
            lifetime=(self.epsilon, self.delta),
            per_run=None if run is None else (run, self.delta),
            per_day=None if day is None else (day, self.delta),
            rounds_per_day=self.max_rounds_per_day,
            rounds=self.max_rounds,
            seconds_between=self.min_seconds_between_rounds,
            allows_unprotected=self.unit == "none",
        )

    def budget_in_words(self) -> str:
        """The budget as a text for the node's operator."""
        bounds = ((self.max_epsilon_per_run, "a run"), (self.max_epsilon_per_day, "24 hours"))
        within = ", ".join(
            f"no limit for {what}" if most is None else f"{most:g} in {what}" for most, what in bounds
        )
        if self.unit == "none":
            return f"a server may train without privacy; else at most ε = {self.epsilon:g}, {within}"
        return f"at most ε = {self.epsilon:g} at δ = {self.delta:g} for one {self.unit}, {within}"

    def in_words(self) -> str:
        """The budget, and when replies leave, as a text for the node's operator."""
        period = self.answer_after_seconds
        if period is not None:
            return f"{self.budget_in_words()}; replies leave {period:g} s after their request"
        return (
            f"{self.budget_in_words()}; replies leave when they are ready, which shows about how many "
            f"records were sampled: set answer_after_seconds"
        )

    def _reasons(self, asked: PlanRequest) -> Iterator[str]:
        """Yields every way in which the request is weaker than allowed."""
        plan = asked.plan
        if _STRENGTH[plan.unit] < _STRENGTH[self.unit]:
            yield f"unit {plan.unit!r} is weaker than {self.unit!r}"
        elif plan.unit == "client" and self.unit not in ("client", "none"):
            yield f"unit 'client' does not protect one {self.unit} at the same epsilon"
        if asked.task not in self.tasks:
            yield f"task {asked.task!r} is not among {list(self.tasks)}"
        if ANY not in self.base_models and asked.base_sha256 not in self.base_models:
            yield f"base model {asked.base_sha256[:12]} is not allowed"
        if ANY not in self.base_names and asked.base not in self.base_names:
            yield f"a base model called {asked.base[:80]!r} is not allowed"
        if plan.steps_per_round > self.max_steps_per_round:
            yield f"steps_per_round {plan.steps_per_round:g} is above {self.max_steps_per_round:g}"
        if isinstance(plan, NoPrivacy):
            return
        by_client = isinstance(plan, ClientPlan)  # who takes part is public, and nothing is sampled
        for name, value, bound in (
            ("delta", plan.delta, self.delta),
            ("epsilon", plan.epsilon, self.epsilon),
            ("epsilon of a run", plan.epsilon, self.max_epsilon_per_run),
            ("clip_norm", plan.clip_norm, self.max_clip_norm),
            ("sample_rate", plan.sample_rate, None if by_client else self.max_sample_rate),
        ):
            if bound is not None and not value <= bound:
                yield f"{name} {value:g} is above {bound:g}"
        if not plan.noise_multiplier >= self.min_noise_multiplier:
            yield f"noise_multiplier {plan.noise_multiplier:g} is below {self.min_noise_multiplier:g}"
        if WEAKEST_FIRST.index(plan.passes) < WEAKEST_FIRST.index(self.weakest_passes):
            yield f"passes {plan.passes!r} are weaker than {self.weakest_passes!r}"
        if isinstance(plan, UserPlan):
            yield from self._unit_reasons(plan)
        yield from self._metric_reasons(plan)
        if plan.shares is not None:
            yield from self._share_reasons(plan.shares)

    def _share_reasons(self, shares: NoiseShares) -> Iterator[str]:
        """Checks that the node may rely on as many honest nodes as the plan assumes."""
        trusted, colluding = self.least_honest_nodes, self.most_colluding_nodes
        if not self.allow_distributed_noise:
            yield "noise that nodes share is not allowed (allow_distributed_noise)"
        elif trusted is None:
            yield "the policy names no least_honest_nodes"
        elif colluding is None:
            yield "the policy names no most_colluding_nodes"
        elif shares.honest_nodes > trusted:
            yield f"the plan assumes {shares.honest_nodes} honest nodes, and the policy {trusted}"
        elif shares.max_colluding < colluding:
            yield f"the plan allows for {shares.max_colluding} colluding nodes, not {colluding}"

    def _unit_reasons(self, plan: UserPlan) -> Iterator[str]:
        """Checks the column and the cap of a user, which the node determines."""
        if self.unit_column is None:
            yield "the policy names no unit_column, so the server cannot choose one"
        elif plan.unit_column != self.unit_column:
            yield f"unit_column {plan.unit_column!r} is not {self.unit_column!r}"
        cap = self.max_records_per_unit
        if cap is not None and plan.max_records_per_unit > cap:
            yield f"max_records_per_unit {plan.max_records_per_unit} is above {cap}"

    def _metric_reasons(self, plan: PrivatePlan) -> Iterator[str]:
        """Checks that a metric, if allowed at all, has enough noise."""
        noise = plan.metric_noise_multiplier
        if noise is None:
            return
        if self.metrics == "none":
            yield "no metric may leave"
        elif self.min_metric_noise_multiplier is None or noise < self.min_metric_noise_multiplier:
            bound = self.min_metric_noise_multiplier
            yield f"metric_noise_multiplier {noise:g} is below {bound if bound is not None else 'any'}"


def check_protocol(shares: NoiseShares) -> None:
    """Refuses a protocol that would show a real node's part of a sum to the server.

    Raises:
        PolicyRefused: The protocol is for simulations.
    """
    if shares.protocol == "ideal":
        raise PolicyRefused(
            'secure_aggregation.protocol="ideal" is for simulations: the server could read what this '
            "node sends, which has only a share of the noise"
        )


def open_policy(path: Path) -> NodePolicy:
    """Reads a policy file for the node's own operator: errors show its content.

    Raises:
        ConfigError: It is missing, unreadable or invalid: lists every problem.
    """
    return read_file(path, NodePolicy)


def read_policy(path: Path) -> NodePolicy:
    """Reads a policy file on behalf of a server.

    Raises:
        PolicyRefused: It is missing, unreadable or invalid: then nothing is allowed. The message
            contains no path beyond the file's name and no value, since the server sees it.
    """
    try:
        return open_policy(path)
    except ConfigError as error:
        raise PolicyRefused(f"{_without_values(path, error)}, so it trains nothing") from error


def _without_values(path: Path, error: ConfigError) -> str:
    """Describes what is wrong with a policy, without anything that a server must not learn."""
    if not path.exists():
        return f"this node has no {path.name}"
    keys = sorted({problem.key for problem in error.problems} - {str(path)})
    if not keys:
        return f"the node's {path.name} cannot be read"
    named = ", ".join(key.removeprefix(f"{path.name}: ") for key in keys)
    return f"the node's {path.name} is invalid ({named})"
