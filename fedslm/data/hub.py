"""Data sets from the hub or its local cache: OWNER/NAME, or OWNER/NAME:SUBSET."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fedslm.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")
_PROBE_SECONDS = 5.0


def is_name(source: str) -> bool:
    """True for a source that may be the name of a data set on the hub.

    >>> is_name("stanfordnlp/imdb"), is_name("nyu-mll/glue:sst2"), is_name("imdb"), is_name("a/b/c")
    (True, True, False, False)
    """
    return _NAME.fullmatch(source) is not None


def load(source: str, split: str) -> Dataset:
    """Loads one split, memory-mapped from the hub's local cache.

    Raises:
        DataError: The hub does not have the data set; or the hub is unreachable (detected within
            seconds) and the cache does not have it either.
    """
    import datasets

    name, _, subset = source.partition(":")
    datasets.disable_progress_bars()
    unreachable = _unreachable(name)
    try:
        if not unreachable:
            return datasets.load_dataset(name, subset or None, split=split)
        with _offline():
            return datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # the hub client raises dozens of unrelated types
        if unreachable:
            raise DataError(
                f"data.source={source!r} is not a local path, the hub cannot be reached "
                f"({unreachable}), and its cache lacks this data set; give the path of a local file or "
                f"directory"
            ) from error
        first = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"data.source={source!r} (split {split!r}) is neither a local path nor a data set that the "
            f"hub provides: {type(error).__name__}: {first}"
        ) from error


def _unreachable(name: str) -> str:
    """Returns why the hub is unreachable; empty if it responds. Sends one request, without retries."""
    import httpx
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if os.environ.get("HF_DATASETS_OFFLINE", "") not in ("", "0"):
        return "HF_DATASETS_OFFLINE is set"
    try:
        huggingface_hub.dataset_info(name, timeout=_PROBE_SECONDS)
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except HfHubHTTPError:
        return ""  # the hub responds; what it reports about the name is handled during loading
    except (httpx.HTTPError, OSError) as error:
        return str(error) or type(error).__name__
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """Uses only the cache; otherwise each file is requested five times, with pauses."""
    import datasets
    import huggingface_hub

    places = ((datasets.config, "HF_HUB_OFFLINE"), (huggingface_hub.constants, "HF_HUB_OFFLINE"))
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, True)
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)
