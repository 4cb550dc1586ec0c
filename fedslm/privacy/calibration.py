"""What is asked, turned into a plan that keeps it: the noise is found, or a given noise is checked."""

from __future__ import annotations

from typing import Any, assert_never

from fedslm.config import PrivacyConfig, TrainingConfig
from fedslm.errors import PrivacyError
from fedslm.privacy import accounting
from fedslm.privacy.plan import ExamplePlan, NoPrivacy, PatientPlan, Plan
from fedslm.records import Event


def calibrated(privacy: PrivacyConfig, training: TrainingConfig, rounds: int) -> Plan:
    """Turns what is asked into what will run, for the worst case: a client joins every round.

    Args:
        privacy: What is asked.
        training: Steps and batch size.
        rounds: Rounds of the run; ``privacy.spare_rounds`` come on top.

    Returns:
        The plan that every client follows.

    Raises:
        PrivacyError: A value is missing or out of reach, or a given noise multiplier would exceed
            epsilon.

    References:
        The accountant is :mod:`fedslm.privacy.accounting`.
    """
    match privacy.unit:
        case "none":
            return NoPrivacy(training.batch_size, training.local_steps)
        case "record":
            return ExamplePlan(**_mechanism(privacy, training, rounds))
        case "patient":
            cap = privacy.max_records_per_unit
            if cap is None or privacy.unit_column is None:
                raise PrivacyError("privacy.unit='patient' needs unit_column and max_records_per_unit")
            mechanism = _mechanism(privacy, training, rounds)
            return PatientPlan(**mechanism, unit_column=privacy.unit_column, max_records_per_unit=cap)
        case "client":
            raise PrivacyError("privacy.unit='client' needs secure aggregation, which is not there yet")
        case _:
            assert_never(privacy.unit)


def _mechanism(privacy: PrivacyConfig, training: TrainingConfig, rounds: int) -> dict[str, Any]:
    """The fields that all DP-SGD plans share, calibrated over all steps that a client can take."""
    epsilon, delta = privacy.epsilon, privacy.delta
    clip_norm, sample_rate = privacy.clip_norm, privacy.sample_rate
    if epsilon is None or delta is None or clip_norm is None or sample_rate is None:
        raise PrivacyError("privacy needs epsilon, delta, clip_norm and sample_rate; none is assumed")
    rounds += privacy.spare_rounds
    steps = rounds * training.local_steps
    metric = privacy.metric_noise_multiplier
    others = [] if metric is None else [Event(1.0, metric, rounds)]
    noise = privacy.noise_multiplier
    if noise is None:
        noise = accounting.calibrate(epsilon, delta, sample_rate, steps, others)
    spent = accounting.epsilon([Event(sample_rate, noise, steps), *others], delta)
    if spent > epsilon:
        raise PrivacyError(
            f"privacy.noise_multiplier={noise} costs epsilon={spent:.3f} over {steps} steps, more "
            f"than privacy.epsilon={epsilon}; raise either, or leave noise_multiplier out"
        )
    return {
        "epsilon": epsilon,
        "delta": delta,
        "clip_norm": clip_norm,
        "noise_multiplier": noise,
        "sample_rate": sample_rate,
        "normaliser": training.batch_size,
        "steps_per_round": training.local_steps,
        "rounds": rounds,
        "metric_noise_multiplier": metric,
        "batched": privacy.batched,
    }
