"""Finds the files of a split: all pieces must exist, and no other file may look like a part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from fedslm.errors import DataError

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TEXT, _GZIP = ".txt", ".gz"
_COMPRESSED = (".jsonl", ".json", ".csv", ".tsv")
_PACKED = (_GZIP, ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".tar", ".tgz")
_TABLES = (".ndjson", ".jsonlines", ".jl", ".pq", ".parq", ".feather", ".ipc", ".orc", ".avro", ".tab")
_BOOKS = (".psv", ".xls", ".xlsx", ".xlsm", ".ods", ".pkl", ".pickle", ".sqlite", ".sqlite3")
_UNREAD = (*_PACKED, *_TABLES, *_BOOKS, ".tfrecord")
_MOST_NAMED = 6


def format_of(path: Path) -> str | None:
    """Returns the format suffix of a file name, also before .gz, in any case; None for other files.

    >>> format_of(Path("train.jsonl.gz")), format_of(Path("train.PARQUET")), format_of(Path("a.txt"))
    ('.jsonl', '.parquet', None)
    """
    known = _COMPRESSED if is_gzip(path) else FORMATS
    suffix = Path(path.name.lower().removesuffix(_GZIP)).suffix
    return suffix if suffix in known else None


def is_gzip(path: Path) -> bool:
    """True for a name that ends with .gz."""
    return path.suffix.lower() == _GZIP


def files_of(source: Path, split: str) -> list[Path]:
    """Returns the files of a split: the source itself if it is a file.

    In a directory, a split may be a file SPLIT.jsonl.gz, SPLIT.csv, …, all files of
    SPLIT-00000-of-00002.parquet, …, a folder SPLIT/ of text files, or the directory itself if it
    contains nothing but text files. Hidden files are ignored.

    Raises:
        DataError: There is no such split, a piece is missing, or another file, such as
            SPLIT.part2.jsonl, may be a part of the split; names the files.
    """
    try:
        found = _split_in(source, split) if source.is_dir() else [source]
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    for path in found:
        if not path.exists():
            raise DataError(f"{path} is a link to a file that is not there; fetch the file itself")
    return found


def _split_in(directory: Path, split: str) -> list[Path]:
    """Finds a split in a directory, as :func:`files_of` describes."""
    there = sorted(path for path in directory.iterdir() if _is_visible(path, directory))
    pieces = {path: match for path in there if (match := _piece(path, split))}
    whole = [path for path in there if _stem(path) == split.casefold()]
    others = [path for path in there if path not in pieces and _may_be_part(path, split)]
    if not whole and not pieces and len(others) == 1 and others[0].is_dir():
        return [_readable(directory, others[0])]  # train.parquet/: raises an error with the reason
    if others or len(whole) + bool(pieces) > 1:
        raise DataError(
            f"data.source={str(directory)!r}: split {split!r} may be any of "
            f"{_named([*whole, *pieces, *others])}; keep one of them, name pieces "
            f"{split}-00000-of-00002, {split}-00001-of-00002, or give the path of one file"
        )
    if pieces:
        return _complete(directory, split, pieces)
    if whole:
        return [_readable(directory, whole[0])]
    if _is_only_texts(there):
        return [directory]
    found = _named(path for path in there if _stem(path) is not None) or "no data files"
    raise DataError(
        f"data.source={str(directory)!r} has no split {split!r}; found {found}; name the split in "
        f"data.train_split or data.evaluation_split, or give the path of one file"
    )


def is_text_folder(path: Path) -> bool:
    """True for a folder that contains text files, or one folder of text files per label."""
    return path.is_dir() and any(map(_is_text, _near(path)))


def texts_in(folder: Path) -> list[Path]:
    """Returns the text files of a folder and its direct subfolders, in order; ignores hidden files.

    Raises:
        DataError: Some records would be ignored: they are nested deeper, or have another format.
    """
    texts = sorted(filter(_is_text, _near(folder)))
    records = (path for path in folder.rglob("*") if _is_text(path) or _is_data(path))
    left = sorted({path for path in records if _is_visible(path, folder)} - set(texts))
    if texts and left:
        raise DataError(
            f"{folder}: a folder of texts may contain only *.txt and LABEL/*.txt; move or unpack "
            f"{_named(left, folder)}"
        )
    return texts


def _near(folder: Path) -> Iterator[Path]:
    """Yields the visible paths in a folder and its direct subfolders."""
    paths = chain(folder.glob("*"), folder.glob("*/*"))
    return (path for path in paths if _is_visible(path, folder))


def _is_visible(path: Path, folder: Path) -> bool:
    """True if no part of a path below the folder is hidden."""
    return not any(part.startswith(".") for part in path.relative_to(folder).parts)


def _is_text(path: Path) -> bool:
    """True for a text file."""
    return path.suffix.lower() == _TEXT and path.is_file()


def _is_data(path: Path) -> bool:
    """True for a name of a data file, readable or not."""
    return format_of(path) is not None or path.suffix.lower() in _UNREAD


def _stem(path: Path) -> str | None:
    """Returns a name in lower case without its format suffixes; None if it is not a data file.

    >>> _stem(Path("Train.jsonl.GZ")), _stem(Path("train.v2.tar.xz")), _stem(Path("README.md"))
    ('train', 'train.v2', None)
    """
    if path.is_dir():
        return path.name.casefold() if any(path.iterdir()) else None
    if not _is_data(path) and path.suffix.lower() != _TEXT:
        return None
    bare = Path(path.name.casefold())
    while bare.suffix in (*FORMATS, *_UNREAD, _TEXT):
        bare = Path(bare.stem)
    return bare.name


def _piece(path: Path, split: str) -> re.Match[str] | None:
    """Parses number and total of a name like train-00000-of-00002.parquet; the hub may add a hash."""
    name = rf"{re.escape(split.casefold())}-(?P<number>\d+)-of-(?P<total>\d+)(-[0-9a-f]+)?"
    return re.fullmatch(name, _stem(path) or "")


def _may_be_part(path: Path, split: str) -> bool:
    """True for names such as train.part1.jsonl, train_2.csv or train (1).csv."""
    stem, start = _stem(path) or "", split.casefold()
    beyond = stem.removeprefix(start)
    is_another = beyond == stem or (start[-1:].isdigit() and beyond[:1].isdigit())
    if is_another or not (_is_data(path) or is_text_folder(path)):
        return False
    numbered = re.match(r"[-_ (]*(part|shard|chunk|piece|p)?[-_ ]*\d", beyond)
    return beyond.startswith(".") or numbered is not None


def _complete(directory: Path, split: str, pieces: Mapping[Path, re.Match[str]]) -> list[Path]:
    """Returns all pieces of a split, in order; numbering starts at 0 or at 1."""
    numbers = {path: int(match["number"]) for path, match in pieces.items()}
    ordered, known = sorted(pieces, key=lambda path: numbers[path]), set(numbers.values())
    totals = {int(match["total"]) for match in pieces.values()}
    total = max(totals)
    first = 1 if total in known and 0 not in known else 0
    if len(totals) > 1 or len(known) < len(pieces) or max(known) >= first + total:
        raise DataError(
            f"data.source={str(directory)!r}: the pieces of split {split!r} do not match: "
            f"{_named(ordered)}; keep those of one total, each once"
        )
    if len(known) < total:
        lost = next(number for number in range(first, first + total) if number not in known)
        raise DataError(
            f"data.source={str(directory)!r}: split {split!r} lacks {total - len(known)} of {total} "
            f"pieces, the first of them {lost:05d}-of-{total:05d}; found {_named(ordered)}; add what "
            f"is missing, or give the path of one file"
        )
    return [_readable(directory, path) for path in ordered]


def _readable(directory: Path, path: Path) -> Path:
    """Returns a split in one file or folder, if its format is supported."""
    if is_text_folder(path) if path.is_dir() else format_of(path) is not None:
        return path
    holds = "a folder without .txt files" if path.is_dir() else "in an unsupported format"
    raise DataError(
        f"data.source={str(directory)!r}: {path.name} is {holds}; convert it to one of "
        f"{', '.join(FORMATS)} (text also with .gz) or a folder of .txt, or give the path of a file"
    )


def _is_only_texts(there: list[Path]) -> bool:
    """True if there are texts, but neither data files nor folders of texts, which would be splits."""
    has_more = any(_is_data(path) or is_text_folder(path) for path in there)
    return any(map(_is_text, there)) and not has_more


def _named(paths: Iterable[Path], folder: Path | None = None) -> str:
    """Lists the first of some files; a folder's name ends with a slash."""
    listed = list(paths)
    names = [
        (path.name if folder is None else str(path.relative_to(folder))) + "/" * path.is_dir()
        for path in listed[:_MOST_NAMED]
    ]
    more = f" and {len(listed) - _MOST_NAMED} more" if len(listed) > _MOST_NAMED else ""
    return ", ".join(names) + more
