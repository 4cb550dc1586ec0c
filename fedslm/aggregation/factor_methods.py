"""Methods that need every client's own A and B: a trusted server.

Per layer, with weights pₖ that sum to one and each client's factors at its own rank, the ideal is
``D + Σ pₖ·s·Bₖ·Aₖ``, where D is what earlier rounds put aside. Everything is computed on stacked
factors, layer by layer; no out x in matrix is formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from fedslm.aggregation.product import (
    Matrix,
    balanced,
    compressed,
    norm_of_product,
    numerical_rank,
    svd_of_product,
)
from fedslm.aggregation.updates import Listed, Updates
from fedslm.config import MethodName
from fedslm.errors import FederationError
from fedslm.factors import Part, key_of, layers_of, part_of
from fedslm.records import AdapterState, ClientUpdate, FloatArray


@dataclass(frozen=True)
class Stack:
    """One layer of all clients, as stacked factors.

    Attributes:
        left: s·pₖ·Bₖ side by side, and D_B: (out, n).
        right: Aₖ one upon the other, and D_A: (n, in).
    """

    left: Matrix
    right: Matrix


def aggregate_factors(
    method: MethodName,
    start: AdapterState,
    updates: Updates,
    scaling: float,
    *,
    fresh: AdapterState,
    shrink: Sequence[float] | None = None,
) -> AdapterState:
    """The next adapter of the server.

    Args:
        method: One of the family.
        start: The adapter that the clients started from.
        updates: Their differences.
        scaling: s = alpha / r (or alpha / √r) of the server and of all clients.
        fresh: The initial tensors, from which A's unused rows (and all of FLoRA's) start anew.
        shrink: For each client a factor in (0, 1] that its change of the weights is scaled by.

    Returns:
        A, B and heads of the same shapes; D_A and D_B where the method puts something aside.

    Raises:
        FederationError: The method is not of this family.

    References:
        FedEx-LoRA arXiv 2410.09432, FLoRA 2409.05976, FlexLoRA 2402.11505, HetLoRA 2401.06432.
    """
    factors = shrink if shrink is not None else [1.0] * len(updates.clients)
    shares = np.asarray(updates.weights, np.float64) / sum(updates.weights)
    if method == "hetlora":
        norms = np.asarray([_product_norm(start, updates, k) for k in range(len(shares))])
        shares = shares * norms if (shares * norms).sum() > 0 else shares
        shares = shares / shares.sum()
    tensors = {
        key: _mean(start[key], updates, key, shares * np.asarray(factors))
        for key in start
        if part_of(key) == "head"
    }
    for layer in layers_of(start):
        tensors |= _layer(
            method, start, updates, scaling, layer=layer, fresh=fresh, shares=shares, shrink=factors
        )
    return AdapterState(tensors)


def drift_norms(start: AdapterState, updates: Updates, scaling: float) -> list[float]:
    """How far each client changed the weights: ‖ΔWₖ - ΔW‖ over all layers and heads.

    It is the same however a client turns its factors against one another.
    """
    norms = []
    for index in range(len(updates.clients)):
        square = 0.0
        for layer in layers_of(start):
            a, b = _pair(start, updates, index, layer)
            own = np.hstack([b, -_tensor(start, layer, "lora_B")])
            both = np.vstack([a, _tensor(start, layer, "lora_A")])
            square += (scaling * norm_of_product(own, both)) ** 2
        for key in (key for key in start if part_of(key) == "head"):
            square += float(np.square(updates.delta(index, key), dtype=np.float64).sum())
        norms.append(float(np.sqrt(square)))
    return norms


def set_aside(start: AdapterState, scaling: float, fresh: AdapterState) -> AdapterState:
    """Moves all that an adapter does into D, and starts its factors anew.

    Args:
        start: A whole adapter without cores.
        scaling: s.
        fresh: Where A and B start anew; heads go on.
    """
    still = AdapterState(
        {key: np.zeros_like(start[key]) for key in start if not part_of(key).startswith("delta")}
    )
    moved = Listed([ClientUpdate(0, still, 1.0)])
    return aggregate_factors("flora", start, moved, scaling, fresh=fresh)


def effective_weights(state: AdapterState, scaling: float) -> dict[str, Matrix]:
    """What an adapter adds to each layer's weights, (out, in), dense: for small models."""
    found = {}
    for layer in layers_of(state):
        core = state.tensors.get(key_of(layer, "lora_R"))
        right = _tensor(state, layer, "lora_A")
        right = right if core is None else core.astype(np.float64) @ right
        found[layer] = scaling * _tensor(state, layer, "lora_B") @ right
        if key_of(layer, "delta_A") in state.tensors:
            found[layer] += _tensor(state, layer, "delta_B") @ _tensor(state, layer, "delta_A")
    return found


