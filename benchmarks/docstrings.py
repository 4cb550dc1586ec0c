"""Two public data sets from sources that are installed anyway: docstrings, and where they are from.

`packages`: the first paragraph of a docstring, and which of ten packages it is from. `library`: the
same for parts of the standard library. Names of the classes are taken out of the texts.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "cryptography",
    "datasets",
    "matplotlib",
    "numpy",
    "peft",
    "pydantic",
    "scipy",
    "sqlalchemy",
    "torch",
    "transformers",
)
LIBRARY = (
    "asyncio",
    "ctypes",
    "distutils",
    "email",
    "encodings",
    "http",
    "idlelib",
    "importlib",
    "json",
    "lib2to3",
    "logging",
    "multiprocessing",
    "tkinter",
    "turtle",
    "unittest",
    "urllib",
    "wsgiref",
    "xml",
    "xmlrpc",
    "zipfile",
)
_SHORTEST, _LONGEST, _MOST, _FEWEST = 30, 400, 700, 40


def make(name: str, directory: Path) -> None:
    """Writes train.jsonl and test.jsonl of `packages` or `library`, once."""
    if (directory / "test.jsonl").exists():
        return
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for label in PACKAGES if name == "packages" else LIBRARY:
        texts = sorted(set(_texts(label, name)))
        random.Random(0).shuffle(texts)
        if len(texts) >= _FEWEST:
            rows += [{"text": text, "label": label} for text in texts[:_MOST]]
    random.Random(1).shuffle(rows)
    held_out = len(rows) // 5
    for split, part in (("test", rows[:held_out]), ("train", rows[held_out:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (directory / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def _texts(label: str, name: str) -> Iterator[str]:
    """First paragraphs of docstrings, without the label."""
    for path in _sources(label, name):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                text = re.sub(re.escape(label), "it", text, flags=re.IGNORECASE)
                if _SHORTEST <= len(text) <= _LONGEST:
                    yield text


def _sources(label: str, name: str) -> list[Path]:
    """Python files of a package, or of a part of the library."""
    if name == "library":
        place = Path(sysconfig.get_paths()["stdlib"])
        return sorted([*(place / label).rglob("*.py"), *place.glob(f"{label}.py")])
    found = importlib.util.find_spec(label)
    places = list(found.submodule_search_locations or ()) if found is not None else []
    return sorted(path for place in places for path in Path(place).rglob("*.py"))
