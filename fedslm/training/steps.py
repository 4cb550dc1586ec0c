"""One optimizer step on a logical batch: plain, or DP-SGD through Opacus' optimizer.

The plan's type decides which one runs; only :func:`stepping` makes that decision.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from fedslm.errors import NotRepeated, PrivacyError, TrainingError, plural
from fedslm.models.loaded import LoadedModel
from fedslm.models.lora_layers import fused
from fedslm.privacy.plan import MOST_RECORDS_PER_UNIT, Plan, PrivatePlan
from fedslm.tasks.base import Example, Task
from fedslm.tasks.passes import token_budget
from fedslm.training.batches import Unit, collated, forward, micro_batches, run
from fedslm.training.checks import raise_unless_of_a_record
from fedslm.training.noisy_optimizer import private_optimizer, sharing_optimizer
from fedslm.training.per_record import Gradients, per_record_gradients
from fedslm.training.shapes import Part, Pass, Shape, Shapes, fixed, in_shape, isolated, shared
from fedslm.training.sums import on_grid, zero_non_finite

if TYPE_CHECKING:
    from opacus.optimizers import DPOptimizer

logger = logging.getLogger(__name__)  # the client's own log
Cut = Callable[[Sequence[Unit]], Iterable[Part]]


class Step(Protocol):
    """Takes one optimizer step on a logical batch."""

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step."""


