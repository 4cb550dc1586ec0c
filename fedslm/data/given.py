"""Records that a caller has in memory, written as a file that every part of a run reads.

A run reads the file as it reads any other source: in several processes, and again when it is resumed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedslm.data.columns import Wanted
from fedslm.data.holdout import record_name
from fedslm.data.missing import name_of
from fedslm.data.owners import owner_of
from fedslm.data.stored_rows import write_batches
from fedslm.data.tables import BATCH_ROWS, spool, tables_of
from fedslm.errors import ConfigError, Problem
from fedslm.storage import is_text, replacing

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

_KINDS = "a datasets.Dataset, a list of dicts or a pandas frame"
_SPLITS = {"train", "training", "test", "testing", "valid", "validation", "dev", "eval", "evaluation"}


@dataclass(frozen=True)
class Part:
    """The records of one data set, or of one client of it.

    Attributes:
        key: The argument and the client, for errors.
        value: The caller's object.
        columns: Names of its columns.
        client: Name of the client; empty if the records are not divided.
    """

    key: str
    value: Any
    columns: tuple[str, ...]
    client: str = ""

    def tables(self, wanted: Wanted) -> Iterator[pa.Table]:
        """Yields the records in chunks, with only the columns that are wanted."""
        if _is_dataset(self.value):
            yield from map(wanted.fit, self.value.with_format("arrow").iter(BATCH_ROWS))
        else:
            yield from tables_of(_rows(self.value), self.key, wanted)


def parts_of(value: object, key: str) -> list[Part]:
    """Checks a data set, and returns it as a list of one part.

    Args:
        value: A data set, a list of dicts, or a pandas frame.
        key: Name of the argument, for errors.

    Raises:
        ConfigError: It is something else, or has no records.
    """
    return [_part(value, key)]


def clients_of(value: Mapping[Any, Any], key: str) -> list[Part]:
    """Checks a mapping from client to data set, and returns one part for each client.

    Raises:
        ConfigError: There are no clients, a name is not one, or a data set cannot be used.
    """
    if not value:
        raise _problem(key, "has no clients: give at least one data set")
    if _is_named(value, "datasets", "DatasetDict") or any(_is_split(name) for name in value):
        raise _problem(
            key,
            f"holds {', '.join(map(repr, value))}, which are splits and not clients: give one of them, "
            f'such as {key}=data["train"]',
        )
    if all(isinstance(each, list | tuple) and each and not _is_row(each[0]) for each in value.values()):
        raise _problem(
            key,
            "maps columns to values, or clients to lists without dicts: give "
            "datasets.Dataset.from_dict(…), or a list of dicts for each client",
        )
    named = [name for name in value if not isinstance(name, str) or not _is_name(name)]
    if named:
        raise _problem(key, f"client {named[0]!r}: a name must be a text without spaces around it")
    owners = [owner_of(name) for name in value]
    if len(set(owners)) < len(owners):
        raise _problem(
            key, "has two clients of one name, written in different Unicode forms; rename one"
        )
    return [_part(each, f"{key}[{name!r}]", name) for name, each in value.items()]


def _is_name(text: str) -> bool:
    """Whether a text can name a client."""
    return text != "" and is_text(text) and name_of(text) == text


def missing(parts: Iterable[Part], columns: Mapping[str, str]) -> list[Problem]:
    """Returns a problem for each column that a part lacks.

    Args:
        parts: The records.
        columns: Purpose of each column (a dotted key) to its name.
    """
    return [
        Problem(each.key, f"has no column {column!r} ({key}); it has {', '.join(each.columns)}")
        for each in parts
        for key, column in columns.items()
        if column not in each.columns
    ]


def records_of(part: Part, wanted: Wanted) -> set[bytes]:
    """Hashes of a part's different records, of 16 bytes each; only the wanted columns count."""
    rows = (row for table in part.tables(wanted) for row in table.to_pylist())
    return {blake2b(record_name(row).encode(), digest_size=16).digest() for row in rows}


