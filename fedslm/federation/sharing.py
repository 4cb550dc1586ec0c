"""Contradictions among the options of noise that clients share."""

from __future__ import annotations

from collections.abc import Iterator

from fedslm.config import Config, PrivacyConfig
from fedslm.errors import Problem
from fedslm.privacy.plan import ONE_STEP
from fedslm.secagg.cohort import MOST_NODES, threshold_for
from fedslm.secagg.roster import MOST_MEMBERS

_DEFAULT_BOUND = 3.0


def sharing_problems(config: Config) -> Iterator[Problem]:
    """Everything that a sum with shared noise does not allow, each with its reason.

    What depends on method, rule and compression is in :mod:`fedslm.aggregation.compatibility`.
    """
    secure = config.secure_aggregation
    if not config.privacy.shares_noise:
        if secure.threshold is not None:
            message = 'is only for privacy.noise="distributed"; leave it out'
            yield Problem("secure_aggregation.threshold", message)
        return
    yield from _nodes(config)
    yield from _step(config)
    if config.engine.name == "deployed" and secure.protocol == "ideal":
        message = (
            f"value {secure.protocol!r} is for simulations: the server could read what a node sends, "
            f'with only a share of the noise; real nodes need "masked"'
        )
        yield Problem("secure_aggregation.protocol", message)
    if config.privacy.overlapping and config.privacy.unit != "client":
        message = (
            'must be false with privacy.noise="distributed": a unit in several clients would move the '
            "sum several times, and the noise is for once"
        )
        yield Problem("privacy.overlapping", message)
    if config.privacy.metric_noise_multiplier is not None:
        message = (
            'is a figure of each client, and privacy.noise="distributed" shows sums only; leave it out'
        )
        yield Problem("privacy.metric_noise_multiplier", message)


def _nodes(config: Config) -> Iterator[Problem]:
    """The threshold is set, can be reached, and leaves honest clients to share the noise."""
    secure, cohort = config.secure_aggregation, config.federation.cohort_size
    key = "secure_aggregation.threshold"
    if secure.threshold is None:
        message = (
            f'is required with privacy.noise="distributed": the fewest of the {cohort} clients of a '
            f"round whose sum is formed, such as {max(2, -(-2 * cohort // 3))}"
        )
        yield Problem(key, message)
        return
    if secure.threshold > cohort:
        yield Problem(key, f"value {secure.threshold} exceeds the cohort of {cohort}")
    if secure.protocol == "masked":
        yield from _masked(config, secure.threshold)
    if secure.threshold - secure.max_colluding < 2:
        message = (
            f"value {secure.max_colluding} leaves {secure.threshold - secure.max_colluding} honest of "
            f"secure_aggregation.threshold={secure.threshold} clients; at least 2 must share the noise"
        )
        yield Problem("secure_aggregation.max_colluding", message)


def _masked(config: Config, threshold: int) -> Iterator[Problem]:
    """What the protocol asks of a cohort, further to the noise."""
    cohort, max_colluding = config.federation.cohort_size, config.secure_aggregation.max_colluding
    if config.federation.num_clients > MOST_MEMBERS:
        message = (
            f'value "masked" is for up to {MOST_MEMBERS:,} clients, all of them on one signed roster; '
            f'in a simulation of more, set "ideal"'
        )
        yield Problem("secure_aggregation.protocol", message)
    elif cohort > MOST_NODES:
        message = (
            f'value "masked" is for cohorts of up to {MOST_NODES} clients, of which each shares a mask '
            f"with every other, and this one has {cohort}; set federation.clients_per_round, or, in a "
            f'simulation, "ideal"'
        )
        yield Problem("secure_aggregation.protocol", message)
    elif threshold < (least := threshold_for(cohort, min(max_colluding, cohort - 1))):
        message = (
            f"value {threshold} must be at least {least} for {cohort} clients of which {max_colluding} "
            f"may collude with the server: with fewer it could learn two sums"
        )
        yield Problem("secure_aggregation.threshold", message)


def client_problems(privacy: PrivacyConfig) -> Iterator[Problem]:
    """What a whole client as the unit does not allow."""
    if privacy.sample_rate not in (None, 1.0):
        message = (
            f'value {privacy.sample_rate:g} has no effect with unit="client": a client takes part with '
            f"all of its records, and that it does is public; leave it out"
        )
        yield Problem("privacy.sample_rate", message)
    if privacy.overlapping:
        message = 'is for records and users; a client is in one place: leave it out with unit="client"'
        yield Problem("privacy.overlapping", message)


def _step(config: Config) -> Iterator[Problem]:
    """A client takes one plain step if records are the unit, and the server bounds no update."""
    training, by_record = config.training, config.privacy.unit != "client"
    if by_record and training.local_steps != 1:
        message = f'value {training.local_steps} must be 1 with privacy.noise="distributed": {ONE_STEP}'
        yield Problem("training.local_steps", message)
    if by_record and training.weight_decay:
        message = f'value {training.weight_decay} must be 0 with privacy.noise="distributed"'
        yield Problem("training.weight_decay", message)
    if config.aggregation.norm_bound != _DEFAULT_BOUND:
        message = (
            f"value {config.aggregation.norm_bound:g} has no effect with "
            f'privacy.noise="distributed": the server sees no update that it could bound; leave it out'
        )
        yield Problem("aggregation.norm_bound", message)