def _layer(
    method: MethodName,
    start: AdapterState,
    updates: Updates,
    scaling: float,
    *,
    layer: str,
    fresh: AdapterState,
    shares: Matrix,
    shrink: Sequence[float],
) -> dict[str, FloatArray]:
    """One layer's next tensors."""
    a_key, b_key = key_of(layer, "lora_A"), key_of(layer, "lora_B")
    stack = _stack(start, updates, scaling, layer=layer, shares=shares, shrink=shrink)

    def means() -> dict[str, FloatArray]:
        counted = shares * np.asarray(shrink)
        return {key: _mean(start[key], updates, key, counted) for key in (a_key, b_key)}

    match method:
        case "stack" | "flexlora":
            u, values, v = svd_of_product(stack.left, stack.right)
            rank = start[a_key].shape[0]
            used = min(rank, numerical_rank(values))
            b, a = balanced(u[:, :used], values[:used], v[:used], scaling)
            made = {
                a_key: _beginning_with(a, fresh[a_key]),
                b_key: _beginning_with(b, np.zeros_like(start[b_key])),
            }
            if method == "flexlora":
                return made
            largest = float(values.max(initial=0.0))
            return made | _aside(layer, u[:, rank:] * values[rank:], v[rank:], largest)
        case "flora":
            return {key: fresh[key] for key in (a_key, b_key)} | _aside(layer, stack.left, stack.right)
        case "fedex":
            made = means()
            mean_b, mean_a = (made[key].astype(np.float64) for key in (b_key, a_key))
            left = np.hstack([stack.left, -scaling * mean_b])
            size = scaling * float(np.linalg.norm(mean_b) * np.linalg.norm(mean_a))
            return made | _aside(layer, left, np.vstack([stack.right, mean_a]), size)
        case "hetlora":
            return means()
        case "fedit" | "ffa" | "rolora" | "fedrot" | "fedsa" | "fed-sb":
            raise FederationError(f"{method} needs no client's own factors")
        case _:
            assert_never(method)


def _stack(
    start: AdapterState,
    updates: Updates,
    scaling: float,
    *,
    layer: str,
    shares: Matrix,
    shrink: Sequence[float],
) -> Stack:
    """All clients' factors of a layer, the start's own for what the norm bound takes, and D."""
    lefts, rights = [], []
    held_back = 0.0
    for index, (share, factor) in enumerate(zip(shares, shrink, strict=True)):
        a, b = _pair(start, updates, index, layer)
        lefts.append(scaling * share * factor * b)
        rights.append(a)
        held_back += share * (1 - factor)
    if held_back > 0:
        lefts.append(scaling * held_back * _tensor(start, layer, "lora_B"))
        rights.append(_tensor(start, layer, "lora_A"))
    if key_of(layer, "delta_A") in start.tensors:
        lefts.append(_tensor(start, layer, "delta_B"))
        rights.append(_tensor(start, layer, "delta_A"))
    return Stack(np.hstack(lefts), np.vstack(rights))


def _pair(start: AdapterState, updates: Updates, index: int, layer: str) -> tuple[Matrix, Matrix]:
    """A client's own A and B, at its own rank."""
    a_delta, b_delta = (updates.delta(index, key_of(layer, part)) for part in ("lora_A", "lora_B"))
    rank = a_delta.shape[0]
    return (
        _tensor(start, layer, "lora_A")[:rank] + a_delta,
        _tensor(start, layer, "lora_B")[:, :rank] + b_delta,
    )


def _product_norm(start: AdapterState, updates: Updates, index: int) -> float:
    """‖Bₖ·Aₖ‖ of a client over all layers: HetLoRA's measure of what it has learned."""
    pairs = [_pair(start, updates, index, layer) for layer in layers_of(start)]
    return float(np.sqrt(sum(norm_of_product(b, a) ** 2 for a, b in pairs)))


def _mean(start: FloatArray, updates: Updates, key: str, shares: Matrix) -> FloatArray:
    """The weighted mean of one tensor; a client of a lower rank has zeros beyond it."""
    total = np.zeros(start.shape, np.float64)
    kept = 1.0
    for index, share in enumerate(shares):
        delta = updates.delta(index, key)
        held = tuple(slice(length) for length in delta.shape)
        total[held] += share * (start[held].astype(np.float64) + delta)
        kept -= share
    return (total + kept * start).astype(np.float32)  # what the norm bound takes stays where it was


def _aside(layer: str, left: Matrix, right: Matrix, beside: float = 0.0) -> dict[str, FloatArray]:
    """What is put aside, in as few rows as it needs; nothing if it is nothing beside the factors."""
    if not left.shape[1]:
        return {}
    up, down = compressed(left, right, beside)
    if not down.shape[0]:
        return {}
    return {key_of(layer, "delta_A"): down, key_of(layer, "delta_B"): up}


def _beginning_with(leading: FloatArray, rest: FloatArray) -> FloatArray:
    """A tensor whose first rows and columns are replaced.

    With fewer directions than the rank A keeps fresh rows under zero columns of B: they do nothing
    yet, but a row of zeros would never get a gradient again.
    """
    whole = rest.copy()
    whole[tuple(slice(length) for length in leading.shape)] = leading
    return whole


def _tensor(state: AdapterState, layer: str, part: Part) -> Matrix:
    """One factor in double precision."""
    return state[key_of(layer, part)].astype(np.float64)