def write(parts: Sequence[Part], path: Path, wanted: Wanted, client_column: str = "") -> None:
    """Writes records to an Arrow file that only its owner can read.

    Args:
        parts: The records, one part after another.
        path: The file; its directory exists.
        wanted: The columns to write.
        client_column: Column for the clients' names; empty: none.

    Raises:
        DataError: A column contains values of incompatible types; names the rows.
        RunError: The file cannot be written (for example, the disk is full).
    """
    whole = read(parts, path.parent, wanted, client_column).with_format("arrow")
    with replacing(path) as temporary:
        write_batches(temporary, whole[:1].schema, whole.iter(BATCH_ROWS))
        temporary.chmod(0o600)


def read(parts: Sequence[Part], scratch: Path, wanted: Wanted, client_column: str = "") -> Dataset:
    """Returns records as one memory-mapped data set; arguments and errors as for :func:`write`.

    Args:
        parts: The records, one part after another.
        scratch: Directory for the mapped file.
        wanted: The columns to keep.
        client_column: Column for the clients' names; empty: none.
    """
    return spool(_tables(parts, wanted, client_column), scratch, parts[0].key.partition("[")[0])


def _tables(parts: Iterable[Part], wanted: Wanted, client_column: str) -> Iterator[pa.Table]:
    """Yields the tables of all parts, with the client's name in each row."""
    import pyarrow as pa

    for part in parts:
        for table in part.tables(wanted):
            if client_column:
                names = pa.array([part.client] * len(table), pa.string())
                table = table.append_column(client_column, names)
            yield table


def _part(value: object, key: str, client: str = "") -> Part:
    """Checks one data set."""
    if _is_dataset(value) or _is_frame(value):
        data: Any = value
        names = data.column_names if _is_dataset(value) else list(data.columns)
        if len(set(map(str, names))) < len(names):
            raise _problem(key, "has two columns of one name; rename one of them")
    elif isinstance(value, list | tuple):
        wrong = next((row for row, each in enumerate(value) if not _is_row(each)), None)
        if wrong is not None:
            kind = type(value[wrong]).__name__
            raise _problem(key, f"row {wrong} is of type {kind}: should be a dict from column to value")
        data = value
        names = list(dict.fromkeys(name for row in value for name in row))
    else:
        raise _problem(key, f"value of type {type(value).__name__}: {_remedy(value)}")
    if len(data) == 0:
        raise _problem(key, "is empty: it has no records")
    return Part(key, data, tuple(map(str, names)), client)


def _remedy(value: object) -> str:
    """What to give in place of an object that cannot be read, or can be read only once."""
    if _is_named(value, "datasets", "IterableDataset"):
        return "it is a stream; give a datasets.Dataset, or set data.source to its name"
    if hasattr(value, "__next__"):
        return "it can be read only once; give a list, such as list(rows)"
    if isinstance(value, str | Path):
        return "it names a source; set data.source or data.evaluation_source to it"
    if isinstance(value, Mapping):
        return f"only train may be a mapping, from client to data set; give {_KINDS}"
    return f"should be {_KINDS}"


def _rows(value: Any) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a list or of a frame, with texts as column names."""
    if not _is_frame(value):
        yield from ({str(name): each for name, each in row.items()} for row in value)
        return
    named = value.set_axis([str(name) for name in value.columns], axis="columns")
    for first in range(0, len(named), BATCH_ROWS):
        yield from named.iloc[first : first + BATCH_ROWS].to_dict("records")


def _is_split(name: object) -> bool:
    """Whether a key names a split, such as "test" or "train_sft"."""
    return re.split(r"[^a-z]", str(name).lower())[0] in _SPLITS


def _is_row(value: object) -> bool:
    """Whether a list's item is a row."""
    return isinstance(value, Mapping)


def _is_dataset(value: object) -> bool:
    """Whether an object is a data set of the datasets library."""
    return _is_named(value, "datasets", "Dataset")


def _is_frame(value: object) -> bool:
    """Whether an object is a pandas frame; pandas need not be installed."""
    return _is_named(value, "pandas", "DataFrame")


def _is_named(value: object, library: str, name: str) -> bool:
    """Whether an object is of a class of a library, or of a subclass, without importing the library."""
    return any(
        each.__name__ == name and each.__module__.partition(".")[0] == library
        for each in type(value).__mro__
    )


def _problem(key: str, message: str) -> ConfigError:
    """The error for an argument."""
    return ConfigError([Problem(key, message)])
