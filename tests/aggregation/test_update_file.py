"""Tests of a round's updates on disk."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedslm.aggregation.update_file import Spool
from fedslm.errors import FederationError, RunError
from fedslm.records import AdapterState, ClientUpdate

A, B, R, SCORE = "q.lora_A.weight", "q.lora_B.weight", "q.lora_R.weight", "score.weight"
RANK = 4
SHARED = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def state(seed: int, rank: int = RANK) -> AdapterState:
    """A random update at a rank, with values from the smallest to the largest that float32 has."""
    generator = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        drawn = generator.standard_normal(shape) * 10.0 ** generator.integers(-44, 37, shape)
        return np.asarray(drawn, np.float32)

    return AdapterState(
        {A: values(rank, 7), B: values(5, rank), R: values(rank, rank), SCORE: values(3)}
    )


WHOLE = state(0).shapes


def files(directory: Path) -> list[Path]:
    """Everything below a directory."""
    return sorted(directory.rglob("*"))


@SHARED
@given(ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=6), seed=st.integers(0, 10**6))
def test_what_was_added_comes_back(tmp_path: Path, ranks: list[int], seed: int) -> None:
    """Every update comes back bit for bit at its own rank, with its client and weight, in any order."""
    added = [
        ClientUpdate(10 - index, state(seed + index, rank), index + 0.5)
        for index, rank in enumerate(ranks)
    ]
    with Spool(tmp_path / "updates", WHOLE) as spool:
        for update in added:
            spool.add(update)
            assert spool.update(spool.count - 1).delta.sha256() == update.delta.sha256()
        assert spool.count == len(added)
        for index in np.random.default_rng(seed).permutation(len(added)):
            found, update = spool.update(int(index)), added[index]
            assert found.delta.sha256() == update.delta.sha256()
            assert (found.client, found.weight) == (update.client, update.weight)
            for key in WHOLE:
                np.testing.assert_array_equal(spool.delta(int(index), key), update.delta[key])
                assert spool.delta(int(index), key).shape == update.delta[key].shape
        assert spool.clients == [update.client for update in added]
        assert spool.weights == [update.weight for update in added]
        assert spool.keys == sorted(WHOLE)


def dense(updates: list[AdapterState]) -> np.ndarray:
    """Updates as rows, with zeros beyond a client's rank, in key order."""
    rows = []
    for update in updates:
        parts = []
        for key in sorted(WHOLE):
            padded = np.zeros(WHOLE[key])
            padded[tuple(map(slice, update[key].shape))] = update[key]
            parts.append(padded.ravel())
        rows.append(np.concatenate(parts))
    return np.stack(rows)


@SHARED
@given(ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=5), chunk=st.integers(1, 120))
def test_the_chunk_size_changes_nothing(tmp_path: Path, ranks: list[int], chunk: int) -> None:
    """Columns put together are the updates padded with zeros, however many come at a time."""
    updates = [state(seed, rank) for seed, rank in enumerate(ranks)]
    expected = dense(updates)
    with Spool(tmp_path / "updates", WHOLE) as spool:
        for client, update in enumerate(updates):
            spool.add(ClientUpdate(client, update, 1.0))
        found = np.full_like(expected, np.nan)
        widths = []
        for place, values in spool.columns(chunk):
            assert np.isnan(found[:, place]).all()
            assert values.dtype == np.float64
            found[:, place] = values
            widths.append(values.shape[1])
        np.testing.assert_array_equal(found, expected)
        assert max(widths) <= chunk
        np.testing.assert_array_equal(np.concatenate([v for _, v in spool.columns()], 1), expected)


def test_inner_products_and_distances_are_dense_ones(tmp_path: Path) -> None:
    """All pairs are right over more than one chunk, and equal updates are at no distance."""
    generator = np.random.default_rng(3)
    rows = generator.standard_normal((4, 70_000)).astype(np.float32)
    rows[3] = rows[1]
    exact = rows.astype(float)
    with Spool(tmp_path / "updates", {SCORE: (700, 100)}) as spool:
        for client, row in enumerate(rows):
            spool.add(ClientUpdate(client, AdapterState({SCORE: row.reshape(700, 100)}), 1.0))
        np.testing.assert_allclose(spool.gram(), exact @ exact.T, rtol=1e-9, atol=1e-7)
        expected = [[np.sum((one - other) ** 2) for other in exact] for one in exact]
        np.testing.assert_allclose(spool.square_distances(), expected, rtol=1e-9, atol=0)
        assert spool.square_distances()[1, 3] == 0


