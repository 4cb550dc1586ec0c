"""A private round: check, charge, compute and release, in this order."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import fedslm
from fedslm import layout
from fedslm.adapter_keys import delta_keys, key_of, layers_of
from fedslm.aggregation.methods import METHODS, trained_keys
from fedslm.attestations import Places
from fedslm.client.fixed_shapes import shapes_here
from fedslm.client.membership import member_of, requirements_of
from fedslm.client.node import Release
from fedslm.client.records import ClientRecords
from fedslm.client.round import ClientRound
from fedslm.client.self_test_gate import attest
from fedslm.client.update import make_share, make_update
from fedslm.errors import BudgetExceeded, FederationError, PolicyRefused, PrivacyError
from fedslm.models.loaded import LoadedModel
from fedslm.privacy.encoding import Words
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.lines import ADAPTER, METRIC, Charge
from fedslm.privacy.plan import METRIC_SENSITIVITY, ClientPlan, PrivatePlan, UserPlan
from fedslm.privacy.verified import verified
from fedslm.protocol.loading import model_for, task_for
from fedslm.protocol.messages import Reply
from fedslm.protocol.setup import Setup
from fedslm.records import AdapterState
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.kept import INPUT

if TYPE_CHECKING:
    from fedslm.training.shapes import Shapes


def answer_privately(client_round: ClientRound, plan: PrivatePlan) -> Reply:
    """Charges, trains, keeps the release for a repeated request, and answers.

    Formal guarantees:
        * Every check that can refuse runs before a record is read: the time of a refusal reveals
          nothing about the records.
        * The charge is on disk before training starts. If training fails, the charge stays.
        * The same request again gets the stored release, free of charge, and no record is read.

    Raises:
        PolicyRefused: The plan, the setup or this machine does not allow private training.
        BudgetExceeded: The ledger does not allow the charge.
        FederationError: The adapter does not fit the model here.
    """
    request, node = client_round.request, client_round.node
    _verify(plan, node.attestations)
    ledger = node.ledger(plan.unit)
    ledger.extension(request.seen)  # before any charge: a ledger that lost lines takes no more
    if plan.shares is not None and plan.shares.protocol == "masked":
        return _answer_masked(client_round, plan, ledger)
    again = node.kept(ledger.released(client_round.request_sha256))
    if again is not None:
        return client_round.reply(again, ledger=ledger)
    paid = _pay(client_round, plan, ledger)
    make = make_update if plan.shares is None else make_share
    release = make(client_round, paid.records.trained, paid.shapes)
    if plan.metric_event is not None:
        release = replace(release, metric=_metric(client_round, paid.records, plan))
    node.keep(release)
    paid.commit(ledger, release)
    return client_round.reply(release, ledger=ledger)


def _answer_masked(client_round: ClientRound, plan: PrivatePlan, ledger: Ledger) -> Reply:
    """Answers with a part of a sum that only the sum's masks can be removed from.

    Formal guarantees, further to those of :func:`answer_privately`:
        * The part without its masks is neither sent nor written to disk.
        * The same leg again gets the same masked part. Another leg of the same round is refused: no
          second noise is drawn for it (:class:`fedslm.secagg.node.Node`).
        * The cohort leaves as many honest nodes as the noise of *this* request's plan assumes, and all
          of them follow that plan.

    Raises:
        PolicyRefused: The request is not the third leg of a round that this node takes part in.
    """
    leg, setup = client_round.request.leg, client_round.setup
    if leg is None or leg.name != INPUT:
        raise PolicyRefused(
            'secure_aggregation.protocol="masked": this node sends nothing but a masked part of a sum, '
            "and the request does not ask for one"
        )
    paid: list[_Paid] = []

    def part(cohort: Cohort) -> Words:
        if cohort.round != client_round.request.round:
            raise PolicyRefused(f"the cohort is for round {cohort.round}, and the request is not")
        requirements_of(setup).check(cohort)
        paid.append(_pay(client_round, plan, ledger))
        words = make_share(client_round, paid[0].records.trained, paid[0].shapes).words
        if words is None:
            raise PrivacyError("internal check failed: there is no part of a sum")
        return words

    sent = member_of(client_round.node, setup).masked_input(leg.body, part)
    release = Release(AdapterState({}), words=sent.vector)
    for each in paid:
        each.commit(ledger, release)
    return replace(client_round.reply(release, ledger=ledger), body=sent.head)


def check_affordable(client_round: ClientRound, plan: PrivatePlan) -> None:
    """Refuses a round that the ledger does not allow, before other clients' budget depends on it.

    Raises:
        BudgetExceeded: A limit would be exceeded.
        PolicyRefused: The ledger counts in another unit, or the run began with another plan.
    """
    ledger = client_round.node.ledger(plan.unit)
    _rounds_charged(client_round, ledger, plan)
    ledger.check(_charges(client_round, plan), client_round.node.limits(plan))


@dataclass(frozen=True)
class _Paid:
    """A round that was charged, and what training needs.

    Attributes:
        client_round: The round.
        reserved: Index of each charge in the ledger.
        charges: The charges.
        records: The client's records.
        shapes: The public shapes that were measured here.
        is_last: Whether the plan pays for no further round.
    """

    client_round: ClientRound
    reserved: list[int]
    charges: list[Charge]
    records: ClientRecords
    shapes: Shapes | None
    is_last: bool

    def commit(self, ledger: Ledger, release: Release) -> None:
        """Records which bytes the charges paid for, before they are sent."""
        hashes = release.hashes()
        for index, charge in zip(self.reserved, self.charges, strict=True):
            ledger.commit(index, hashes[charge.purpose])
        if self.is_last:
            self.client_round.forget_records()


def _pay(client_round: ClientRound, plan: PrivatePlan, ledger: Ledger) -> _Paid:
    """Makes every check that can refuse, then charges; the charge is on disk on return."""
    _check_request(client_round, plan)
    _attest(client_round)
    charged = _rounds_charged(client_round, ledger, plan)
    charges, limits = _charges(client_round, plan), client_round.node.limits(plan)
    ledger.check(charges, limits)  # before a record is read: the time of a refusal reveals nothing
    shapes = shapes_here(client_round)  # after it: a request that cannot be charged measures nothing
    records = client_round.records(has_begun=charged > 0)
    charges = [replace(charge, dataset_commitment=records.commitment) for charge in charges]
    reserved = ledger.reserve(charges, limits)
    is_last = charged + 1 == plan.rounds
    return _Paid(client_round, reserved, charges, records, shapes, is_last)


def _attest(client_round: ClientRound) -> None:
    """Lets this code train only if it has passed its self-test on the device that will train."""
    node, device = client_round.node, client_round.setup.model.device
    record = None if node.deployed else node.directory.parent / layout.SELF_TEST
    attest(node.attestations, device=device, record=record)


def _check_request(client_round: ClientRound, plan: PrivatePlan) -> None:
    """Refuses what cannot be private, and an adapter that does not fit, before any charge."""
    from fedslm.training.checks import check_private_model

    if client_round.request.control:
        raise PolicyRefused("control variates are refused under privacy")
    if client_round.setup.lora.dropout > 0:
        raise PolicyRefused("LoRA dropout couples the records of a batch; it must be 0 under privacy")
    if plan.shares is not None:
        _check_sum(client_round.setup)
    if isinstance(plan, ClientPlan):  # its steps are plain: no record has a gradient of its own
        _check_adapter(client_round.start.adapter, client_round.model)
        return
    if plan.passes == "shared" and client_round.model.is_rounded:
        raise PolicyRefused(
            "shared passes need a base in float32: the rounding of bfloat16 lets units "
            "change one another's gradients by 1 % and more"
        )
    check_private_model(client_round.model.adapter.network)
    _check_adapter(client_round.start.adapter, client_round.model)
    _rehearsed(client_round.setup)


def _check_sum(setup: Setup) -> None:
    """Refuses what a sum over clients with shared noise does not allow, whatever the server did.

    Raises:
        PolicyRefused: Some of the trained tensors would stay here, or be of another size at another
            client.
    """
    if METHODS[setup.method].local or METHODS[setup.method].family != "linear":
        raise PolicyRefused(f"aggregation.method={setup.method!r} is not a sum over clients")
    if setup.lora.client_ranks:
        raise PolicyRefused("clients of several ranks have no common sum")


def _rounds_charged(client_round: ClientRound, ledger: Ledger, plan: PrivatePlan) -> int:
    """Number of rounds that this run was charged for under its plan so far.

    Raises:
        BudgetExceeded: The plan pays for no more rounds.
    """
    setup = client_round.setup
    of_run = (setup.run_id, setup.plan_sha256, ADAPTER)
    charged = sum(
        (charge.run, charge.plan_sha256, charge.purpose) == of_run for charge in ledger.read().charges
    )
    if charged >= plan.rounds:
        raise BudgetExceeded(
            f"budget exhausted: this run was charged for {charged} rounds here, and its plan pays for "
            f"{plan.rounds}"
        )
    return charged


def _check_adapter(whole: AdapterState, model: LoadedModel) -> None:
    """Refuses tensors that do not fit the model, before any charge for them."""
    fitting = {key: tuple(each.shape) for key, each in model.adapter.parameters.items()}
    own = whole.select(set(whole) - delta_keys(whole))
    if own.shapes != fitting or not whole.is_finite() or not _deltas_fit(whole):
        raise FederationError("the adapter does not fit the model here, or is not finite")


def _deltas_fit(whole: AdapterState) -> bool:
    """True if the tensors that aggregation set aside have the layers' widths, and both factors."""
    shapes, layers = whole.shapes, set(layers_of(whole))
    if {key.rsplit(".", 2)[0] for key in delta_keys(whole)} - layers:
        return False
    for layer in layers:
        right, left = shapes.get(key_of(layer, "delta_A")), shapes.get(key_of(layer, "delta_B"))
        width, height = shapes[key_of(layer, "lora_A")][1], shapes[key_of(layer, "lora_B")][0]
        if (right, left) == (None, None):
            continue
        if right is None or left is None or len(right) != 2 or len(left) != 2:
            return False
        if (right[1], left[0], right[0]) != (width, height, left[1]) or right[0] > min(width, height):
            return False
    return True


