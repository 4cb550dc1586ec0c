"""Tests of what an update looks like on the wire."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedslm.aggregation.compression import Packing, compress, with_feedback
from fedslm.config import UploadName
from fedslm.errors import FederationError
from fedslm.records import AdapterState

UPLOADS: list[UploadName] = ["float32", "bfloat16", "int8"]
FRACTIONS = [1.0, 0.3, 0.01]
EVERY = list(itertools.product(UPLOADS, FRACTIONS))
PACKED = [pair for pair in EVERY if pair != ("float32", 1.0)]
A, B, SCORE = "q.lora_A.weight", "q.lora_B.weight", "score.weight"


def difference(seed: int, size: float = 1.0) -> AdapterState:
    """A random update with zeros, negative zeros and a tensor of one value."""
    generator = np.random.default_rng(seed)
    a = (size * generator.standard_normal((5, 60))).astype(np.float32)
    a[0, :3] = 0.0, -0.0, 0.0
    b = (size * generator.standard_cauchy((40, 5))).astype(np.float32)
    return AdapterState({A: a, B: b, SCORE: np.full(1, -0.7 * size, np.float32)})


def compressed(
    state: AdapterState, packing: Packing, seed: int = 0, *, unbiased: bool = True
) -> AdapterState:
    """What the wire can carry of an update."""
    return compress(state, packing, np.random.default_rng(seed), unbiased=unbiased)


@pytest.mark.parametrize(("upload", "fraction"), EVERY)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([1e-42, 1e-37, 1e-12, 1e-3, 1.0, 127.0, 1e9]),
    unbiased=st.booleans(),
)
def test_the_wire_carries_what_was_compressed(
    upload: UploadName, fraction: float, seed: int, size: float, unbiased: bool
) -> None:
    """Unpacking what was packed gives the compressed update, bit for bit."""
    packing = Packing(upload, fraction, (seed, 3))
    sent = compressed(difference(seed, size), packing, seed, unbiased=unbiased)
    received = packing.unpack(packing.pack(sent), sent.shapes)
    assert received.sha256() == sent.sha256()
    assert received.shapes == difference(seed).shapes
    assert sent.is_finite()


@pytest.mark.parametrize(("upload", "fraction"), EVERY)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_compressing_again_changes_nothing(upload: UploadName, fraction: float, seed: int) -> None:
    """What the wire can carry is carried as it is, whatever the rounding draws."""
    packing = Packing(upload, fraction, (seed, 1))
    once = compressed(difference(seed), packing, seed)
    twice = compressed(once, packing, seed + 1, unbiased=False)
    assert twice.sha256() == once.sha256()


@pytest.mark.parametrize("upload", ["bfloat16", "int8"])
@settings(max_examples=20, deadline=None)
@given(largest=st.floats(1e-20, 1e20), seed=st.integers(0, 10**6))
def test_rounding_goes_to_a_neighbour(upload: UploadName, largest: float, seed: int) -> None:
    """A rounded value is nearer than the step between neighbours: 2^-7 of itself, 2/127 of the largest."""
    values = (largest * np.random.default_rng(seed).uniform(-1, 1, 200)).astype(np.float32)
    values[0] = largest
    sent = compressed(AdapterState({A: values}), Packing(upload), seed)[A].astype(float)
    steps = np.abs(values) / 128 if upload == "bfloat16" else np.full(200, 2 * largest / 127)
    assert (np.abs(sent - values) < 1.0001 * steps).all()
    assert (sent != values).any()


@pytest.mark.parametrize(("upload", "fraction"), PACKED)
def test_compression_is_unbiased(upload: UploadName, fraction: float) -> None:
    """The mean over draws of mask and rounding is the update, within six standard errors."""
    generator = np.random.default_rng(5)
    exact = generator.standard_normal(120).astype(np.float32)
    draws = np.stack(
        [
            compressed(AdapterState({A: exact}), Packing(upload, fraction, (seed, 1)), seed)[A]
            for seed in range(4000)
        ]
    ).astype(float)
    error = draws.mean(axis=0) - exact
    # A value of a rare place may deviate by more than its own sample shows: its true spread is used.
    kept = 1.0 if fraction == 1 else max(1, round(fraction * 120)) / 120
    spread = np.maximum(draws.std(axis=0), np.abs(exact) * math.sqrt((1 - kept) / kept))
    assert (np.abs(error) <= 6 * spread / math.sqrt(len(draws)) + 1e-7).all()
    assert spread.max() > 0


@pytest.mark.parametrize("upload", ["bfloat16", "int8"])
def test_rounding_to_nearest_would_be_biased(upload: UploadName) -> None:
    """A value a quarter of the way between two numbers goes up in a quarter of the draws."""
    step = {"bfloat16": 2.0**-7, "int8": 1.0}[upload]
    values = np.full(20_000, 1 + step / 4, np.float32)
    values[0] = 1.0 if upload == "bfloat16" else 127.0
    sent = compressed(AdapterState({A: values}), Packing(upload), 3)[A][1:]
    assert set(np.unique(sent).tolist()) == {1.0, 1.0 + step}
    assert np.mean(sent > 1) == pytest.approx(0.25, abs=6 * math.sqrt(0.25 * 0.75 / 20_000))


@pytest.mark.parametrize(
    ("upload", "fraction", "share"),
    [
        ("float32", 1.0, 1.0),
        ("bfloat16", 1.0, 0.5),
        ("int8", 1.0, 0.25),
        ("float32", 0.3, 0.3),
        ("float32", 0.01, 0.01),
        ("bfloat16", 0.3, 0.15),
        ("int8", 0.01, 0.0025),
    ],
)
def test_bytes_are_what_is_promised(upload: UploadName, fraction: float, share: float) -> None:
    """The wire carries the promised share of the bytes, and for int8 four more for each tensor."""
    generator = np.random.default_rng(0)
    whole = AdapterState(
        {key: generator.standard_normal((100, 80)).astype(np.float32) for key in (A, B)}
    )
    packing = Packing(upload, fraction, (1, 1))
    packed = packing.pack(compressed(whole, packing))
    scales = 8 if upload == "int8" else 0
    assert sum(array.nbytes for array in packed.values()) == round(share * whole.num_bytes) + scales


@pytest.mark.parametrize("fraction", [1.0, 0.3])
@pytest.mark.parametrize("upload", ["bfloat16", "int8"])
def test_what_was_not_compressed_is_not_packed(upload: UploadName, fraction: float) -> None:
    """An update that the wire would change is refused before it is sent."""
    with pytest.raises(FederationError, match="not compressed"):
        Packing(upload, fraction, (1, 1)).pack(difference(1))


def test_values_outside_the_mask_are_not_packed() -> None:
    """An update compressed for another round is refused."""
    sent = compressed(difference(1), Packing("float32", 0.3, (1, 1)))
    with pytest.raises(FederationError, match="not compressed"):
        Packing("float32", 0.3, (1, 2)).pack(sent)


@pytest.mark.parametrize(("upload", "fraction"), PACKED)
def test_other_tensors_are_refused(upload: UploadName, fraction: float) -> None:
    """A missing, an extra or a renamed array is an error."""
    packing = Packing(upload, fraction, (1, 1))
    sent = compressed(difference(1), packing)
    packed = packing.pack(sent)
    missing = [{key: array for key, array in packed.items() if key != lost} for lost in packed]
    extra = [{**packed, name: packed[A]} for name in ("else", "scale/else", "scale/scale/" + A)]
    renamed = [{**missing[0], "else": next(iter(packed.values()))}]
    for other in [{}, *missing, *extra, *renamed]:
        with pytest.raises(FederationError, match="other tensors"):
            packing.unpack(other, sent.shapes)
    with pytest.raises(FederationError, match="shapes"):
        packing.unpack(packed)


@pytest.mark.parametrize(("upload", "fraction"), PACKED)
def test_other_arrays_are_refused(upload: UploadName, fraction: float) -> None:
    """An array of another type or size is an error, not a cast or a broadcast."""
    packing = Packing(upload, fraction, (1, 1))
    sent = compressed(difference(1), packing)
    packed = packing.pack(sent)
    right = packed[A]
    types = {np.float32, np.float64, np.float16, np.uint16, np.int16, np.int8, np.uint8}
    wrong = [right.astype(kind) for kind in types if right.dtype != kind]
    wrong += [right[:-1], right[:0], np.append(right, right[:1]), right[None], right[0]]
    for array in wrong:
        with pytest.raises(FederationError, match=A):
            packing.unpack({**packed, A: array}, sent.shapes)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf, -1.0, 0.0, -0.0, 1e-45, 3e38])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    """NaN, infinity, nothing, less than nothing and what would overflow are no scales."""
    packing = Packing("int8")
    sent = compressed(difference(1), packing)
    packed = {**packing.pack(sent), f"scale/{A}": np.array([scale], np.float32)}
    with pytest.raises(FederationError, match="scale"):
        packing.unpack(packed, sent.shapes)


@pytest.mark.parametrize(
    "scale", [np.ones(1), np.ones(2, np.float32), np.ones((), np.float32), np.ones(1, np.int8)]
)
def test_a_scale_is_one_number(scale: np.ndarray) -> None:
    """A scale of another type or shape is refused."""
    packing = Packing("int8")
    sent = compressed(difference(1), packing)
    with pytest.raises(FederationError, match="scale"):
        packing.unpack({**packing.pack(sent), f"scale/{A}": scale}, sent.shapes)


@pytest.mark.parametrize(("upload", "fraction"), PACKED)
def test_feedback_loses_nothing(upload: UploadName, fraction: float) -> None:
    """All that was sent and the last error are all that was to be sent."""
    error = AdapterState({})
    total = {key: np.zeros(tensor.shape) for key, tensor in difference(0).tensors.items()}
    sent_total = {key: np.zeros_like(value) for key, value in total.items()}
    for round_number in range(1, 30):
        packing = Packing(upload, fraction, (7, round_number))
        new = difference(round_number, 0.01)
        wanted = with_feedback(new, error)
        sent = compressed(wanted, packing, round_number, unbiased=False)
        error = wanted.minus(sent)
        for key in total:
            total[key] += new[key]
            sent_total[key] += sent[key]
    for key in total:
        np.testing.assert_allclose(sent_total[key] + error[key], total[key], rtol=1e-4, atol=1e-5)
        assert np.abs(sent_total[key]).max() > 0


def test_feedback_of_other_tensors_waits() -> None:
    """An error of tensors that are not sent this round is not added, and none is asked for."""
    whole = difference(1)
    half = whole.select({A})
    wanted = with_feedback(half, difference(2))
    assert wanted.shapes == half.shapes
    np.testing.assert_array_equal(wanted[A], half[A] + difference(2)[A])
    assert with_feedback(whole, difference(2).select({B})).select({A}).sha256() == half.sha256()


@pytest.mark.parametrize("fraction", [0.3, 0.01])
def test_a_round_has_one_mask(fraction: float) -> None:
    """All clients of a round send the same places; another round, seed or tensor has others."""
    packing = Packing("float32", fraction, (3, 5))
    sent = [compressed(difference(seed), packing, seed)[B].ravel() != 0 for seed in range(4)]
    for places in sent[1:]:
        np.testing.assert_array_equal(places, sent[0])
    assert sent[0].sum() == round(fraction * 200)
    large = packing.places(B, 10_000)
    others = [Packing("float32", fraction, seed) for seed in [(3, 6), (4, 5), (5, 3)]]
    for places in [*(other.places(B, 10_000) for other in others), packing.places(A, 10_000)]:
        assert len(places) == len(large)
        assert len(np.intersect1d(places, large)) < 1.5 * fraction * len(large) + 6
    assert (np.diff(large) > 0).all()
    assert large.min() >= 0
    assert large.max() < 10_000


def test_every_tensor_sends_something() -> None:
    """The smallest tensor sends one value at least, else it would never be trained."""
    packing = Packing("bfloat16", 0.01, (1, 1))
    assert [len(array) for array in packing.pack(compressed(difference(1), packing)).values()] == [
        3,
        2,
        1,
    ]


@pytest.mark.parametrize(("upload", "fraction"), EVERY)
def test_zeros_stay_zeros(upload: UploadName, fraction: float) -> None:
    """An update of nothing is carried as nothing, and nobody's arrays are changed."""
    packing = Packing(upload, fraction, (1, 1))
    zeros = AdapterState({A: np.zeros((4, 30), np.float32)})
    sent = compressed(zeros, packing)
    assert packing.unpack(packing.pack(sent), sent.shapes).sha256() == zeros.sha256()
    state = difference(4)
    before = state.sha256()
    compressed(state, packing)
    assert state.sha256() == before
