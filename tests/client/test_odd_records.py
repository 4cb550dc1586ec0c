"""One odd record, whatever it is, changes nothing that the server could see: no failure, no other record."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from support.served import ask, context_of, first_request
from support.tiny import PRIVATE
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from fedslm.client.records import _prepared
from fedslm.config import Config
from fedslm.data.rows import rows_of
from fedslm.privacy.keys import data_commitment
from fedslm.protocol.messages import Request
from fedslm.tasks.base import Example, Prepared, Row

MakeConfig = Callable[..., Config]


def odd_table(table: pa.Table, column: str, odd: pa.Array) -> pa.Table:
    """The table with a column of texts replaced; all other values stay."""
    return table.set_column(table.schema.names.index(column), column, odd)


def latin1(table: pa.Table) -> pa.Array:
    """The texts, the last of them with a byte that is no UTF-8."""
    texts = [text.encode() for text in table["text"].to_pylist()]
    texts[-1] = b"Z\xfcrich chest pain"
    raw = pa.array(texts, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())


def dates(days: int) -> Callable[[pa.Table], pa.Array]:
    """Days instead of texts, the last of them given."""
    return lambda table: pa.array([*range(1, len(table)), days], pa.date32())


@pytest.mark.parametrize(
    ("plain", "odd"),
    [(None, latin1), (dates(7), dates(10**8)), (dates(7), dates(-(10**7)))],
    ids=["latin-1", "year 10000", "before year 1"],
)
def test_a_value_that_cannot_be_read_does_not_fail_the_client(
    make_config: MakeConfig, plain: Any, odd: Any
) -> None:
    """The client answers ok with the odd value as without it, and charges the same."""
    request = first_request(make_config(privacy=PRIVATE))
    data = Path(request.setup.directory) / "data"
    own = pa.ipc.open_file(data / "train.arrow").read_all()[: np.load(data / "offsets.npy")[1]]
    for number, change in enumerate((plain, odd)):
        changed = own if change is None else odd_table(own, "text", change(own))
        with pa.ipc.new_file(data / "train.arrow", changed.schema) as writer:
            writer.write_batch(changed.combine_chunks().to_batches()[0])
        answer = ask(with_run(request, f"run-{number}"), context_of(0))
        assert answer.status == "ok", answer.reason


def with_run(request: Request, name: str) -> Request:
    """The same request of another run, so that nothing is taken from a cache."""
    from dataclasses import replace

    return replace(request, setup=replace(request.setup, run_id=name))


def test_rows_keep_their_other_values() -> None:
    """Only the value that cannot be held is lost, in any kind of table."""
    days = pa.array([0, 10**8, None], pa.date32())
    table = pa.table({"day": days, "text": ["a", "b", "c"]})
    for each in (table, table.to_batches()[0]):
        rows = rows_of(each)
        assert [row["text"] for row in rows] == ["a", "b", "c"]
        assert [row["day"] is None for row in rows] == [False, True, True]


def test_a_record_that_cannot_be_prepared_is_left_out_alone() -> None:
    """Whatever a tokenizer or a template does with one record, the others are as without it."""

    def prepare(rows: Sequence[Row]) -> Prepared:
        if any("anna" in row["text"] for row in rows):
            raise ValueError("a template that a server wrote")
        made = [(n, Example((1, len(row["text"]))), len(row["text"]) > 3) for n, row in enumerate(rows)]
        return Prepared.of(made)

    piece = [{"text": text} for text in ("pain", "anna has pain", "flu", "")]
    prepared = _prepared(prepare, piece)
    assert prepared.kept == (0, 2, 3)
    assert prepared.truncated == 1
    alone = _prepared(prepare, [piece[0], piece[2], piece[3]])
    assert prepared.examples == alone.examples


def test_a_record_that_makes_the_tokenizer_panic_is_left_out_alone() -> None:
    """A base's own pattern may give up on a record in Rust, which raises no Exception: that does not end the process."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+b"), "isolated")

    def prepare(rows: Sequence[Row]) -> Prepared:
        ids = [tokenizer.encode(row["text"]).ids for row in rows]
        return Prepared.of([(n, Example(tuple(each)), False) for n, each in enumerate(ids)])

    piece = [{"text": text} for text in ("pain", "a" * 28, "flu")]
    with pytest.raises(BaseException, match="retry-limit") as raised:
        prepare(piece[1:2])
    assert not isinstance(raised.value, Exception)
    assert _prepared(prepare, piece).kept == (0, 2)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_process_is_obeyed(stop: type[BaseException]) -> None:
    """An interruption is no record's doing."""

    def prepare(rows: Sequence[Row]) -> Prepared:
        raise stop

    with pytest.raises(stop):
        _prepared(prepare, [{"text": "pain"}])


def test_a_commitment_takes_any_value(tmp_path: Path) -> None:
    """No value makes the commitment fail, and any change of one changes it."""

    class Strange:
        """A type that nobody thought of."""

        def __init__(self, value: int) -> None:
            self._value = value

        def __repr__(self) -> str:
            return f"Strange({self._value})"

    commitments = [data_commitment(tmp_path, [{"text": Strange(value)}]) for value in (1, 2, 1)]
    assert commitments[0] == commitments[2] != commitments[1]


def test_a_base_with_code_of_its_own_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    """A tokenizer that names a module is not run, nor is anybody asked whether it should be."""
    import shutil

    from fedslm.config import ModelConfig
    from fedslm.errors import ModelError
    from fedslm.models.base import DEMO_DIRECTORY, load_tokenizer
    from fedslm.models.loaded import load

    base = tmp_path / "evil"
    shutil.copytree(DEMO_DIRECTORY, base)
    marker = tmp_path / "ran"
    (base / "evilcode.py").write_text(f"open({str(marker)!r}, 'w')\nclass Tok: pass\n")
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class", None)
    settings["auto_map"] = {"AutoTokenizer": [None, "evilcode.Tok"]}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (base / "config.json").write_text(json.dumps({"model_type": "nosuch"}))
    config = make_config()
    with pytest.raises(ModelError):
        load_tokenizer(base)
    with pytest.raises(ModelError):
        load(ModelConfig(base=str(base), device="cpu"), config.lora, config.task, 2)
    assert not marker.exists()
