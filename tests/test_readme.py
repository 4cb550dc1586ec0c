"""The README and the pages that it names: short, with links that lead somewhere, and code that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedslm.config import from_toml

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md"), *ROOT.glob("clients/*/*.md")])


def blocks(kind: str) -> list[str]:
    """The README's blocks of code of a language."""
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def anchor(heading: str) -> str:
    """The name under which a heading can be linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def test_it_is_short() -> None:
    """Three people find their door within 700 words; a table's bars are not words."""
    assert len(re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text())) <= 700


def test_every_link_leads_somewhere() -> None:
    """Of each page: to a file that is there, and to a heading that it has."""
    broken = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, heading = target.partition("#")
            file = page.parent / name if name else page
            headings = (
                re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if file.is_file() else []
            )
            if not file.exists() or (heading and heading not in map(anchor, headings)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def test_its_config_and_its_call_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The TOML file is a config, and the Python lines train with it and print what they say."""
    (config,), (code,) = blocks("toml"), blocks("python")
    (tmp_path / "my.toml").write_text(config)
    assert from_toml(tmp_path / "my.toml").federation.num_clients == 5
    faster = f"{config}\n[engine]\nworkers = 0\n"
    (tmp_path / "my.toml").write_text(faster.replace("num_clients = 5", "num_clients = 5\nrounds = 1"))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (our own page)
    printed = capsys.readouterr().out
    assert "'accuracy': " in printed
    assert printed.rstrip().endswith("runs/mine-2/adapter")
    assert (tmp_path / "runs" / "mine-2" / "report.md").exists()
