"""Load examples from the hub, a local file or directory, a database, or the embedded demo."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from fedslm.config import DataConfig, TaskConfig
from fedslm.data import database, demo, facts, files, hub
from fedslm.data.columns import Wanted, needed
from fedslm.data.splits import files_of, format_of, texts_in
from fedslm.data.tables import BATCH_ROWS, spool
from fedslm.errors import DataError, told_as
from fedslm.rng import stream
from fedslm.storage import expand

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

EMBEDDED = ("demo", facts.NAME)  # sources that are generated
_QUERY = "data.train_query"
_LIKE_PATHS = (".", "~", "/", "$")


def load_train(
    config: DataConfig,
    task: TaskConfig,
    seed: int,
    scratch: Path | None = None,
    *,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Dataset:
    """Loads the private split that is partitioned among clients. Reads only the needed columns.

    Args:
        config: Data sources and columns.
        task: Determines which columns are needed.
        seed: Seed of the demo data; other sources do not use it.
        scratch: Directory for memory-mapped copies; None: the system's temporary directory.
        more: Purpose of each further column (a dotted key) to its name.

    Raises:
        DataError: Source, split or a needed column is missing, or a record cannot be read.
    """
    wanted = Wanted({**needed(config, task), **more})
    split, query = config.train_split, config.train_query
    dataset = load(config.source, split, query, seed=seed, scratch=scratch, wanted=wanted)
    return _with_class_names(dataset, config.label_column, scratch)


def load_evaluation(
    config: DataConfig,
    task: TaskConfig,
    seed: int,
    scratch: Path | None = None,
    *,
    beside_private: bool = True,
    optional: frozenset[str] = frozenset(),
) -> Dataset:
    """Loads the public split on which the server evaluates. Reads only the needed columns.

    Args:
        config: Data sources and columns.
        task: Determines which columns are needed.
        seed: Seed of the demo data.
        scratch: As :func:`load_train`.
        beside_private: Whether the private split is loaded too (a simulation): the two must differ.
        optional: Further columns to read; null where they do not exist.

    Raises:
        DataError: As :func:`load_train`, or the split is the private one.
    """
    source = config.evaluation_source or config.source
    split, query = config.evaluation_split, config.evaluation_query
    if beside_private:
        _check_public(config, source, split, query, key="evaluation")
    wanted = Wanted(needed(config, task), optional)
    with told_as(_evaluation_keys(config)):
        dataset = load(source, split, query, seed=seed, scratch=scratch, wanted=wanted)
    return _with_class_names(dataset, config.label_column, scratch)


def load_public(
    config: DataConfig,
    task: TaskConfig,
    seed: int,
    scratch: Path | None = None,
    *,
    beside_private: bool = True,
) -> Dataset | None:
    """Loads the public records available for training; None if the config sets no source.

    Args: as :func:`load_evaluation`.

    Raises:
        DataError: As :func:`load_train`, or the records are the private split.
    """
    if not config.has_public_records:
        return None
    source = config.public_source or config.source
    split = config.public_split or config.train_split
    if beside_private:
        _check_public(config, source, split, None, key="public")
    wanted = Wanted(needed(config, task))
    with told_as({"data.source": "data.public_source"} if config.public_source else {}):
        dataset = load(source, split, seed=seed, scratch=scratch, wanted=wanted)
    return _with_class_names(dataset, config.label_column, scratch)


def refuse_private(private: DataConfig, public: DataConfig) -> None:
    """Refuses public sources of one config that are the private training split of another.

    Raises:
        DataError: They share a file, a query or a name.
    """
    evaluation = public.evaluation_source or public.source
    query = public.evaluation_query
    _check_public(private, evaluation, public.evaluation_split, query, key="evaluation")
    if public.has_public_records:
        source = public.public_source or public.source
        split = public.public_split or public.train_split
        _check_public(private, source, split, None, key="public")


def _check_public(config: DataConfig, source: str, split: str, query: str | None, *, key: str) -> None:
    """Refuses private data that is configured as public."""
    private = _places(config.source, config.train_split, config.train_query)
    if shared := sorted(private.keys() & _places(source, split, query).keys()):
        raise DataError(
            f"the public {key} split is the private training split ({private[shared[0]]}); set "
            f"data.{key}_source or data.{key}_split to public data"
        )


def _places(source: str, split: str, query: str | None) -> dict[str, str]:
    """Location of one split of a source: identity of each file (or query) to its name."""
    source = expand(source)
    if database.is_url(source):
        place = f"{source}: {' '.join((query or '').split()).rstrip('; ').lower()}"
        return {place: place}
    path = Path(source)
    if not path.exists():
        return {f"{source}:{split}": f"{source}:{split}"}
    each = [
        file for one in files_of(path, split) for file in (texts_in(one) if one.is_dir() else [one])
    ]
    return {f"{file.stat().st_dev}:{file.stat().st_ino}": str(file.resolve()) for file in each}


def same_records(first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two splits, each a source and its split, share a file, a query or a name."""
    places = [_places(source, split, None) for source, split in (first, second)]
    return not places[0].keys().isdisjoint(places[1].keys())


def cut(dataset: Dataset, max_records: int, seed: int) -> Dataset:
    """Returns a seeded sample if a data set is longer than ``max_records``, else all of it in order."""
    if len(dataset) <= max_records:
        return dataset
    return dataset.shuffle(seed=seed, keep_in_memory=True).select(range(max_records))


