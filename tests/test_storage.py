"""Tests of files that survive a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from support.tiny import disk_full

from fedslm.errors import RunError
from fedslm.records import AdapterState
from fedslm.storage import (
    expand,
    json_text,
    load_adapter,
    locked,
    replacing,
    save_adapter,
    write_text,
)

_BITS = np.array([0.0, -0.0, np.nan, np.inf, 1e-45, 3.4e38], np.float32)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": math.nan, "b": [math.inf, (-math.inf, 0.5)]}, '{"a": null, "b": [null, [null, 0.5]]}'),
        (
            [np.float64("nan"), np.float64(0.5), 1, True, None, "NaN"],
            '[null, 0.5, 1, true, null, "NaN"]',
        ),
        ({"b": 1, "a": {"c": 1e300}}, '{"b": 1, "a": {"c": 1e+300}}'),
    ],
    ids=["nested", "kinds", "finite"],
)
def test_no_figure_is_written_that_json_does_not_have(value: object, text: str) -> None:
    """NaN and infinities become null at any depth; everything else is as json.dumps writes it."""
    assert json_text(value) == text
    assert json.loads(json_text(value, indent=2), parse_constant=pytest.fail) == json.loads(text)


def adapter(num_values: int, value: float = 1.0) -> AdapterState:
    """An adapter of one tensor."""
    return AdapterState({"a": np.full(num_values, value, np.float32)})


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("$NOTES_ROOT/data", "/notes/data"),
        ("${NOTES_ROOT}data", "/notesdata"),
        ("~/data", "/home/ada/data"),
        ("owner/name", "owner/name"),
        ("$NOTES_UNSET/data", "$NOTES_UNSET/data"),
    ],
)
def test_variables_and_home_are_put_in(
    monkeypatch: pytest.MonkeyPatch, path: str, expanded: str
) -> None:
    """Known variables and the home directory are put in; what is unknown stays to be seen."""
    monkeypatch.setenv("NOTES_ROOT", "/notes")
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("NOTES_UNSET", raising=False)
    assert expand(path) == expanded


def test_text_replaces_text(tmp_path: Path) -> None:
    """The new content is there, whole and in UTF-8, and nothing else is."""
    path = tmp_path / "deep" / "state.json"
    for text in ("first, and longer", "σ = 1"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert list(path.parent.iterdir()) == [path]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path: Path) -> None:
    """While the new file is written, readers see the old one; those that hold it open keep it."""
    path = tmp_path / "state.json"
    write_text(path, "old")
    with path.open() as reader:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"
            temporary.write_text("new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """An error that is not the disk's passes through, and the old file stays."""
    path = tmp_path / "state.json"
    write_text(path, "old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_half()
    assert path.read_text() == "old"


def test_a_full_disk_leaves_the_old_text(tmp_path: Path) -> None:
    """A text that does not fit raises with its path; the old one and no debris stay."""
    path = tmp_path / "state.json"
    write_text(path, "old")
    with disk_full(1000), pytest.raises(RunError, match=r"state\.json cannot be written"):
        write_text(path, "x" * 2000)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    """An adapter that does not fit raises with its path; the old one and no debris stay."""
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, adapter(10))
    with disk_full(1000), pytest.raises(RunError, match=r"adapter\.safetensors cannot be written"):
        save_adapter(path, adapter(1000, 2.0))
    assert load_adapter(path).sha256() == adapter(10).sha256()
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_can_be_retried(tmp_path: Path) -> None:
    """Once there is room, the same write goes through."""
    path = tmp_path / "state.json"
    with disk_full(10), pytest.raises(RunError):
        write_text(path, "x" * 100)
    write_text(path, "x" * 100)
    assert path.read_text() == "x" * 100


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    """A directory that cannot be made is an error of ours."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_text(tmp_path / "file" / "state.json", "x")


def test_adapters_keep_every_bit(tmp_path: Path) -> None:
    """Signed zeros, NaN, subnormals, empty and scalar tensors come back as they were."""
    state = AdapterState(
        {
            "bits": _BITS,
            "empty": np.zeros((0, 3), np.float32),
            "scalar": np.full((), 2, np.float32),
        }
    )
    save_adapter(tmp_path / "a.safetensors", state)
    again = load_adapter(tmp_path / "a.safetensors")
    assert again.sha256() == state.sha256()
    assert again.shapes == state.shapes


def test_a_transposed_tensor_is_saved_by_its_values(tmp_path: Path) -> None:
    """A view that is not contiguous is stored as what it shows."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_adapter(tmp_path / "a.safetensors", AdapterState({"a": array}))
    np.testing.assert_array_equal(load_adapter(tmp_path / "a.safetensors")["a"], array)


def test_an_adapter_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """However much of the file is missing, reading it is an error of ours."""
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter(4))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match="cannot be read"):
            load_adapter(path)


def test_a_missing_adapter_is_refused(tmp_path: Path) -> None:
    """A file that is not there is an error with its path."""
    with pytest.raises(RunError, match=r"a\.safetensors cannot be read"):
        load_adapter(tmp_path / "a.safetensors")


def test_a_lock_is_held_by_one_and_given_back(tmp_path: Path) -> None:
    """Whoever comes second is told so; after the first has ended, or failed, it is free."""
    lock = tmp_path / "list.lock"

    def fail() -> None:
        with locked(lock, 0.0, "free"):
            with pytest.raises(RunError, match="in use"), locked(lock, 0.0, "in use"):
                pass
            raise ValueError("fails")

    with pytest.raises(ValueError, match="fails"):
        fail()
    with locked(lock, 0.0, "not free"):
        pass


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """A directory stands where the lock's file should be."""
    with pytest.raises(RunError, match="cannot be locked"), locked(tmp_path, 0.0, "in use"):
        pass
