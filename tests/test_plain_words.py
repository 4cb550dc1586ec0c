"""What users read is plain English: the words of CONTRIBUTING.md's list do not come back."""

from __future__ import annotations

import ast
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedslm"
WORST = re.compile(
    r"\b(alone|anew|beside|lies?|mend(s|ed)?)\b|(?<!there )\bis no (?!longer)|\bare no (?=[a-z]+ of\b)",
    re.IGNORECASE,
)
OLD = re.compile(r"\b(alone|anew|beside|lies|mend(s|ed)?)\b", re.IGNORECASE)
# A stemmer's own examples, symptoms of made-up patients, and nginx' words.
NOT_OURS = {"inference/porter.py", "data/demo.py", "deployment/proxy.py"}


def spoken(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what a module may show: help of commands and keys, errors, messages."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            is_command = path.parent.name == "cli" and bool(getattr(node, "decorator_list", ()))
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and not is_command:
                silent.add(id(first.value))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            yield node.lineno, node.value


def test_users_read_plain_words() -> None:
    """Of help, messages, templates and pages: only, is stored in, is not a, next to, again."""
    wrong = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if name not in NOT_OURS:
            wrong += [f"{name}:{line}: {text}" for line, text in spoken(path) if WORST.search(text)]
    templates = [*PACKAGE.rglob("*.j2"), *(PACKAGE / "deployment" / "templates").iterdir()]
    pages = [
        ROOT / "README.md",
        ROOT / "SECURITY.md",
        *ROOT.glob("*/README.md"),
        *ROOT.glob("docs/*.md"),
    ]
    for path in sorted([*templates, *pages]):
        lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        wrong += [f"{path.name}:{line}: {text}" for line, text in lines if WORST.search(text)]
    assert not wrong, "\n".join(wrong)


def explained(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of a module's docstrings and comments."""
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield getattr(node, "lineno", 1), ast.get_docstring(node) or ""


def test_developers_read_plain_words() -> None:
    """The same words stay out of docstrings and comments; *besides* and names in backticks are fine."""
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {found[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in explained(path)
        if (found := OLD.search(text))
    ]
    assert not wrong, "\n".join(wrong)


def test_the_words_are_found(tmp_path: Path) -> None:
    """In an error, in a command's help and in a key's; not in another docstring."""
    (tmp_path / "cli").mkdir()
    path = tmp_path / "cli" / "some.py"
    path.write_text(
        '"""It lies here."""\n@app.command()\ndef run():\n    """Beside it."""\n'
        'class A:\n    """Alone."""\n    key: int = 0\n    """This is no key."""\n'
        'def f():\n    """Anew."""\n    raise ValueError(f"{1} lie on one disk")\n'
    )
    found = [line for line, text in spoken(path) if WORST.search(text)]
    assert found == [4, 8, 11]