def load(
    source: str,
    split: str,
    query: str | None = None,
    *,
    seed: int = 0,
    scratch: Path | None = None,
    wanted: Wanted | None = None,
) -> Dataset:
    """Loads one split of a source unchanged.

    Errors name ``data.source`` and ``data.train_query``; :func:`fedslm.errors.told_as` renames them.

    Args:
        source: Hub name, path (with variables), database URL or "demo".
        split: Split or file stem; ignored for files and databases.
        query: SQL, for databases.
        seed: Seed of the demo data.
        scratch: As :func:`load_train`.
        wanted: Columns to read; None: all.

    Raises:
        DataError: As :func:`load_train`.
    """
    wanted = wanted or Wanted()
    if source in EMBEDDED:
        return _chosen(_load_demo(source, split, seed), wanted)
    expanded = expand(source)
    if database.is_url(expanded):
        if query is None:
            raise DataError(f"{_QUERY} is missing: a database needs the query that gives the rows")
        tables = database.tables_from(expanded, query, _QUERY, wanted)
        return spool(_checked(tables, wanted), scratch, f"the result of {_QUERY}")
    path = Path(expanded)
    if path.exists():
        found = files_of(path, split)
        tables = (table for each in found for table in files.tables_in(each, wanted))
        return spool(_checked(tables, wanted), scratch, str(found[0]))
    if "$" in expanded:
        raise DataError(
            f"data.source={source!r}: an environment variable in it is not set, or is not text"
        )
    if _is_path(expanded, path):
        raise DataError(
            f"data.source={source!r}: no such file or directory ({path.absolute()}); a data set of the "
            f"hub is OWNER/NAME"
        )
    return _chosen(hub.load(source, split), wanted)


def _checked(tables: Iterable[pa.Table], wanted: Wanted) -> Iterator[pa.Table]:
    """Yields tables; raises an error at the end if no table had a needed column."""
    yield from tables
    if wanted.there:
        wanted.check()


def _chosen(dataset: Dataset, wanted: Wanted) -> Dataset:
    """Returns the requested columns of a data set."""
    chosen = wanted.of(dataset.column_names)
    wanted.check()
    return dataset.select_columns(chosen)


def column_names(config: DataConfig, seed: int) -> list[str]:
    """Names of the public evaluation split's columns; of a file, only the beginning is read.

    Raises:
        DataError: As :func:`load_evaluation`.
    """
    source, split = config.evaluation_source or config.source, config.evaluation_split
    with told_as(_evaluation_keys(config)):
        return columns_in(source, split, config.evaluation_query, seed=seed)


def columns_in(source: str, split: str, query: str | None = None, *, seed: int = 0) -> list[str]:
    """Names of a split's columns; of a file, only the beginning is read.

    Args and errors: as :func:`load`.
    """
    path = Path(expand(source))
    if not database.is_url(expand(source)) and path.exists():
        found = files_of(path, split)
        first = next(files.tables_in(found[0]), None)
        return [] if first is None else list(first.column_names)
    return list(load(source, split, query, seed=seed).column_names)


def _evaluation_keys(config: DataConfig) -> Mapping[str, str]:
    """Returns the keys that say where the public evaluation split is, for those of the private one."""
    source = {"data.source": "data.evaluation_source"} if config.evaluation_source else {}
    return {_QUERY: "data.evaluation_query", **source}


def is_here(source: str) -> bool:
    """Whether a source is the demo data or a local file or directory, so that nothing is downloaded."""
    return source in EMBEDDED or Path(expand(source)).exists()


def _is_path(source: str, path: Path) -> bool:
    """True for a source that cannot be a name on the hub."""
    return source.startswith(_LIKE_PATHS) or format_of(path) is not None or not hub.is_name(source)


def _load_demo(source: str, split: str, seed: int) -> Dataset:
    """Loads the demo data, with or without planted facts."""
    from datasets import Dataset

    parts = _generated(source, seed)
    if split not in parts:
        raise DataError(f"the demo data has no split {split!r}; known: {', '.join(parts)}")
    return Dataset.from_list(parts[split])


@lru_cache(maxsize=1)
def _generated(source: str, seed: int) -> Mapping[str, list[Any]]:
    """Generates all splits, which a run requests one by one; callers must not modify the rows."""
    if source == facts.NAME:
        return facts.generate_facts(stream(seed, facts.NAME))
    data = demo.generate(stream(seed, "demo-data"))
    return {"train": data.train, "public": data.public, "test": data.evaluation}


def _with_class_names(dataset: Dataset, label: str | None, scratch: Path | None) -> Dataset:
    """Replaces class indices in the label column by names."""
    if label is None or (names := _class_names(dataset, label)) is None:
        return dataset
    tables = dataset.with_format("arrow").iter(BATCH_ROWS)
    return spool((_with_names(table, label, names) for table in tables), scratch, f"column {label!r}")


def _class_names(dataset: Dataset, column: str) -> list[str] | None:
    """Returns the names for the indices in a column (or in its lists); None if there are none."""
    from datasets import ClassLabel

    if column not in dataset.column_names:
        return None
    feature = dataset.features[column]
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
    return list(inner.names) if isinstance(inner, ClassLabel) else None


def _with_names(table: pa.Table, column: str, names: list[str]) -> pa.Table:
    """Returns a table with names in place of class indices; -1 and null mean no class."""
    import pyarrow as pa

    def name(index: Any) -> Any:
        if isinstance(index, list):
            return [name(each) for each in index]
        return names[index] if index is not None and 0 <= index < len(names) else None

    values = table[column].to_pylist()
    is_list = pa.types.is_nested(table.schema.field(column).type)
    kind = pa.list_(pa.string()) if is_list else pa.string()
    named = pa.array([name(value) for value in values], kind)
    position = table.column_names.index(column)
    return table.set_column(position, column, named).replace_schema_metadata(None)
