"""Builds sdist and wheel, checks what is in them, and installs the wheel without extras: ``make dist``.

The wheel is built from the sdist. Tools and the installation are in environments of their own, which are
deleted; the two files stay in dist/.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
MOST_MEGABYTES = 350  # of a core installation, with pip
SECRET = re.compile(r"\.(key|pem|env|sqlite|db)$|/(ledger\.jsonl|\.git|\.venv|__pycache__)(/|$)")
LEDGER = """
import sys
from pathlib import Path
from fedslm.privacy import keys
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge
from fedslm.records import Event

at = Path(sys.argv[1])
at.mkdir()
ledger = Ledger(at / "ledger.jsonl", keys.signing_key(at))
event = Event(0.05, 3.0, 10)
charge = Charge(event, ADAPTER, 1.0, 1e-5, "run", 1, "plan", "request", "base", "config", "1", "data")
(index,) = ledger.reserve([charge], Limits((100.0, 1e-5)))
ledger.commit(index, "release")
"""


def run(*command: str | Path, at: Path = ROOT) -> str:
    """Runs a command that must succeed; returns its standard output."""
    done = subprocess.run(list(map(str, command)), cwd=at, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def environment(at: Path) -> Path:
    """Makes an environment; returns its directory of programs."""
    venv.create(at, with_pip=True)
    return at / ("Scripts" if sys.platform == "win32" else "bin")


def built(scratch: Path) -> tuple[Path, Path]:
    """Builds both distributions in dist/, and checks their metadata."""
    programs = environment(scratch / "tools")
    run(programs / "pip", "install", "--quiet", "build", "twine")
    for stale in ("dist", "build"):
        shutil.rmtree(ROOT / stale, ignore_errors=True)
    run(programs / "python", "-m", "build", "--outdir", ROOT / "dist", ROOT)
    (sdist,), (wheel,) = (ROOT / "dist").glob("*.tar.gz"), (ROOT / "dist").glob("*.whl")
    run(programs / "python", "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def check_contents(sdist: Path, wheel: Path) -> None:
    """The package with all its data files and nothing else; the sdist also what builds it."""
    listed = run("git", "ls-files", "fedslm").split()
    package = {each for each in listed if (ROOT / each).exists()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames() if "/" in name}
    if in_wheel != package:
        raise SystemExit(f"the wheel differs from the package: {sorted(in_wheel ^ package)}")
    wanted = package | {"pyproject.toml", "README.md", "LICENSE"}
    if not wanted <= in_sdist:
        raise SystemExit(f"the sdist lacks {sorted(wanted - in_sdist)}")
    odd = [name for name in in_sdist | in_wheel if SECRET.search(name) or name.startswith("tests/")]
    if odd:
        raise SystemExit(f"these files should not be distributed: {sorted(odd)}")


def check_core(wheel: Path, scratch: Path) -> int:
    """Installs the wheel without extras and runs what it must be able to; returns its size in MB."""
    at = scratch / "core"
    programs = environment(at)
    pip = (programs / "python", "-m", "pip", "--disable-pip-version-check")
    pins = ("-c", ROOT / "constraints.txt", "--only-binary=:all:")
    run(*pip, "install", "--quiet", *pins, wheel)
    run(*pip, "check")
    size = sum(each.lstat().st_blocks * 512 for each in at.rglob("*")) >> 20
    demo = ROOT / "simulations" / "demo.toml"
    run(programs / "python", "-c", LEDGER, scratch / "ledger", at=scratch)
    for line in (
        "--version",
        "--help",
        f"config check {demo}",
        "budget plan --epsilon 3 --delta 1e-5 --sample-rate 0.1 --steps 10",
        "policy example",
        f"node enroll {scratch}/node --name north",
        f"policy check {scratch}/node/policy.toml",
        f"provision init {scratch}/server/federation.toml --name lab --host localhost",
        f"provision list --server {scratch}/server",
        f"audit ledger {scratch}/ledger --public-key {scratch}/ledger/ledger-key.pub.pem",
    ):
        run(programs / "fedslm", *line.split(), at=scratch)
    if size > MOST_MEGABYTES:
        raise SystemExit(f"a core installation takes {size} MB, more than {MOST_MEGABYTES}")
    run(*pip, "install", "--quiet", "--dry-run", *pins, f"{wheel}[train]")
    return size


def main() -> None:
    """Does all of it."""
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        sdist, wheel = built(scratch)
        check_contents(sdist, wheel)
        size = check_core(wheel, scratch)
    print(f"{sdist.relative_to(ROOT)}, {wheel.relative_to(ROOT)}: a core installation takes {size} MB")


if __name__ == "__main__":
    main()
