"""Tests of secure randomness: it has the right distribution, and nobody can repeat it."""

from __future__ import annotations

import copy
import os
import pickle
import random
from collections.abc import Callable

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from scipy import stats

from fedslm.errors import PrivacyError
from fedslm.privacy.gaussian import GaussianNoise
from fedslm.privacy.randomness import SecureStream

# RFC 8439, A.1, test vectors 1 and 2: key and nonce zero, blocks 0 and 1.
RFC_8439 = bytes.fromhex(
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
)
CHANCE = 1e-6  # how often a test of a true hypothesis may fail


def seed_everything() -> None:
    """What training scripts do."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pinned(monkeypatch: pytest.MonkeyPatch, byte: int) -> SecureStream:
    """A stream whose key from the operating system is known to the test."""
    with monkeypatch.context() as patched:
        patched.setattr(os, "urandom", lambda count: bytes([byte]) * count)
        return SecureStream()


def in_a_fork(attempt: Callable[[], object]) -> str:
    """Name of the error that an attempt ends with in a forked process; "drew" without one."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
            answer = "drew"
        except BaseException as error:
            answer = type(error).__name__
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.parametrize(
    "draw", [lambda: SecureStream().uniform(4), lambda: GaussianNoise().draw((4,), 1.0)]
)
def test_no_seed_reaches_it(draw: Callable[[], np.ndarray]) -> None:
    """Whoever seeds random, NumPy and torch, as training scripts do, does not get the noise again."""
    seen = set()
    for _ in range(3):
        seed_everything()
        seen.update(draw().tolist())
    assert len(seen) == 12


def test_it_leaves_other_generators_alone() -> None:
    """Somebody else's seeded numbers stay as they were."""
    import torch

    seed_everything()
    expected = (random.random(), np.random.random(), float(torch.rand(())))
    seed_everything()
    SecureStream().uniform(5)
    GaussianNoise().draw((5,), 1.0)
    assert (random.random(), np.random.random(), float(torch.rand(()))) == expected


def test_two_streams_are_unrelated() -> None:
    """Two streams share no number, nor does a stream repeat one."""
    one, other = SecureStream(), SecureStream()
    draws = [one.uniform(50_000), other.uniform(50_000), one.uniform(50_000)]
    assert len(np.unique(draws)) == 150_000
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 5 / np.sqrt(50_000)


