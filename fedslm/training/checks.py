"""Self-checks of local training: hard failures instead of training that silently does nothing.

Each check covers a failure that was seen in practice: an optimizer with stale parameters, an adapter
that never moves, bytes that reload as something else.
"""

from __future__ import annotations

from typing import Any

import torch

from fedslm.errors import PrivacyError, TrainingError
from fedslm.models import families
from fedslm.models.adapter import AttachedAdapter
from fedslm.records import AdapterState

_NO_MEMORY = ("DefaultCPUAllocator", "CUDA error: out of memory")  # torch's: plain RuntimeErrors


def raise_unless_of_a_record(error: Exception) -> None:
    """Raises an error that may depend on more than the record at which it happened.

    Raises:
        TrainingError: It is the model's, or memory ran out.
    """
    if isinstance(error, TrainingError):
        raise error
    refused = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if refused or any(words in str(error) for words in _NO_MEMORY):
        raise TrainingError(
            "memory ran out: give the node more, or lower task.max_length, lora.rank "
            "or training.micro_batch_size"
        ) from error


def check_parameters(adapter: AttachedAdapter, optimizer: torch.optim.Optimizer) -> None:
    """Checks that the optimizer holds exactly the module's trained parameters, all on one device.

    Raises:
        TrainingError: The parameters differ, or are on several devices.
    """
    held = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    trained = {id(p): p for p in adapter.network.parameters() if p.requires_grad}
    named = {id(p) for p in adapter.parameters.values() if p.requires_grad}
    if not trained or not held.keys() == trained.keys() == named:
        raise TrainingError(
            f"the optimizer holds {len(held)} tensors, the module trains {len(trained)} and the "
            f"adapter names {len(named)}: these must be the same objects"
        )
    devices = {str(parameter.device) for parameter in trained.values()}
    if len(devices) > 1:
        raise TrainingError(f"trained tensors are on several devices: {', '.join(sorted(devices))}")


def check_private_model(network: torch.nn.Module) -> None:
    """Checks that the base treats each record separately, whatever else is in the batch.

    Raises:
        PrivacyError: Its position encoding or its experts depend on the whole batch, or its
            architecture is not verified.
    """
    config: Any = network.config
    reasons = list(families.couplings(config.to_dict()))
    if reasons:
        raise PrivacyError("; ".join(reasons))


def check_moved(
    before: AdapterState, after: AdapterState, unmoved: frozenset[str] = frozenset()
) -> None:
    """Checks that every trained tensor has changed.

    Args:
        before: Trained tensors before training.
        after: The same tensors after training.
        unmoved: Tensors whose gradient was exactly zero, such as A while B is zero.

    Raises:
        TrainingError: A tensor has not moved.
    """
    stuck = [key for key in before if key not in unmoved and bool((before[key] == after[key]).all())]
    if stuck:
        raise TrainingError(
            f"{len(stuck)} of {len(before)} trained tensors did not move: {', '.join(stuck[:3])}"
        )
