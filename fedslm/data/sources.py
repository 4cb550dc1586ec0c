"""Where examples come from: a hub name, a local file or directory, or the embedded demo."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fedslm.config import DataConfig
from fedslm.data import demo
from fedslm.errors import DataError
from fedslm.rng import stream

if TYPE_CHECKING:
    from datasets import Dataset

_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def load_train(config: DataConfig, seed: int) -> Dataset:
    """Loads the split that the clients share: private.

    Args:
        config: Where the data is.
        seed: Seed of the demo data; other sources do not use it.

    Raises:
        DataError: Source, split or a needed column is missing.
    """
    return _with_columns(_load(config.source, config.train_split, seed), config, config.source)


def load_evaluation(config: DataConfig, seed: int) -> Dataset:
    """Loads the public split that the server evaluates on.

    Raises:
        DataError: As :func:`load_train`.
    """
    source = config.evaluation_source or config.source
    place = _place(source, config.evaluation_split)
    if place == _place(config.source, config.train_split):
        raise DataError(
            f"the public evaluation split is the private training split ({place}); set "
            f"data.evaluation_source or data.evaluation_split to public data"
        )
    return _with_columns(_load(source, config.evaluation_split, seed), config, source)


def _place(source: str, split: str) -> str:
    """Where one split of a source lies: equal places hold equal data."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = _file_of_split(path, split)
    return str(path.resolve()) if path.is_file() else f"{source}:{split}"


def cut(dataset: Dataset, max_records: int, seed: int) -> Dataset:
    """A seeded sample of a data set that is longer than ``max_records``, else all of it in order."""
    if len(dataset) <= max_records:
        return dataset
    return dataset.shuffle(seed=seed).select(range(max_records))


def _load(source: str, split: str, seed: int) -> Dataset:
    """Loads one split of a source as it is."""
    if source == "demo":
        return _load_demo(split, seed)
    path = Path(source).expanduser()
    if path.is_file():
        return _load_file(path)
    if path.is_dir():
        return _load_file(_file_of_split(path, split))
    if path.is_absolute() or source.startswith((".", "~")) or _format_of(path) is not None:
        raise DataError(f"data.source={source!r}: no such file or directory")
    return _load_hub(source, split)


def _load_demo(split: str, seed: int) -> Dataset:
    """Generates the demo data."""
    from datasets import Dataset

    data = demo.generate(stream(seed, "demo-data"))
    parts = {"train": data.train, "public": data.public, "test": data.evaluation}
    if split not in parts:
        raise DataError(f"the demo data has no split {split!r}; known: {', '.join(parts)}")
    return Dataset.from_list(parts[split])


def _format_of(path: Path) -> str | None:
    """The ``datasets`` builder for a file name, also for .gz files."""
    name = path.name.removesuffix(".gz")
    return _FORMATS.get(Path(name).suffix.lower())


def _file_of_split(directory: Path, split: str) -> Path:
    """Finds SPLIT.jsonl.gz, SPLIT.csv, … in a directory."""
    files = sorted(file for file in directory.iterdir() if _format_of(file) is not None)
    for file in files:
        if file.name.split(".")[0] == split:
            return file
    found = ", ".join(file.name for file in files) or "no data files"
    raise DataError(f"data.source={str(directory)!r} has no split {split!r}; found {found}")


def _load_file(path: Path) -> Dataset:
    """Loads one local file."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    builder = _format_of(path)
    if builder is None:
        raise DataError(f"{path}: unknown format; known: {', '.join(_FORMATS)}, also with .gz")
    options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if builder == "csv" else {}
    if ".tsv" in path.suffixes:
        options["sep"] = "\t"
    datasets.disable_progress_bars()
    try:
        # A cache of its own, gone at once: private rows leave no copy in the user's cache.
        with TemporaryDirectory() as cache:
            return datasets.load_dataset(
                builder,
                data_files=str(path),
                split="train",
                cache_dir=cache,
                keep_in_memory=True,
                **options,
            )
    except (DatasetGenerationError, ValueError, OSError, StopIteration) as error:
        reason = error.__cause__ or error or "it is empty"
        raise DataError(f"{path} cannot be read as {builder}: {reason}") from error


def _load_hub(name: str, split: str) -> Dataset:
    """Loads one split from the hub or its local cache."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise DataError(
            f"data.source={name!r} is neither a local path nor a data set that can be loaded from "
            f"the hub (split {split!r}): {type(error).__name__}: {error}"
        ) from error


def _with_columns(dataset: Dataset, config: DataConfig, source: str) -> Dataset:
    """Checks that the needed columns exist and turns class indices into names."""
    from datasets import ClassLabel

    needed = {"text_column": config.text_column}
    if config.label_column is not None:
        needed["label_column"] = config.label_column
    for key, column in needed.items():
        if column not in dataset.column_names:
            raise DataError(
                f"data.{key}={column!r} is not a column of {source!r}; "
                f"it has {', '.join(dataset.column_names)}"
            )
    label = config.label_column
    if label is not None and isinstance(dataset.features[label], ClassLabel):
        names = dataset.features[label].names
        texts = [names[index] if index is not None and index >= 0 else None for index in dataset[label]]
        dataset = dataset.remove_columns(label).add_column(label, texts)
    return dataset