def test_a_row_becomes_tensors_again(tmp_path: Path) -> None:
    """Unflattening puts each value where the update had it."""
    with Spool(tmp_path / "updates", WHOLE) as spool:
        assert spool.unflatten(dense([state(5)])[0]).sha256() == state(5).sha256()


def test_the_file_is_gone_after_use(tmp_path: Path) -> None:
    """Closing leaves neither file nor directory; closing twice is no error."""
    with Spool(tmp_path / "updates", WHOLE) as spool:
        spool.add(ClientUpdate(0, state(1), 1.0))
        assert [path.stat().st_size for path in files(tmp_path) if path.is_file()] == [
            state(1).num_bytes
        ]
    assert files(tmp_path) == []
    spool.close()


def test_the_file_is_gone_after_an_error(tmp_path: Path) -> None:
    """An error inside leaves nothing behind and goes on."""

    def interrupted() -> None:
        with Spool(tmp_path / "updates", WHOLE) as spool:
            spool.add(ClientUpdate(0, state(1), 1.0))
            assert files(tmp_path) != []
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == []


def test_other_files_stay(tmp_path: Path) -> None:
    """A directory that holds something else is left with that."""
    other = tmp_path / "rounds.jsonl"
    other.write_text("kept")
    with Spool(tmp_path, WHOLE) as spool:
        spool.add(ClientUpdate(0, state(1), 1.0))
    assert files(tmp_path) == [other]
    assert other.read_text() == "kept"


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    """An update that does not fit is refused and not counted; those before it are there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    first, size = state(1), state(1).num_bytes
    with Spool(tmp_path / "updates", WHOLE) as spool:
        spool.add(ClientUpdate(0, first, 1.0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + size // 2, hard))
        try:
            with pytest.raises(RunError, match="cannot be written"):
                spool.add(ClientUpdate(1, state(2), 1.0))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert spool.count == 1
        spool.add(ClientUpdate(2, state(3, 2), 1.0))
        assert spool.clients == [0, 2]
        assert spool.update(0).delta.sha256() == first.sha256()
        assert spool.update(1).delta.sha256() == state(3, 2).sha256()
    assert files(tmp_path) == []


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A directory that is a file is no place for a spool."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        Spool(tmp_path / "file", WHOLE)


def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    """What somebody cut off is not read as something else."""
    with Spool(tmp_path / "updates", WHOLE) as spool:
        spool.add(ClientUpdate(0, state(1), 1.0))
        (path,) = (path for path in files(tmp_path) if path.is_file())
        with path.open("r+b") as file:
            file.truncate(8)
        with pytest.raises(RunError, match="shorter"):
            spool.update(0)


@pytest.mark.parametrize(
    "wrong",
    [
        {A: np.zeros((RANK + 1, 7), np.float32)},
        {A: np.zeros((RANK, 8), np.float32)},
        {A: np.zeros(7, np.float32)},
        {SCORE: np.array([1, np.nan, 2], np.float32)},
        {SCORE: np.array([1, -np.inf, 2], np.float32)},
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, wrong: dict[str, np.ndarray]) -> None:
    """A larger tensor, one of other axes and one that is not finite are errors, and count for nothing."""
    with Spool(tmp_path / "updates", WHOLE) as spool:
        spool.add(ClientUpdate(0, state(1), 1.0))
        with pytest.raises(FederationError, match="client 7"):
            spool.add(ClientUpdate(7, state(2).merged(AdapterState(wrong)), 1.0))
        assert spool.clients == [0]
        assert spool.update(0).delta.sha256() == state(1).sha256()


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    """An update that lacks a tensor is an error, and counts for nothing."""
    with Spool(tmp_path / "updates", WHOLE) as spool:
        with pytest.raises(FederationError, match=f"client 7.*{SCORE}"):
            spool.add(ClientUpdate(7, state(2).select({A, B, R}), 1.0))
        assert spool.count == 0