class PlainStep:
    """A step along the mean gradient over the logical batch.

    Args:
        model: The model.
        task: The task with the loss.
        optimizer: Over the trained parameters.
        micro_batch_size: Most records in one forward pass; the token budget may allow fewer.
    """

    def __init__(
        self,
        model: LoadedModel,
        task: Task,
        optimizer: torch.optim.Optimizer,
        micro_batch_size: int,
    ) -> None:
        self._model, self._task = model, task
        self._optimizer, self._micro_batch_size = optimizer, micro_batch_size
        self._layers = model.cached_layers

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step."""
        self._optimizer.zero_grad(set_to_none=True)
        count = sum(len(unit) for unit in units)
        tokens = token_budget(self._model.device.type, self._task.rows_per_example)
        for part in micro_batches(units, self._micro_batch_size, tokens=tokens):
            examples = [example for unit in part for example in unit]
            logits, batch = forward(self._model, self._task, examples, layers=self._layers)
            loss = self._task.per_example_loss(logits, batch).sum() / count
            loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()


class PrivateStep:
    """Clipped per-unit gradients, summed on an integer grid, noised and divided by a public constant.

    Formal guarantees:
        * The pre-noise sum moves by at most ``plan.clip_norm`` (L2, over all trained parameters
          jointly) when one unit is added or removed, rounding included: the gradients of a unit's
          records are summed and clipped once, as integers (:mod:`fedslm.training.sums`), and losses are
          not coupled. The premise is that a record's gradient is a function of nothing but the record,
          to the last bit:

          - ``passes = "isolated"``: no premise is needed, a unit shares no pass with another unit;
          - ``"fixed"``: it is measured for each public shape on this machine, and a random record of
            each round is computed again with other rows. :class:`NotRepeated` is raised before anything
            is released if a bit differs;
          - ``"shared"``: it holds up to rounding, which a crafted adapter can amplify.

          Cached layers keep this: what enters the first computed layer is a function of the record
          (:class:`fedslm.models.cached_layers.CachedLayers`).
        * A record whose gradient is not finite or cannot be computed contributes exactly zero. If
          memory runs out, the round ends: how much is left depends on earlier passes too.
        * An empty batch adds the same noise as any other.
        * Noise is secure randomness, with a separate stream for each round; it is added on the grid.

    Edge cases (the tests are in tests/training):
        * Empty batch: a sum of zero with the same noise. A skipped step would reveal that no unit was
          sampled, and the accountant charges one (test_an_empty_batch_is_noise_and_nothing_else).
        * A sample of one unit: divided by ``normaliser``, not by 1. A divisor that counts units would
          reveal how many there are (test_one_unit_is_divided_by_the_normaliser_too).
        * A gradient that is not finite: the record counts as zero. 0·inf is NaN: no clip factor would
          remove it (test_bad_records_leave_the_rest_of_a_patient).
        * A record of a user whose gradient is longer than 2¹⁰ clip norms is scaled down to that length
          before the user's sum, so that no sum overflows (test_a_sum_of_enormous_records_is_clipped).
        * A gradient of zero: C / 0 is infinite and is clamped to a factor of 1, which adds zero
          (test_a_gradient_of_zero_adds_zero).
        * The least clip norm, 1e-6: the bound holds. The denominator is only the norm: Opacus' norm +
          1e-6 would halve a gradient of 1e-6 (test_a_clipped_gradient_is_as_long_as_the_bound_allows).
        * A unit larger than a pass: its records are summed before the clip, in whatever passes they are
          (test_sum_equals_autograd_clipped_once_per_patient).
        * A unit without records: plans never produce one. It raises before any pass
          (test_a_unit_without_records_is_refused).

    Args:
        model: The model.
        task: The per-example loss.
        plan: Unit, passes and number of steps.
        gradients: Computes per-record gradients.
        optimizer: Opacus' optimizer.
        cut: Splits a step's units into parts.
        shapes: The shapes that ``cut`` may use.
    """

    def __init__(
        self,
        model: LoadedModel,
        task: Task,
        plan: PrivatePlan,
        *,
        gradients: Gradients,
        optimizer: DPOptimizer,
        cut: Cut,
        shapes: Shapes | None = None,
    ) -> None:
        self._model, self._task, self._gradients = model, task, gradients
        self.optimizer, self._cut, self._by_record = optimizer, cut, plan.unit == "record"
        self._clip_norm, self._layers, self._shapes = plan.clip_norm, model.cached_layers, shapes
        self._steps_before_repeat: int | None = secrets.randbelow(plan.steps_per_round)
        self._bad = torch.zeros((), dtype=torch.long, device=optimizer.params[0].device)

    def __call__(self, units: Sequence[Unit]) -> None:
        """Moves the parameters by one step.

        Raises:
            NotRepeated: The repeated pass gave other bits; the parameters have not moved.
        """
        _check_units(units)
        parts = list(self._cut(units)) or [Part(0, ())]
        repeated = self._to_repeat(parts)
        for position, part in enumerate(parts, start=1):
            self.optimizer.zero_grad(set_to_none=True)
            self._set_samples(self._sums(part, repeated))
            self.optimizer.signal_skip_step(do_skip=position < len(parts))
            self.optimizer.step()

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether passes of fixed shapes are possible: Opacus' hooks do not align their rows."""
        return self._gradients.is_aligned

    def rehearse(self, example: Example) -> None:
        """Runs one made-up record, before anything is charged.

        Raises:
            TrainingError: This model has no per-record gradients.
        """
        self._attempt([example], None)
        self._gradients.forget()

    def rows(self, each: Pass) -> torch.Tensor:
        """Computes one finite gradient for each record of a pass.

        If the pass fails, each record is tried separately, at the same shape, and one that cannot be
        computed counts as zero: a failing record moves the sum by no more than any other record.

        Returns:
            float32 of shape (records, P); valid until the next pass.

        Raises:
            TrainingError: The model has no per-record gradients, or memory ran out.
        """
        try:
            rows = self._attempt(each.records, each.shape)
        except Exception as error:  # a failing record must not be visible outside
            raise_unless_of_a_record(error)
            rows = self._one_by_one(each)
        self._bad += zero_non_finite(rows)
        return rows

    def forget_counts(self) -> None:
        """Forgets how many records counted as zero."""
        self._bad.zero_()

    def close(self) -> None:
        """Frees the gradients; writes to the client's log how many records counted as zero."""
        for parameter in self.optimizer.params:
            parameter.grad_sample = None
        if bad := int(self._bad):
            logger.warning(
                "%s had a gradient that is not finite and counted as zero", plural(bad, "record")
            )

    def _sums(self, part: Part, repeated: Pass | None) -> torch.Tensor:
        """Returns the gradient of each unit of a part, before the clip: shape (units, P)."""
        width = self._gradients.width
        if self._by_record and part.passes:  # of one pass; its records are the units
            (each,) = part.passes
            rows = self.rows(each)
            return self._repeat(each, rows) if each is repeated else rows
        device = "cpu" if self._model.device.type == "mps" else self._model.device
        total = torch.zeros((part.units, width), dtype=torch.float64, device=device)
        for each in part.passes:
            rows = self.rows(each)
            if each is repeated:
                rows = self._repeat(each, rows)
            owners = torch.tensor(each.owners, device=device)
            total.index_add_(0, owners, on_grid(rows, self._clip_norm))
        return total

    def _to_repeat(self, parts: Sequence[Part]) -> Pass | None:
        """Chooses the pass that is repeated, once in a round; None in the other steps."""
        if self._steps_before_repeat is None:  # it was
            return None
        if self._steps_before_repeat > 0:
            self._steps_before_repeat -= 1
            return None
        passes = [each for part in parts for each in part.passes]
        shaped = [each for each in passes if each.shape is not None and each.shape.records > 1]
        if not shaped:  # then the next step has one, perhaps
            return None
        self._steps_before_repeat = None
        return secrets.choice(shaped)

    def _repeat(self, each: Pass, rows: torch.Tensor) -> torch.Tensor:
        """Computes one record again, in another slot among made-up ones, and compares every bit.

        This pass has as few slots as were proved for its length: a record has the same bits at every
        proved number of slots, and few cost little. Cached layers are computed again as well; if a bit
        differs, what was kept is forgotten.

        Raises:
            NotRepeated: A bit differs.
        """
        if each.shape is None:
            raise TrainingError("internal check failed: a pass without a public shape is not repeated")
        length = each.shape.length
        proved = () if self._shapes is None else self._shapes.proved.get(length, ())
        slots = min((count for count in proved if count > 1), default=each.shape.records)
        slot, kept = secrets.randbelow(len(each.records)), rows.clone()
        other = (slot + 1 + secrets.randbelow(slots - 1)) % slots
        records = (*[self._task.made_up()] * other, each.records[slot])
        with self._afresh():
            again = self.rows(Pass(records, tuple(range(len(records))), Shape(slots, length)))[other]
        if not torch.equal(again.view(torch.int32), kept[slot].view(torch.int32)):
            self._model.forget_records()
            raise NotRepeated(
                f"a record's gradient changed with its slot or with the other records at {each.shape}: "
                f"fixed shapes do not hold on this machine"
            )
        return kept

    @contextmanager
    def _afresh(self) -> Iterator[None]:
        """Takes nothing from the cached layers inside the block, so that they are compared as well."""
        layers = self._layers
        try:
            self._layers = layers and layers.afresh()
            yield
        finally:
            self._layers = layers

    def _attempt(self, records: Sequence[Example], shape: Shape | None) -> torch.Tensor:
        """Computes the per-record gradients of one pass, float32 of shape (records, P)."""
        model, task = self._model, self._task
        if shape is None:
            batch, slots = collated(model, task, records), len(records)
        else:
            # Every position is kept: those with a label depend on the records.
            batch = in_shape(task, records, shape, int(model.tokenizer.pad_token_id))
            slots = shape.records
        logits, batch = run(model, task, batch, self._layers)
        losses = task.per_example_loss(logits, batch)
        rows = self._gradients(losses, slots * task.rows_per_example)
        if task.rows_per_example > 1:
            rows = rows.view(slots, task.rows_per_example, -1).sum(dim=1)
        return rows[: len(records)]

    def _one_by_one(self, each: Pass) -> torch.Tensor:
        """Computes the per-record gradients of a pass that failed as a whole."""
        rows = []
        for record in each.records:
            self._gradients.forget()
            try:
                rows.append(self._attempt([record], each.shape).clone())
            except Exception as error:  # the failure depends only on the record; it counts as zero
                raise_unless_of_a_record(error)
                logger.warning("a record cannot be computed and counts as zero", exc_info=True)
                rows.append(self._bad.new_zeros((1, self._gradients.width), dtype=torch.float32))
        self._gradients.forget()
        return torch.cat(rows)

    def _set_samples(self, rows: torch.Tensor) -> None:
        """Gives Opacus' optimizer each parameter's columns."""
        for parameter, place in zip(self.optimizer.params, self._gradients.places, strict=True):
            parameter.grad_sample = rows[:, place].view(len(rows), *parameter.shape)


