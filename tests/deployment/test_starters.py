"""Files that an engineer starts from: they are read as they are, agree with one another, and replace nothing."""

from __future__ import annotations

import itertools
import stat
import tomllib
from pathlib import Path

import pytest
from support.commands import run

from fedslm import config as configuration
from fedslm import validation
from fedslm.config import Config
from fedslm.deployment import starters
from fedslm.deployment.settings import read_federation, read_node
from fedslm.deployment.starters import Start
from fedslm.errors import ConfigError, PolicyRefused, RunError
from fedslm.privacy.calibration import calibrated
from fedslm.privacy.plan import PrivatePlan
from fedslm.privacy.policy import EXAMPLE, NodePolicy, PlanRequest, read_policy
from fedslm.protocol.lifetime import deadline_with

ROOT = Path(__file__).parent.parent.parent
URL = "postgresql+psycopg://records.example:5432/notes"


def test_what_is_copied_is_what_is_written() -> None:
    """clients/ and server/ hold the same text as `node enroll` and `provision init` write."""
    hospital = starters.node_files(Path("/var/lib/fedslm/north"), Start("north"))
    phone = starters.node_files(Path("/any"), Start("phone", "phone"))
    for profile, files in (("hospital", hospital), ("phone", phone)):
        for name, content in files.items():
            assert (ROOT / "clients" / profile / name).read_text() == content, name
    assert run("policy", "example").stdout == hospital["policy.toml"] == EXAMPLE
    assert set(phone) == {"node.toml", "policy.toml", "may-train"}
    template = (ROOT / "server" / "federation.toml").read_text()
    assert starters._template("federation.toml") == template


@pytest.mark.parametrize(
    ("profile", "unit", "source"),
    itertools.product(("hospital", "phone"), (None, "record", "patient"), (None, URL, "notes.jsonl")),
)
def test_every_start_is_read(
    tmp_path: Path, profile: str, unit: str | None, source: str | None
) -> None:
    """Whatever is asked for, node.toml and policy.toml can be read, and columns agree with the unit."""
    words = ["--profile", profile, *(["--unit", unit] if unit else [])]
    words += ["--source", source] if source else []
    done = run("node", "enroll", str(tmp_path), "--name", "south-2", *words)
    assert done.exit_code == 0, done.stderr
    node, policy = read_node(tmp_path), read_policy(tmp_path / "policy.toml")
    assert (node.name, node.profile) == ("south-2", profile)
    wanted = unit or {"hospital": "patient", "phone": "record"}[profile]
    assert policy.unit == ("user" if wanted == "patient" else wanted)
    assert policy.unit_column == ("patient" if wanted == "patient" else None)
    assert ("patient" in node.columns) == (wanted == "patient")
    if source:
        assert node.source == (source if source == URL else str(Path(source).absolute()))
    assert bool(node.query) == (profile == "hospital" and source != "notes.jsonl")
    for name in ("node.toml", "policy.toml"):
        assert f"wrote {tmp_path / name}: edit " in done.stdout.replace("\n", " ")
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """Files of the operator stay as they are, and are not said to be written."""
    (tmp_path / "policy.toml").write_text("mine")
    done = run("node", "enroll", str(tmp_path), "--name", "north")
    assert done.exit_code == 0
    assert (tmp_path / "policy.toml").read_text() == "mine"
    assert "policy.toml" not in done.stdout
    (tmp_path / "node.toml").write_text("mine too")
    assert "wrote" not in run("node", "enroll", str(tmp_path), "--name", "north").stdout
    assert (tmp_path / "node.toml").read_text() == "mine too"


def test_a_source_with_quotes_or_a_password(tmp_path: Path) -> None:
    """A path is written so that it is read back; a password is refused, and no settings are written."""
    odd = tmp_path / 'a "b" \\1 ü.jsonl'
    files = starters.node_files(tmp_path, Start("north", source=str(odd)))
    assert tomllib.loads(files["node.toml"])["source"] == str(odd)
    with pytest.raises(RunError, match="contains a password"):
        starters.write_node_files(tmp_path, Start("n", source="postgresql://me:secret@host/notes"))
    assert list(tmp_path.iterdir()) == []


def test_a_federation_is_started(tmp_path: Path) -> None:
    """`provision init` writes federation.toml with name and host; one that is there stays, and is not renamed."""
    path = tmp_path / "federation" / "federation.toml"
    done = run("provision", "init", str(path), "--name", "net", "--host", "127.0.0.1")
    assert done.exit_code == 0, done.stderr
    found = read_federation(path.parent)
    assert (found.name, found.host, found.port) == ("net", "127.0.0.1", 8443)
    assert (path.parent / "server.crt").exists()
    assert not starters.write_federation(path)
    with pytest.raises(ConfigError, match="exists: edit it"):
        starters.write_federation(path, host="other")
    other = tmp_path / "other" / "federation.toml"
    assert starters.write_federation(other)
    assert read_federation(other.parent).name == "federation"


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """What `fedslm config example deployed` prints, read."""
    path = tmp_path_factory.mktemp("example") / "triage.toml"
    path.write_text(run("config", "example", "deployed").stdout)
    return configuration.from_toml(path, [])


def test_the_example_of_a_run_is_sound(deployed: Config) -> None:
    """Every key is known, nothing contradicts anything, nothing is warned of, and it is the docs' triage."""
    validation.check(deployed)
    assert list(validation.warnings(deployed)) == []
    assert deployed.run.name == "triage"
    assert deployed.privacy.unit == "user"


def asked(config: Config) -> PlanRequest:
    """What a server asks for with a config."""
    plan = calibrated(config.privacy, config.training, config.federation.rounds)
    assert isinstance(plan, PrivatePlan)
    return PlanRequest(plan, "0" * 64, config.task.name, config.model.base)


def test_the_example_of_a_run_passes_the_example_policy(deployed: Config) -> None:
    """A node with the example policy takes part in it, in every round and within a day; a stricter one refuses."""
    policy = NodePolicy.model_validate(tomllib.loads(EXAMPLE))
    policy.check(asked(deployed))
    assert deployed.privacy.epsilon is not None
    assert deployed.privacy.epsilon <= policy.epsilon
    assert deployed.federation.rounds + deployed.privacy.spare_rounds <= policy.max_rounds_per_day
    assert deployed.privacy.epsilon == policy.max_epsilon_per_run == policy.epsilon / 10
    assert policy.answer_after_seconds is not None
    assert deployed.federation.round_deadline_seconds >= deadline_with(policy.answer_after_seconds)
    for changes in (
        {"max_sample_rate": 0.01},
        {"max_steps_per_round": 5},
        {"epsilon": 0.5},
        {"max_epsilon_per_run": 0.5},
    ):
        with pytest.raises(PolicyRefused):
            policy.model_copy(update=changes).check(asked(deployed))


def test_a_record_level_run_is_refused_by_the_example_policy(deployed: Config) -> None:
    """The policy that the example run passes is no open door: a weaker unit is refused by name."""
    policy = NodePolicy.model_validate(tomllib.loads(EXAMPLE))
    privacy = deployed.privacy.model_copy(
        update={"unit": "record", "unit_column": None, "max_records_per_unit": None}
    )
    with pytest.raises(PolicyRefused, match="is weaker than 'user'"):
        policy.check(asked(deployed.model_copy(update={"privacy": privacy})))