def test_the_keystream_is_that_of_the_standard(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key of zeros the numbers are the test vectors of RFC 8439, eight bytes each."""
    words = np.frombuffer(RFC_8439, "<u8")
    numbers = pinned(monkeypatch, 0).uniform(len(words))
    expected = [int(word) / 2**64 for word in words]
    np.testing.assert_allclose(numbers, expected, rtol=0, atol=2**-52)


@pytest.mark.parametrize("parts", [(1, 16_384), (16_384, 1), (16_383, 2), (0, 5, 40_000), (7,) * 9])
def test_the_keystream_goes_on(monkeypatch: pytest.MonkeyPatch, parts: tuple[int, ...]) -> None:
    """However draws are cut, no part of the keystream is used twice or left out."""
    key = bytes([7]) * 32
    whole = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    words = np.frombuffer(whole.update(bytes(8 * sum(parts))), "<u8")
    stream = pinned(monkeypatch, 7)
    numbers = np.concatenate([stream.uniform(part) for part in parts])
    np.testing.assert_allclose(numbers, words / 2.0**64, rtol=0, atol=2**-52)


def test_the_library_never_repeats_a_keystream() -> None:
    """After 2^32 blocks the cipher refuses to go on, rather than to start over."""
    near_the_end = (2**32 - 1).to_bytes(4, "little") + bytes(12)
    cipher = Cipher(algorithms.ChaCha20(bytes(32), near_the_end), mode=None).encryptor()
    assert len(cipher.update(bytes(64))) == 64
    with pytest.raises(ValueError, match="overflow"):
        cipher.update(bytes(64))


@pytest.mark.parametrize(
    "attempt",
    [
        lambda: copy.copy(SecureStream()),
        lambda: copy.deepcopy(SecureStream()),
        lambda: pickle.dumps(SecureStream()),
        lambda: copy.deepcopy(GaussianNoise()),
        lambda: pickle.dumps(GaussianNoise()),
    ],
)
def test_a_stream_cannot_be_duplicated(attempt: Callable[[], object]) -> None:
    """Neither copied nor pickled, alone or within the noise: it would be used twice."""
    with pytest.raises(PrivacyError, match="used twice"):
        attempt()


def test_a_shallow_copy_of_noise_goes_on_with_the_same_stream() -> None:
    """Noise and its shallow copy take turns on one stream: no number comes twice."""
    noise = GaussianNoise()
    draws = [one.draw((100,), 1.0) for one in (noise, copy.copy(noise), noise)]
    assert len(np.unique(draws)) == 300


def test_a_fork_cannot_go_on_with_a_stream() -> None:
    """A forked process would draw the same numbers, so it draws none; its parent goes on."""
    stream, noise = SecureStream(), GaussianNoise()
    stream.uniform(3)
    assert in_a_fork(lambda: stream.uniform(3)) == "PrivacyError"
    assert in_a_fork(lambda: stream.bernoulli(3, 0.5)) == "PrivacyError"
    assert in_a_fork(lambda: stream.subset(9, 2)) == "PrivacyError"
    assert in_a_fork(lambda: noise.draw((3,), 1.0)) == "PrivacyError"
    assert in_a_fork(lambda: SecureStream().uniform(3)) == "drew"
    assert len(stream.uniform(3)) == 3


def test_numbers_are_uniform() -> None:
    """200,000 draws are inside (0, 1) and pass a Kolmogorov–Smirnov test that bias of 1 % fails."""
    numbers = SecureStream().uniform(200_000)
    assert numbers.dtype == np.float64
    assert 0 < numbers.min() < numbers.max() < 1
    assert stats.kstest(numbers, "uniform").pvalue > CHANCE
    assert stats.kstest(numbers**1.03, "uniform").pvalue < CHANCE


def test_numbers_are_midpoints_of_equal_cells() -> None:
    """In the upper half as in the lower, numbers are midpoints: neither 0 nor 1 can come."""
    upper = SecureStream().uniform(1000)
    upper = upper[upper > 0.5]
    assert (upper * 2.0**53 % 2 == 1).all()


@pytest.mark.parametrize("rate", [0.001, 0.05, 0.5, 0.999])
def test_coins_fall_at_their_rate(rate: float) -> None:
    """400,000 coins are within five deviations of their rate, and independent of each other."""
    coins = SecureStream().bernoulli(400_000, rate)
    deviation = np.sqrt(rate * (1 - rate) / len(coins))
    assert abs(coins.mean() - rate) < 5 * deviation
    both = (coins[1:] & coins[:-1]).mean()
    assert (
        abs(both - rate**2) < 8 * np.sqrt(rate**2 * (1 - rate**2) / len(coins)) + 2 * deviation * rate
    )


def test_certain_coins() -> None:
    """A rate of 1 is always, of 0 is never."""
    assert SecureStream().bernoulli(10_000, 1.0).all()
    assert not SecureStream().bernoulli(10_000, 0.0).any()


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 1), (5, 2), (5, 5), (5, 9), (5, 0), (1000, 7)])
def test_a_subset_is_a_set_of_its_size(count: int, size: int) -> None:
    """A subset has min(size, count) different indices below count."""
    subset = SecureStream().subset(count, size)
    assert len(set(subset.tolist())) == len(subset) == min(size, count)
    assert set(subset.tolist()) <= set(range(count))


def test_every_subset_is_equally_likely() -> None:
    """20,000 draws of 2 out of 5 pass a chi-squared test over the ten pairs."""
    stream = SecureStream()
    pairs = [tuple(sorted(stream.subset(5, 2).tolist())) for _ in range(20_000)]
    counts = [pairs.count(pair) for pair in sorted(set(pairs))]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > CHANCE


@pytest.mark.parametrize("stddev", [1.0, 0.01, 250.0])
def test_noise_has_its_standard_deviation(stddev: float) -> None:
    """40,000 values pass for N(0, stddev²), and not for 2/3 or 3/2 of stddev, nor for 3 % off."""
    values = GaussianNoise().draw((200, 200), stddev).ravel()
    assert values.dtype == np.float64
    assert stats.kstest(values, "norm", args=(0, stddev)).pvalue > CHANCE
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(values, "norm", args=(0, stddev * wrong)).pvalue < CHANCE
    assert values.std() == pytest.approx(stddev, rel=5 / np.sqrt(2 * values.size))


def test_noise_is_gaussian_in_its_tails() -> None:
    """A million values leave four deviations as often as a Gaussian does: no tail is cut."""
    values = GaussianNoise().draw((1_000_000,), 1.0)
    for bound in (3.0, 4.0):
        chance = 2 * stats.norm.sf(bound)
        expected = len(values) * chance
        assert abs(int((np.abs(values) > bound).sum()) - expected) < 5.5 * np.sqrt(expected)
    assert 4.3 < np.abs(values).max() < 7.5


def test_coordinates_are_independent() -> None:
    """Both values of a Box–Muller pair, half a block apart, are uncorrelated, and so are their squares."""
    noise, half = GaussianNoise(), 4096
    draws = np.array([noise.draw((2 * half,), 1.0) for _ in range(100)])
    first, second = draws[:, :half].ravel(), draws[:, half:].ravel()
    for power in (1, 2):
        for other in (second, np.roll(first, 1)):
            found = np.corrcoef(first**power, other**power)[0, 1]
            assert abs(found) < 5 / np.sqrt(first.size)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3,), (2, 3), (8193,), (3, 8192)])
def test_noise_has_the_shape_that_was_asked_for(shape: tuple[int, ...]) -> None:
    """Any shape, odd, empty or longer than a block, is filled with different values."""
    values = GaussianNoise().draw(shape, 1.0)
    assert values.shape == shape
    assert len(np.unique(values)) == values.size
    assert (values != 0).all()


@pytest.mark.parametrize("stddev", [0.0, -1.0, np.nan, np.inf, -np.inf])
def test_no_noise_is_refused(stddev: float) -> None:
    """Noise of nothing, or of no number, is never drawn, for no coordinates either."""
    for shape in ((3,), (0,)):
        with pytest.raises(PrivacyError, match="stddev"):
            GaussianNoise().draw(shape, stddev)