def _check_units(units: Sequence[Unit]) -> None:
    """Refuses units that no plan produces."""
    for unit in units:
        if not 1 <= len(unit) <= MOST_RECORDS_PER_UNIT:
            raise PrivacyError(
                f"a unit has {len(unit)} records; it must have 1 to {MOST_RECORDS_PER_UNIT}"
            )


@contextmanager
def stepping(
    model: LoadedModel,
    task: Task,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    micro_batch_size: int,
    *,
    shapes: Shapes | None = None,
) -> Iterator[Step]:
    """Yields the step that a plan requires, and removes what it attached to the network.

    Args:
        model: The model; its trained parameters are those that require gradients.
        task: The per-example loss.
        plan: The plan that will be charged.
        optimizer: Over the trained parameters.
        micro_batch_size: Most records in one forward pass.
        shapes: The public shapes that were proved on this machine; without them, a plan with
            ``passes = "fixed"`` runs isolated.
    """
    if not isinstance(plan, PrivatePlan):
        with fused(model.adapter.network):
            yield PlainStep(model, task, optimizer, micro_batch_size)
        return
    sharing = plan.shares is not None
    private = sharing_optimizer(optimizer, plan) if sharing else private_optimizer(optimizer, plan)
    with per_record_gradients(model.adapter.network, private.params) as gradients:
        tokens = token_budget(model.device.type, task.rows_per_example)
        if plan.passes == "fixed" and shapes is not None and gradients.is_aligned:
            cut: Cut = partial(
                fixed, shapes=shapes, values=gradients.width, by_record=plan.unit == "record"
            )
        elif plan.passes == "shared":
            cut = partial(shared, most_records=micro_batch_size, most_tokens=tokens)
        else:
            cut = partial(isolated, most_tokens=tokens)
        step = PrivateStep(
            model, task, plan, gradients=gradients, optimizer=private, cut=cut, shapes=shapes
        )
        yield step
        step.close()
