"""The parts that each method trains, sends and keeps: one table row per method, read by all other code.

A *turn* is a round that moved the adapter, counted from 1. Methods that alternate count turns, so that
a round with too few replies does not skip a factor.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fedslm.adapter_keys import Part, part_of
from fedslm.config import AggregationConfig, LoraConfig, MethodName

Family = Literal["linear", "factors"]

_A: frozenset[Part] = frozenset({"lora_A", "head"})
_B: frozenset[Part] = frozenset({"lora_B", "head"})
_R: frozenset[Part] = frozenset({"lora_R", "head"})
_AB: frozenset[Part] = _A | _B
_HEAD: frozenset[Part] = frozenset({"head"})


@dataclass(frozen=True)
class Method:
    """One aggregation method.

    Attributes:
        title: The name in the literature.
        source: The paper that defines it.
        family: linear: one weighted sum of the updates; factors: needs each client's own A and B.
        exact: Whether the aggregate is the weighted mean of the clients' weight changes.
        odd: Parts that clients train on odd turns.
        even: Parts that clients train on even turns.
        local: Trained parts that stay with the client.
        note: A hint for choosing the method.
    """

    title: str
    source: str
    family: Family
    exact: bool
    odd: frozenset[Part]
    even: frozenset[Part]
    note: str
    local: frozenset[Part] = frozenset()


METHODS: dict[MethodName, Method] = {
    "fedit": Method(
        "FedIT", "arXiv 2305.05644", "linear", False, _AB, _AB,
        "A and B averaged separately: the error, their covariance, grows with clients and noise",
    ),
    "ffa": Method(
        "FFA-LoRA", "arXiv 2403.12313", "linear", True, _B, _B,
        "A is shared and frozen: half the bytes, linear in the noise; the default under privacy",
    ),
    "rolora": Method(
        "RoLoRA", "arXiv 2502.01755", "linear", True, _B, _A,
        "trains B and A in turn, B first: half the upload, and both factors learn",
    ),
    "fedrot": Method(
        "FedRot-LoRA", "arXiv 2602.23638", "linear", False, _AB, _AB,
        "FedIT after each client has rotated its factors towards the last round's",
    ),
    "fedsa": Method(
        "FedSA-LoRA", "arXiv 2410.01463", "linear", True, _AB, _AB,
        "A is shared; B and the head stay with the client: no global model, only personal ones",
        local=_B,
    ),
    "fed-sb": Method(
        "Fed-SB", "arXiv 2502.15436", "linear", True, _R, _R,
        "only the rank x rank core R is trained: the fewest bytes",
    ),
    "stack": Method(
        "exact stack", "arXiv 2409.05976, 2402.11505", "factors", True, _AB, _AB,
        "best rank-r approximation in the adapter, exact remainder next to it: the download grows",
    ),
    "flexlora": Method(
        "FlexLoRA", "arXiv 2402.11505", "factors", False, _AB, _AB,
        "exact product truncated to rank r: exact only while the clients' ranks add up to at most r",
    ),
    "fedex": Method(
        "FedEx-LoRA", "arXiv 2410.09432", "factors", True, _AB, _AB,
        "FedIT's factors, with their exact residual next to them: the download grows",
    ),
    "flora": Method(
        "FLoRA", "arXiv 2409.05976", "factors", True, _AB, _AB,
        "moves everything into the remainder and restarts the factors: worse with few local steps",
    ),
    "hetlora": Method(
        "HetLoRA", "arXiv 2401.06432", "factors", False, _AB, _AB,
        "factors of several ranks, padded with zeros and weighted by their norm",
    ),
    "head": Method(
        "linear probe", "arXiv 1610.01644", "linear", True, _HEAD, _HEAD,
        "only a classifier's head is trained: the base is computed once for each record",
    ),
}  # fmt: skip


def method_of(aggregation: AggregationConfig) -> MethodName:
    """Returns the method of a resolved section.

    Raises:
        ValueError: The method is still "auto".
    """
    if aggregation.method == "auto":
        raise ValueError("the aggregation method must be resolved first")
    return aggregation.method


def trained_keys(name: MethodName, keys: Iterable[str], turn: int = 1) -> frozenset[str]:
    """Returns the keys that clients train on a turn; all others stay bit-identical.

    >>> keys = ["q.lora_A.weight", "q.lora_B.weight"]
    >>> sorted(trained_keys("rolora", keys, 1)), sorted(trained_keys("rolora", keys, 2))
    (['q.lora_B.weight'], ['q.lora_A.weight'])
    """
    method = METHODS[name]
    parts = method.odd if turn % 2 else method.even
    return frozenset(key for key in keys if part_of(key) in parts)


def sent_keys(name: MethodName, keys: Iterable[str], turn: int = 1) -> frozenset[str]:
    """Returns the keys that clients send on a turn: those they trained, except the local ones.

    >>> sorted(sent_keys("fedsa", ["q.lora_A.weight", "q.lora_B.weight", "score.weight"]))
    ['q.lora_A.weight']
    """
    trained, local = trained_keys(name, keys, turn), METHODS[name].local
    return frozenset(key for key in trained if part_of(key) not in local)


def moving_keys(name: MethodName, keys: Iterable[str]) -> frozenset[str]:
    """Returns the server's keys that some turn changes; the others are shared once, by hash.

    >>> sorted(moving_keys("ffa", ["q.lora_A.weight", "q.lora_B.weight", "score.weight"]))
    ['q.lora_B.weight', 'score.weight']
    """
    keys = list(keys)
    return sent_keys(name, keys, 1) | sent_keys(name, keys, 2)


def kind_of(name: MethodName, turn: int) -> str:
    """Returns the kind of a turn: updates of one kind have the same parts and can be compared.

    >>> kind_of("rolora", 3), kind_of("rolora", 4), kind_of("fedit", 4)
    ('odd', 'even', 'all')
    """
    method = METHODS[name]
    if method.odd == method.even:
        return "all"
    return "odd" if turn % 2 else "even"


def rank_of_client(lora: LoraConfig, client: int) -> int:
    """Returns the rank that a client holds: ``lora.client_ranks`` are assigned in turn.

    >>> [rank_of_client(LoraConfig(rank=8, client_ranks=(4, 8)), client) for client in range(3)]
    [4, 8, 4]
    """
    ranks = lora.client_ranks
    return ranks[client % len(ranks)] if ranks else lora.rank
