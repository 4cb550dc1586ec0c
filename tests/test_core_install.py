"""Tests of an installation without extras: it reads, plans and audits, and says what it lacks."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from support.audited import spend
from support.commands import DEMO, ROOT
from support.core_install import canonical, in_core

from fedslm import extras
from fedslm.errors import MissingPackage
from fedslm.privacy import keys
from fedslm.privacy.ledger import Ledger

Result = tuple[int, str, str]
FEW = "--epsilon 3 --delta 1e-5 --sample-rate 0.1 --steps 10"
ASKED = "--unit record --epsilon 3 --task classification --base demo --evaluation {at}/notes.csv"
PRV = 'PRV needs fedslm[train] (opacus is not installed): pip install "fedslm[train]"'
FINE = {  # what a core installation can do, and a part of what it says
    "help": ("--help", "Federated, privacy-preserving"),
    "schema": ("config schema", '"title": "Config"'),
    "config example": ("config example deployed", "[federation]"),
    "config show": (f"config show {DEMO}", "[privacy]"),
    "config check": (f"config check {DEMO}", ": ok (sha256"),
    "methods": ("methods", "fedrot"),
    "doctor": ("doctor", "fedslm can be used here."),
    "node example": ("node example hospital", "patient"),
    "budget plan": (f"budget plan {FEW}", f"only two accountants: {PRV}"),
    "policy example": ("policy example", "max_epsilon_per_run"),
    "node enroll": ("node enroll {at}/node --name north", "north.request.json"),
    "policy check": ("policy check {at}/node/policy.toml", ": ok; over the lifetime"),
    "provision init": ("provision init {at}/server/federation.toml --host localhost", "authority.crt"),
    "provision renew": ("provision renew --server {at}/server", "is valid until"),
    "provision list": ("provision list --server {at}/server", "fingerprint"),
    "audit ledger": ("audit ledger {at}/ledger --public-key {at}/ledger/{key}", f"RDP: {PRV}"),
}
LACKING = {  # what it cannot, and the package that it names
    "simulate": (f"simulate {DEMO}", "train", "flwr"),
    "demo": ("demo --directory {at}/demo", "train", "torch"),
    "predict": ("predict {at}/run --text a", "train", "torch"),
    "distill": ("distill {at}/run", "train", "flwr"),
    "model info": (f"model info {DEMO}", "train", "datasets"),
    "config check --data": (f"config check {DEMO} --data", "train", "flwr"),
    "self-test": ("audit self-test", "train", "torch"),
    "attack": ("audit run {at}/run", "train", "torch"),
    "plot": (f"budget plan {FEW} --plot {{at}}/budget.png", "plots", "matplotlib"),
    "init": (f"init {{at}}/mine.toml --data {{at}}/notes.csv {ASKED}", "train", "pyarrow"),
    "node up": ("node up {at}/node", "train", "flwr"),
    "server up": ("server up {at}/server", "train", "flwr"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """What all commands said, one after another in one process."""
    at = tmp_path_factory.mktemp("core")
    (at / "ledger").mkdir()
    (at / "notes.csv").write_text("text,label\na cough,lung\n")
    spend(Ledger(at / "ledger" / "ledger.jsonl", keys.signing_key(at / "ledger")), 1)
    lines = [line for line, *_ in (*FINE.values(), *LACKING.values())]
    found = in_core([line.format(at=at, key=keys.PUBLIC_KEY).split() for line in lines])
    return dict(zip([*FINE, *LACKING], found, strict=True))


@pytest.mark.parametrize("name", FINE)
def test_the_core_is_enough(name: str, results: dict[str, Result]) -> None:
    """Commands that train nothing and read no data work without the extras."""
    code, out, err = results[name]
    assert code == 0, err
    assert FINE[name][1] in out


@pytest.mark.parametrize("name", LACKING)
def test_a_missing_package_is_one_clear_error(name: str, results: dict[str, Result]) -> None:
    """The extra and the command that installs it, exit code 2, no traceback, and nothing done."""
    _, extra, package = LACKING[name]
    code, out, err = results[name]
    assert (code, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    words = f'needs fedslm[{extra}] ({package} is not installed): pip install "fedslm[{extra}]"'
    assert errors[0].endswith(words)
    assert "Traceback" not in err


def test_what_is_not_checked_is_said(results: dict[str, Result]) -> None:
    """A check that a core installation leaves out is named."""
    assert "can learn is not checked: that needs fedslm[train]" in results["config check"][2]


def test_the_table_of_extras_is_that_of_the_project() -> None:
    """Each package of an extra, and no other, is in the table, under the smallest extra that has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    for extra in ("plots", "train"):
        listed = {canonical(Requirement(each).name) for each in optional[extra]} - {"fedslm"}
        table = {canonical(package) for package, its in extras.EXTRAS.items() if its == extra}
        assert table == listed
    core = {canonical(Requirement(each).name) for each in project["dependencies"]}
    assert not core & {canonical(package) for package in extras.EXTRAS}


def test_only_a_package_that_is_absent_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken installation, or a package of no extra, keeps its own error."""
    for name in ("torch.no_such_part", "no_such_package"):
        with pytest.raises(ModuleNotFoundError, match=name), extras.explained():
            __import__(name)
    monkeypatch.setitem(extras.EXTRAS, "no_such_package", "train")
    words = r'no_such_package is not installed\): pip install "fed'
    with pytest.raises(MissingPackage, match=words), extras.explained():
        __import__("no_such_package.part")


def test_training_needs_three_accountants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Opacus a plan cannot be verified, whatever a report may say with two accountants."""
    from fedslm.privacy import accounting
    from fedslm.records import Event

    accounting._cross_checked.cache_clear()
    monkeypatch.setattr(accounting, "is_installed", lambda package: package != "opacus")
    event = Event(0.1, 2.0, 10)
    for events in ([event], []):
        with pytest.raises(MissingPackage, match="the check by three accountants needs fedslm"):
            accounting.cross_check(events, 1e-5)
        assert accounting.cross_check(events, 1e-5, needs_prv=False).prv is None
    accounting._cross_checked.cache_clear()
