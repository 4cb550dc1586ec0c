"""Tests whether the bits of a record's gradient depend only on the record, for each public shape.

With ``passes = "fixed"`` several records share a pass. The bound on one unit is then exact for every
adapter if a row's bits depend neither on its slot nor on the other rows. No documentation of a kernel
promises that, so it is measured: on this machine, with this base and these libraries.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from fedslm.adapter_keys import part_of
from fedslm.errors import TrainingError
from fedslm.models.initial import initial_state
from fedslm.models.loaded import LoadedModel
from fedslm.models.networks import inner
from fedslm.privacy.plan import ExamplePlan
from fedslm.records import AdapterState
from fedslm.rng import stream
from fedslm.tasks.base import Example, Task
from fedslm.training.local import enter_training
from fedslm.training.shapes import Job, Pass, Shape, Shapes, candidates
from fedslm.training.steps import PrivateStep, stepping
from fedslm.training.sums import clipped

logger = logging.getLogger(__name__)
TRIALS = 64  # least comparisons of a record's bits for each padded length
TRIALS_OF_OTHERS = 8  # ... and for each number of slots below the largest
PASSES = (
    36  # least for each number of slots on a GPU, a third at each scale: with two threads on a CPU,
)
# the record in the slot where they met had other bits in one pass of three, at some scales only
_HALF_EMPTY = 0.2  # share of the passes
_SCALES = (1.0, 5.0, 30.0)  # of the adapter: a large one lets rounding decide
_OVERFLOWS = 1e8
_WILD = (float("nan"), float("inf"), 1e30, 1e-42)  # factors on a neighbour's embeddings
_PLAN = ExamplePlan(8.0, 1e-5, 1.0, 1.0, 0.5, 1, 1)


def proved_shapes(
    model: LoadedModel, task: Task, trained: frozenset[str], longest: int, most_records: int
) -> Shapes:
    """Measures the candidate shapes and returns those that hold.

    Formal guarantees:
        * For each padded length that is returned, in at least :data:`TRIALS` comparisons on this
          machine (and :data:`TRIALS_OF_OTHERS` for each smaller number of slots; on a GPU, in
          :data:`PASSES` passes for each number of slots), a record's gradient and
          its clipped integer vector had the same bits in other slots, with other records, empty slots,
          and a row of NaN, infinity, enormous or denormal values, under adapters of several scales.
          This is a measurement, not a proof for all inputs: the step computes a record again in
          each round as well.
        * A shape with a single difference, or that cannot be computed, is left out.
        * Where layers are cached (:mod:`fedslm.models.cached_layers`), the measured passes begin above
          them, as those of training do. A record's states are computed in a separate pass, so no
          other record can change them, and the wild row's factor is on what enters the first computed
          layer.

    On a CPU no shape holds in a process with several threads: where two of them meet within a row, its
    bits changed with its slot in some passes only (stories260K, 2026-11), and a measurement may miss
    that. None is measured for a base of more than 50 M parameters: sharing a pass saves little there,
    and measuring takes minutes.

    Args:
        model: The model; its adapter is overwritten.
        task: The task that is trained.
        trained: Keys of the trained tensors.
        longest: Longest record, in tokens.
        most_records: Most records in a pass.
    """
    job = Job(
        base_parameters=sum(each.numel() for each in model.adapter.network.parameters()),
        trained_values=sum(model.adapter.parameters[key].numel() for key in trained),
        longest=longest,
        most_records=most_records,
        rows=task.rows_per_example,
        on_gpu=model.device.type != "cpu",
        positions=_positions(model),
    )
    if not job.on_gpu and torch.get_num_threads() > 1:
        logger.info("with several threads on a CPU, records share no passes")
        return Shapes({})
    model.adapter.train_only(set(trained))
    enter_training(model)
    parameters = [p for p in model.adapter.parameters.values() if p.requires_grad]
    proved: dict[int, tuple[int, ...]] = {}
    try:
        with stepping(
            model, task, _PLAN, torch.optim.SGD(parameters, lr=1.0), 1, shapes=Shapes({})
        ) as step:
            if not isinstance(step, PrivateStep) or not step.has_fixed_shapes:
                return Shapes({})
            for length, counts in candidates(job).items():
                if agreeing := _Trial(model, task, step).counts_that_agree(length, counts):
                    proved[length] = agreeing
            step.forget_counts()  # the wild rows are made up
    finally:
        model.forget_records()  # made-up ones
        model.adapter.network.eval()
    return Shapes(proved)


def _positions(model: LoadedModel) -> int:
    """Returns the most tokens that the base says it reads; 0 if it says nothing."""
    config = inner(model.adapter.network.get_base_model()).config  # type: ignore[operator]
    return int(getattr(config, "max_position_embeddings", None) or 0)


def _may_split_rows(model: LoadedModel) -> bool:
    """Whether a row's work may be divided at places that depend on the other rows, as on a GPU."""
    return model.device.type != "cpu"