@lru_cache(maxsize=8)
def _rehearsed(setup: Setup) -> None:
    """Runs the rehearsal with the model that is loaded for a setup, once per process."""
    from fedslm.training.local import rehearse

    model = model_for(setup)
    if isinstance(setup.plan, PrivatePlan):
        for turn in (1, 2):
            rehearse(
                model,
                task_for(setup),
                setup.plan,
                trained_keys(setup.method, model.adapter.parameters, turn),
            )


@lru_cache(maxsize=8)
def _verify(plan: PrivatePlan, places: Places) -> None:
    """Checks the server's claim with this node's own accountants, once for each plan.

    Raises:
        PolicyRefused: The plan costs more than it claims, or the accountants disagree.
    """
    try:
        verified(plan, places)
    except PrivacyError as error:
        raise PolicyRefused(f"the plan is refused: {error}") from error


def _charges(client_round: ClientRound, plan: PrivatePlan) -> list[Charge]:
    """The charges of a round with everything they are bound to, except for the records."""
    setup = client_round.setup
    training = Charge(
        event=plan.training_event,
        purpose=ADAPTER,
        clip_norm=plan.clip_norm,
        delta=plan.delta,
        run=setup.run_id,
        round=client_round.request.round,
        plan_sha256=setup.plan_sha256,
        request_sha256=client_round.request_sha256,
        base_sha256=setup.base_sha256,
        config_sha256=setup.config_sha256,
        code_version=fedslm.__version__,
        dataset_commitment="",
        unit=plan.unit,
        unit_column=plan.unit_column if isinstance(plan, UserPlan) else None,
        max_records_per_unit=plan.max_records_per_unit if isinstance(plan, UserPlan) else None,
        normaliser=plan.normaliser,
        protocol=None if plan.shares is None else plan.shares.protocol,
    )
    metric = plan.metric_event
    if metric is None:
        return [training]
    return [
        training,
        replace(training, event=metric, purpose=METRIC, clip_norm=METRIC_SENSITIVITY),
    ]


def _metric(
    client_round: ClientRound, records: ClientRecords, plan: PrivatePlan
) -> tuple[float, float]:
    """The noised score of the server's adapter on the client's own (or held-out) records."""
    from fedslm.training.metric import noisy_metric

    start = client_round.start.adapter
    return noisy_metric(client_round.model, client_round.task, records.measured, start, plan)
