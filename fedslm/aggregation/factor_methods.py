"""Methods that need each client's own A and B, and so a trusted server.

Per layer, with weights pₖ that sum to one, the ideal is ``D + Σ pₖ·s·Bₖ·Aₖ``, where D is the remainder
of earlier rounds. A client of a lower rank leaves the rows and columns that it does not hold unchanged
(only HetLoRA counts them as zero). All computations use stacked factors, layer by layer; no out x in
matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never

import numpy as np

from fedslm.adapter_keys import Part, key_of, layers_of, part_of
from fedslm.aggregation.norm_bound import median_norm
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
from fedslm.records import AdapterState, ClientUpdate, FloatArray

AVERAGE_BOTH = frozenset({"fedex", "hetlora"})
"""Methods that average A and B themselves next to (or instead of) their product."""


@dataclass(frozen=True)
class Stack:
    """One layer of all clients, as stacked factors.

    Attributes:
        left: The s·pₖ·Bₖ concatenated along columns, and D_B: (out, n).
        right: The Aₖ concatenated along rows, and D_A: (n, in).
    """

    left: Matrix
    right: Matrix


@dataclass(frozen=True)
class FactorRound:
    """One round's factors: the common start, and each client's difference.

    Attributes:
        start: The adapter that the clients started from.
        updates: Their differences.
        scaling: s = alpha / r (or alpha / √r) of the server and of all clients.
        fresh: The initial tensors, to which A's unused rows (and all of FLoRA's) are reset.
        slack: HetLoRA weights by the adapter's norm, capped at this multiple of the median.
    """

    start: AdapterState
    updates: Updates
    scaling: float
    fresh: AdapterState
    slack: float = math.inf

    def aggregate(self, method: MethodName, shrink: Sequence[float] | None = None) -> AdapterState:
        """Computes the server's next adapter.

        Args:
            method: One of the factor methods.
            shrink: For each client, the factor in (0, 1] by which its weight change is scaled.

        Returns:
            A, B and heads of the same shapes; D_A and D_B if the method keeps a remainder.

        Raises:
            FederationError: The method is not a factor method.

        References:
            FedEx-LoRA arXiv 2410.09432, FLoRA 2409.05976, FlexLoRA 2402.11505, HetLoRA 2401.06432.
        """
        weights = np.asarray(self.updates.weights, np.float64)
        shares = weights / weights.sum()
        if method == "hetlora":
            norms = np.asarray([self._product_norm(client) for client in range(len(shares))])
            if np.isfinite(self.slack):
                norms = np.minimum(norms, self.slack * median_norm(norms.tolist()))
            shares = shares * norms if (shares * norms).sum() > 0 else shares
            shares = shares / shares.sum()
        kept = np.ones(len(shares)) if shrink is None else np.asarray(shrink, np.float64)
        heads = (key for key in self.start if part_of(key) == "head")
        tensors = {key: self._mean(key, shares * kept) for key in heads}
        for layer in layers_of(self.start):
            tensors |= self._layer(method, layer, shares, kept)
        return AdapterState(tensors)

    def drift_norms(self) -> list[float]:
        """Returns how far each client changed the weights: ‖ΔWₖ - ΔW‖ over all layers and heads.

        The value does not change if a client rotates its factors without changing their product.
        """
        norms = []
        for client in range(len(self.updates.clients)):
            square = 0.0
            for layer in layers_of(self.start):
                a, b = self._pair(client, layer)
                rank = a.shape[0]
                # [Bₖ, -B₀]·[Aₖ; A₀] = BₖAₖ - B₀A₀
                own = np.hstack([b, -_tensor(self.start, layer, "lora_B")[:, :rank]])
                both = np.vstack([a, _tensor(self.start, layer, "lora_A")[:rank]])
                square += (self.scaling * norm_of_product(own, both)) ** 2
            for key in (key for key in self.start if part_of(key) == "head"):
                square += float(np.square(self.updates.delta(client, key), dtype=np.float64).sum())
            norms.append(float(np.sqrt(square)))
        return norms

    def _layer(
        self, method: MethodName, layer: str, shares: Matrix, kept: Matrix
    ) -> dict[str, FloatArray]:
        """Computes the next tensors of one layer."""
        a_key, b_key = key_of(layer, "lora_A"), key_of(layer, "lora_B")
        match method:
            case "stack" | "flexlora":
                return self._decomposed(layer, self._stack(layer, shares, kept), method == "stack")
            case "flora":
                stack = self._stack(layer, shares, kept)
                anew = {key: self.fresh[key] for key in (a_key, b_key)}
                return anew | _aside(layer, stack.left, stack.right)
            case "fedex":
                stack = self._stack(layer, shares, kept)
                made = {key: self._mean(key, shares * kept) for key in (a_key, b_key)}
                # Σ pₖBₖAₖ - B̄Ā = Σ pₖ(Bₖ - B̄)(Aₖ - Ā): n clients of rank r leave (n - 1)·r at most.
                # B̄ and Ā are the float32 values, so the remainder also corrects their rounding.
                mean_b, mean_a = (made[key].astype(np.float64) for key in (b_key, a_key))
                left = np.hstack([stack.left, -self.scaling * mean_b])
                size = self.scaling * float(np.linalg.norm(mean_b) * np.linalg.norm(mean_a))
                return made | _aside(layer, left, np.vstack([stack.right, mean_a]), size)
            case "hetlora":
                return {key: self._padded_mean(key, shares * kept) for key in (a_key, b_key)}
            case "fedit" | "ffa" | "rolora" | "fedrot" | "fedsa" | "fed-sb" | "head":
                raise FederationError(f"{method} needs no client's own factors")
            case _:
                assert_never(method)

    def _decomposed(self, layer: str, stack: Stack, is_whole: bool) -> dict[str, FloatArray]:
        """Truncates to the adapter's rank; if all is kept, the rest goes into the remainder."""
        a_key, b_key = key_of(layer, "lora_A"), key_of(layer, "lora_B")
        u, values, v = svd_of_product(stack.left, stack.right)
        rank = self.start[a_key].shape[0]
        used = min(rank, numerical_rank(values))
        b, a = balanced(u[:, :used], values[:used], v[:used], self.scaling)
        made = {
            a_key: _beginning_with(a, self.fresh[a_key]),
            b_key: _beginning_with(b, np.zeros_like(self.start[b_key])),
        }
        if not is_whole:
            return made
        largest = float(values.max(initial=0.0))
        return made | _aside(layer, u[:, rank:] * values[rank:], v[rank:], largest)

    def _stack(self, layer: str, shares: Matrix, kept: Matrix) -> Stack:
        """Stacks all clients' factors of a layer, the start's own for unchanged parts, and D.

        Σ pₖ·s·Bₖ·Aₖ + D_B·D_A = [s·p₁·B₁ … s·pₙ·Bₙ  D_B] · [A₁; …; Aₙ; D_A]: a block product is the
        sum of the blocks' products (FLoRA, arXiv 2409.05976). A client that the norm bound scales by κ
        counts as κ·BₖAₖ + (1 - κ)·B₀A₀: its weight change is scaled, not its factors.
        """
        lefts, rights = [], []
        start_b = _tensor(self.start, layer, "lora_B")
        still = np.full(start_b.shape[1], (shares * (1 - kept)).sum())  # cut by the norm bound
        for client, share in enumerate(shares * kept):
            a, b = self._pair(client, layer)
            lefts.append(self.scaling * share * b)
            rights.append(a)
            still[a.shape[0] :] += share
        if still.any():
            lefts.append(self.scaling * still * start_b)
            rights.append(_tensor(self.start, layer, "lora_A"))
        if key_of(layer, "delta_A") in self.start.tensors:
            lefts.append(_tensor(self.start, layer, "delta_B"))
            rights.append(_tensor(self.start, layer, "delta_A"))
        return Stack(np.hstack(lefts), np.vstack(rights))

    def _pair(self, client: int, layer: str) -> tuple[Matrix, Matrix]:
        """Returns a client's own A and B, at its own rank."""
        a_delta, b_delta = (
            self.updates.delta(client, key_of(layer, part)) for part in ("lora_A", "lora_B")
        )
        rank = a_delta.shape[0]
        return (
            _tensor(self.start, layer, "lora_A")[:rank] + a_delta,
            _tensor(self.start, layer, "lora_B")[:, :rank] + b_delta,
        )

    def _product_norm(self, client: int) -> float:
        """Returns ‖Bₖ·Aₖ‖ of a client over all layers, HetLoRA's measure of how much it has learned."""
        pairs = [self._pair(client, layer) for layer in layers_of(self.start)]
        return float(np.sqrt(sum(norm_of_product(b, a) ** 2 for a, b in pairs)))

    def _mean(self, key: str, shares: Matrix) -> FloatArray:
        """Returns the start plus the weighted mean of one tensor's differences."""
        total = self.start[key].astype(np.float64)
        for client, share in enumerate(shares):
            delta = self.updates.delta(client, key)
            total[tuple(slice(length) for length in delta.shape)] += share * delta
        return total.astype(np.float32)

    def _padded_mean(self, key: str, shares: Matrix) -> FloatArray:
        """Returns the weighted mean of one tensor; clients of a lower rank are padded with zeros."""
        start = self.start[key].astype(np.float64)
        total = self._mean(key, shares).astype(np.float64)
        for client, share in enumerate(shares):
            held = np.zeros(start.shape, bool)
            held[tuple(slice(length) for length in self.updates.delta(client, key).shape)] = True
            total -= share * np.where(held, 0.0, start)
        return total.astype(np.float32)