class _Trial:
    """The comparisons for one model.

    Args:
        model: The model, in training mode.
        task: The task.
        step: A private step of this model.
    """

    def __init__(self, model: LoadedModel, task: Task, step: PrivateStep) -> None:
        self._model, self._task, self._step = model, task, step
        self._random = stream(0, "bit-proof")
        self._is_split = _may_split_rows(model)
        self.last_pass_moves = False  # whether every record of the last pass had a gradient

    def counts_that_agree(self, length: int, counts: Sequence[int]) -> tuple[int, ...]:
        """Returns the numbers of slots at which records have the same bits; empty if too few agree.

        Args:
            length: Padded length.
            counts: Numbers of slots, the largest last.
        """
        slots, others = counts[-1], counts[:-1]
        differing: set[int] = set()
        passes = -(-PASSES // len(_SCALES)) if self._is_split else 1
        # The same at every scale: cached layers, which no adapter changes, compute each record once.
        chosen = self._records(length, slots)
        try:
            for number, scale in enumerate((*_SCALES, _OVERFLOWS)):
                self._scale(scale)
                reference = dict(zip(chosen, self._bits(chosen, slots, length), strict=True))
                if scale == 1.0 and not self.last_pass_moves:
                    raise TrainingError("made-up records have no gradient, which tests nothing")
                trials = -(-TRIALS // len(_SCALES))
                if not self._agrees(reference, slots, length, trials, passes):
                    raise TrainingError("a record has other bits in another slot or with other records")
                if scale == _OVERFLOWS:
                    continue
                # One thread chooses its kernels only by the shape: one scale shows them.
                for count in others if self._is_split else others[number :: len(_SCALES)]:
                    if count not in differing and not self._agrees(
                        reference, count, length, TRIALS_OF_OTHERS, passes
                    ):
                        differing.add(count)
        except (TrainingError, RuntimeError) as error:
            logger.warning("%d records of %d tokens cannot share a pass: %s", slots, length, error)
            return ()
        return tuple(sorted({*counts} - differing))

    def _agrees(
        self, reference: Mapping[Example, bytes], count: int, length: int, trials: int, passes: int
    ) -> bool:
        """Whether records have the reference's bits, in so many comparisons and passes at least."""
        while trials > 0 or passes > 0:
            compared = self._compared(reference, count, length)
            if compared is None:
                return False
            trials, passes = trials - compared, passes - 1
        return True

    def _compared(self, reference: Mapping[Example, bytes], count: int, length: int) -> int | None:
        """Compares shuffled records with the reference, with a wild row and empty slots.

        Returns:
            How many records were compared; None if one has other bits.
        """
        order = self._random.permutation(len(reference))[:count]
        records = [list(reference)[number] for number in order]
        if count == 1:
            return 1 if self._bits(records, 1, length) == [reference[records[0]]] else None
        if self._random.random() < _HALF_EMPTY:
            records = records[: count // 2]
        odd, factor = int(self._random.integers(count)), float(self._random.choice(_WILD))
        with _wild_row(self._model, odd, factor, self._task.rows_per_example):
            bits = self._bits(records, count, length)
        same = [
            found == reference[record]
            for slot, (record, found) in enumerate(zip(records, bits, strict=True))
            if slot != odd
        ]
        return len(same) if all(same) else None

    def _bits(self, records: Sequence[Example], slots: int, length: int) -> list[bytes]:
        """Returns the bits of each record's gradient and of its clipped integer vector."""
        rows = self._step.rows(Pass(tuple(records), tuple(range(len(records))), Shape(slots, length)))
        self.last_pass_moves = bool(rows.any(dim=1).all())
        whole = clipped(rows, _PLAN.clip_norm)
        both = zip(rows.cpu().numpy(), whole.cpu().numpy(), strict=True)
        return [gradient.tobytes() + integers.tobytes() for gradient, integers in both]

    def _scale(self, scale: float) -> None:
        """Writes a random adapter; no tensor is zero, except B where only the head is trained."""
        shapes = {key: tuple(each.shape) for key, each in self._model.adapter.parameters.items()}
        start = initial_state(shapes, 0)
        noisy = {
            key: scale * (value + 0.1 * self._random.standard_normal(value.shape))
            for key, value in start.tensors.items()
            if not (self._model.only_head and part_of(key) == "lora_B")
        }
        self._model.adapter.write(
            AdapterState({key: value.astype(np.float32) for key, value in noisy.items()})
        )

    def _records(self, length: int, count: int) -> list[Example]:
        """Returns different random records that fit a length; the first one is as long as fits."""
        lengths = [length - 1, *self._random.integers(5, length, count - 1)]
        return [self._record(int(each)) for each in lengths]

    def _record(self, length: int) -> Example:
        """Returns a record of random tokens."""
        made = self._task.made_up(length)
        rejected = made.rejected and replace(made.rejected, input_ids=self._tokens(length))
        return replace(made, input_ids=self._tokens(length), rejected=rejected)

    def _tokens(self, length: int) -> tuple[int, ...]:
        """Returns random tokens of the base's vocabulary."""
        return tuple(int(token) for token in self._random.integers(0, self._model.vocabulary, length))


@contextmanager
def _wild_row(model: LoadedModel, slot: int, factor: float, rows: int) -> Iterator[None]:
    """Multiplies one record's embeddings, or its states from cached layers, by a factor."""

    def spoil(states: torch.Tensor) -> torch.Tensor:
        changed = states.clone()
        changed[slot * rows : (slot + 1) * rows] *= factor
        return changed

    with ExitStack() as stack:
        if model.cached_layers is not None:
            first = model.cached_layers.prefix.entry
            handle = first.register_forward_pre_hook(lambda _, inputs: (spoil(inputs[0]), *inputs[1:]))
            stack.callback(handle.remove)
            yield
            return
        network = inner(model.adapter.network.get_base_model())  # type: ignore[operator]
        rows_of_table = network.get_input_embeddings().num_embeddings
        for module in network.modules():  # T5's encoder and decoder have a table each, with one weight
            if isinstance(module, nn.Embedding) and module.num_embeddings == rows_of_table:
                handle = module.register_forward_hook(lambda _, __, output: spoil(output))
                stack.callback(handle.remove)
        yield