def set_aside(start: AdapterState, scaling: float, fresh: AdapterState) -> AdapterState:
    """Moves an adapter's whole effect into D and resets its factors.

    Args:
        start: A whole adapter without cores.
        scaling: s.
        fresh: The values to which A and B are reset; heads are kept.
    """
    still = AdapterState(
        {key: np.zeros_like(start[key]) for key in start if not part_of(key).startswith("delta")}
    )
    moved = Listed([ClientUpdate(0, still, 1.0)])
    return FactorRound(start, moved, scaling, fresh).aggregate("flora")


def effective_weights(state: AdapterState, scaling: float) -> dict[str, Matrix]:
    """Returns what an adapter adds to each layer's weights, (out, in), dense: for small models."""
    found = {}
    for layer in layers_of(state):
        core = state.tensors.get(key_of(layer, "lora_R"))
        right = _tensor(state, layer, "lora_A")
        right = right if core is None else core.astype(np.float64) @ right
        found[layer] = scaling * _tensor(state, layer, "lora_B") @ right
        if key_of(layer, "delta_A") in state.tensors:
            found[layer] += _tensor(state, layer, "delta_B") @ _tensor(state, layer, "delta_A")
    return found


def _aside(layer: str, left: Matrix, right: Matrix, neighbour: float = 0.0) -> dict[str, FloatArray]:
    """Returns the remainder, compressed to its rank; empty if negligible next to the factors."""
    if not left.shape[1]:
        return {}
    up, down = compressed(left, right, neighbour)
    if not down.shape[0]:
        return {}
    return {key_of(layer, "delta_A"): down, key_of(layer, "delta_B"): up}


def _beginning_with(leading: FloatArray, rest: FloatArray) -> FloatArray:
    """Replaces the first rows and columns of a tensor.

    With fewer directions than the rank, A keeps fresh rows under zero columns of B: they have no effect
    yet, but a row of zeros would never get a gradient again.
    """
    whole = rest.copy()
    whole[tuple(slice(length) for length in leading.shape)] = leading
    return whole


def _tensor(state: AdapterState, layer: str, part: Part) -> Matrix:
    """Returns one factor in double precision."""
    return state[key_of(layer, part)].astype(np.float64)
