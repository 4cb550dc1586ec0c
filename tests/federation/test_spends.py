"""What a server remembers of each ledger, over all runs: no spend is forgotten, and none comes back."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedslm.errors import RolledBack, RunError
from fedslm.federation.spends import SPENDS, Spends, read_standings, readmit
from fedslm.federation.standings import Standing
from fedslm.privacy.keys import public_hex
from fedslm.privacy.ledger import Ledger
from fedslm.privacy.limits import Limits
from fedslm.privacy.lines import ADAPTER, Charge, Unprotected
from fedslm.records import Event

KEY = Ed25519PrivateKey.from_private_bytes(bytes([9] * 32))
ME = public_hex(KEY.public_key())
AMPLE = Limits(run=(100.0, 1e-5))


def spend(ledger: Ledger, number: int, run: str = "run") -> None:
    """Charges and releases one round."""
    values = dict.fromkeys(("plan_sha256", "base_sha256", "config_sha256", "dataset_commitment"), "x")
    event = Event(0.05, 3.0, 10)
    made = Charge(
        event,
        ADAPTER,
        1.0,
        1e-5,
        run,
        number,
        request_sha256=f"{run}{number}",
        code_version="0",
        **values,
    )
    (index,) = ledger.reserve([made], AMPLE)
    ledger.commit(index, "release")


def told(spends: Spends, ledger: Ledger, number: int = 1, run: str = "run") -> str | None:
    """Asks as a run does: says what was seen, and takes the statement with its proofs."""
    seen = spends.standing(ME).seen
    statement = ledger.statement(run, number, "release")
    return spends.believe(statement, seen, ledger.extension(seen))


def lied(spends: Spends, ledger: Ledger, number: int = 1, run: str = "run") -> str | None:
    """The same from a node that gives no proof, as it has none."""
    seen = spends.standing(ME).seen
    return spends.believe(ledger.statement(run, number, "release"), seen, [[] for _ in seen])


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger of one round."""
    made = Ledger(tmp_path / "node" / "ledger.jsonl", KEY)
    spend(made, 1)
    return made


@pytest.fixture
def spends(tmp_path: Path) -> Spends:
    """A register that nobody is in."""
    return Spends(tmp_path / SPENDS)


def copy(ledger: Ledger, target: Path) -> Ledger:
    """A ledger as it is now, somewhere else."""
    shutil.copytree(ledger.path.parent, target)
    return Ledger(target / ledger.path.name, KEY)


def test_a_ledger_that_grows_is_believed(spends: Spends, ledger: Ledger) -> None:
    """Round by round and run by run; the register holds the last statement's figures, on disk."""
    for number in range(1, 6):
        assert told(spends, ledger, number) is None
        spends.save()
        standing = read_standings(spends.path)[ME]
        assert standing.seen == ((len(ledger.read().entries), ledger.read().root()),)
        assert standing.charges == number
        assert standing.epsilon == ledger.spent(1e-5).epsilon
        spend(ledger, number + 1, run="run" if number < 3 else "other")


def test_the_same_statement_again(spends: Spends, ledger: Ledger) -> None:
    """An equal request that is answered again changes nothing."""
    assert told(spends, ledger) is None
    before = spends.standing(ME)
    assert told(spends, ledger) is None
    assert spends.standing(ME) == before


def test_a_deleted_ledger_is_found_out_by_the_next_run(
    tmp_path: Path, spends: Spends, ledger: Ledger
) -> None:
    """79 charges are not forgotten because the run is another one; honest software says so itself."""
    assert told(spends, ledger) is None
    spends.save()
    fresh = Ledger(tmp_path / "fresh" / "ledger.jsonl", KEY)
    spend(fresh, 1, run="next")
    again = Spends(spends.path)
    again.refresh()
    with pytest.raises(RolledBack, match="3 lines"):
        fresh.extension(again.standing(ME).seen)
    assert "replaced" in str(lied(again, fresh, run="next"))
    again.save()
    assert "replaced" in read_standings(spends.path)[ME].out


def test_a_restored_backup_is_found_out_however_long_it_grows(
    tmp_path: Path, spends: Spends, ledger: Ledger
) -> None:
    """A copy of before the last round, which is longer one round later, does not extend what was seen."""
    backup = copy(ledger, tmp_path / "backup")
    spend(ledger, 2)
    assert told(spends, ledger, 2) is None
    for number in (2, 3, 4):
        spend(backup, number + 10)  # other lines, in the same run: its charges alone would fit
    with pytest.raises(RolledBack):
        backup.extension(spends.standing(ME).seen)
    assert "does not extend" in str(lied(spends, backup, 14))


def test_who_failed_once_stays_out(tmp_path: Path, spends: Spends, ledger: Ledger) -> None:
    """The right ledger does not bring a node back: its operator's reason does, and it is kept."""
    backup = copy(ledger, tmp_path / "backup")
    spend(ledger, 2)
    assert told(spends, ledger, 2) is None
    assert lied(spends, backup) is not None
    spends.save()
    assert "charges" in str(told(spends, ledger, 2))
    known = readmit(spends.path, ME, "restored from the backup of May 2")
    spends.refresh()
    assert known.charges == 2
    assert told(spends, backup, 1) is None
    spends.save()
    (again,) = read_standings(spends.path)[ME].readmissions
    assert (again.reason, again.charges) == ("restored from the backup of May 2", 2)
    assert "charges" in again.was_out_for
    assert again.epsilon == known.epsilon > 0


def test_readmission_needs_a_reason_and_a_fault(spends: Spends, ledger: Ledger) -> None:
    """Nobody is readmitted who is not out, nor without a word."""
    assert told(spends, ledger) is None
    spends.save()
    with pytest.raises(RunError, match="not excluded"):
        readmit(spends.path, ME, "why")
    spends.put_out(ME, "it says so")
    spends.save()
    with pytest.raises(RunError, match="needs a reason"):
        readmit(spends.path, ME, "  ")


def test_two_runs_beside_each_other(spends: Spends, ledger: Ledger) -> None:
    """Each may see the ledger at another point; the next statement must extend all of them."""
    other = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.save()
    other.refresh()
    asked = other.standing(ME).seen
    spend(ledger, 2)
    mine = ledger.statement("run", 2, "release")
    assert spends.believe(mine, asked, ledger.extension(asked)) is None
    spend(ledger, 1, run="second")
    theirs = ledger.statement("second", 1, "release")
    assert other.believe(theirs, asked, ledger.extension(asked)) is None
    spends.save()
    other.save()
    spends.refresh()
    assert len(spends.standing(ME).seen) == 2
    spend(ledger, 3)
    assert told(spends, ledger, 3) is None
    spends.save()
    assert len(read_standings(spends.path)[ME].seen) == 1


def test_the_later_statement_is_kept_whoever_saves_last(spends: Spends, ledger: Ledger) -> None:
    """A run that saves an earlier statement after another run's later one lowers no epsilon."""
    other = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.save()
    other.refresh()
    asked = other.standing(ME).seen
    spend(ledger, 2)
    earlier = ledger.statement("run", 2, "release")
    assert spends.believe(earlier, asked, ledger.extension(asked)) is None
    spend(ledger, 1, run="second")
    later = ledger.statement("second", 1, "release")
    assert other.believe(later, asked, ledger.extension(asked)) is None
    other.save()
    spends.save()
    kept = read_standings(spends.path)[ME]
    assert later.epsilon > earlier.epsilon
    assert (kept.charges, kept.epsilon, kept.delta) == (3, later.epsilon, later.delta)


def test_a_ledger_shown_in_two_forms_is_found_out(
    tmp_path: Path, spends: Spends, ledger: Ledger
) -> None:
    """A node that charges one run in one copy and another run in another is out at the next question."""
    other = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.save()
    other.refresh()
    twin = copy(ledger, tmp_path / "twin")
    asked = other.standing(ME).seen
    spend(ledger, 2)
    spend(twin, 1, run="second")
    assert spends.believe(ledger.statement("run", 2, "r"), asked, ledger.extension(asked)) is None
    assert other.believe(twin.statement("second", 1, "r"), asked, twin.extension(asked)) is None
    spends.save()
    other.save()
    spends.refresh()
    spend(ledger, 3)
    with pytest.raises(RolledBack):
        told(spends, ledger, 3)
    assert lied(spends, ledger, 3) is not None


def test_the_operators_word_is_not_overwritten(spends: Spends, ledger: Ledger) -> None:
    """A run that goes on while a node is put out, or readmitted, does not undo it."""
    assert told(spends, ledger) is None
    spends.save()
    running = Spends(spends.path)
    running.refresh()
    spends.put_out(ME, "found out elsewhere")
    spends.save()
    spend(ledger, 2)
    seen = running.standing(ME).seen
    assert running.believe(ledger.statement("run", 2, "r"), seen, ledger.extension(seen)) is None
    running.save()
    assert read_standings(spends.path)[ME].out == "found out elsewhere"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"ledgers": {"a": {}}}', "\x00"])
def test_a_damaged_register_believes_nobody(spends: Spends, content: str) -> None:
    """It is an error with a remedy, not an empty register."""
    spends.path.write_text(content)
    with pytest.raises(RunError, match="backup"):
        spends.refresh()


def test_statements_that_contradict_themselves(spends: Spends, ledger: Ledger) -> None:
    """Fewer charges than before, too few proofs, proofs of no sense."""
    spend(ledger, 2)
    assert told(spends, ledger, 2) is None
    seen = spends.standing(ME).seen
    spend(ledger, 3)
    statement, proofs = ledger.statement("run", 3, "r"), ledger.extension(seen)
    for said, given in (
        (replace(statement, charges=1), proofs),
        (statement, []),
        (statement, [*proofs, []]),
        (statement, [["zz"]]),
        (statement, [["00"] * 100]),
        (replace(statement, root_sha256="00" * 32), proofs),
        (replace(statement, index=0), proofs),
    ):
        fresh = Spends(spends.path, {ME: spends.standing(ME)})
        assert fresh.believe(said, seen, given) is not None
        assert fresh.standing(ME).out
    assert spends.believe(statement, seen, proofs) is None


def test_reasons_are_bounded(spends: Spends) -> None:
    """A reason that came from a node fills neither the file nor a terminal."""
    spends.put_out(ME, "x\x1b[31m" * 1000)
    spends.save()
    out = read_standings(spends.path)[ME].out
    assert len(out) <= 300
    assert out.isprintable()
    assert json.loads(spends.path.read_text())["ledgers"][ME]["since"]
    assert Standing().out == ""


def test_a_ledger_that_stands_still_while_it_is_charged(spends: Spends, ledger: Ledger) -> None:
    """The same lines with more charges, or for another run, or with less epsilon: found out, not believed."""
    assert told(spends, ledger) is None
    seen = spends.standing(ME).seen
    first = ledger.statement("run", 1, "release")
    (event, _), *_ = first.charged
    for said in (
        replace(first, round=2, charged=((event, 2),), charges=2),
        replace(first, run="other", round=1),
        replace(first, epsilon=first.epsilon / 2),
    ):
        fresh = Spends(spends.path, {ME: spends.standing(ME)})
        assert fresh.believe(said, seen, [[]]) is not None, said
    assert spends.standing(ME).runs == {"run": 1}


def test_an_old_run_that_comes_back_is_believed(
    monkeypatch: pytest.MonkeyPatch, spends: Spends, ledger: Ledger
) -> None:
    """The register keeps the latest runs; those that it has forgotten and that resume count once."""
    monkeypatch.setattr("fedslm.federation.spends._MOST_RUNS", 3)
    for number in range(5):
        spend(ledger, 1, run=f"run-{number}")
        assert told(spends, ledger, 1, run=f"run-{number}") is None
    assert list(spends.standing(ME).runs) == ["run-2", "run-3", "run-4"]
    for name in ("run-0", "run-1"):
        spend(ledger, 2, run=name)
        assert told(spends, ledger, 2, run=name) is None


def test_two_ledgers_are_found_out_without_another_question(
    tmp_path: Path, spends: Spends, ledger: Ledger
) -> None:
    """The last replies to two runs, each from a copy of its own: together they charged more than either has."""
    other = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.save()
    other.refresh()
    twin, asked = copy(ledger, tmp_path / "twin"), other.standing(ME).seen
    spend(ledger, 2)
    spend(twin, 1, run="second")
    assert spends.believe(ledger.statement("run", 2, "r"), asked, ledger.extension(asked)) is None
    assert other.believe(twin.statement("second", 1, "r"), asked, twin.extension(asked)) is None
    spends.save()
    other.save()
    assert "showed two ledgers" in read_standings(spends.path)[ME].out


def test_epsilon_is_not_forgotten_at_another_delta(spends: Spends, ledger: Ledger) -> None:
    """Less epsilon at a smaller delta is a contradiction, and so is a detour over a larger one."""
    assert told(spends, ledger) is None
    first = spends.standing(ME)
    said = ledger.statement("run", 1, "release")
    for delta, share in ((1e-6, 0.5), (1e-5, 0.5)):
        fresh = Spends(spends.path, {ME: first})
        assert (
            fresh.believe(replace(said, delta=1e-4, epsilon=said.epsilon / 4), first.seen, [[]]) is None
        )
        wrong = replace(said, delta=delta, epsilon=said.epsilon * share)
        assert "its epsilon was" in str(fresh.believe(wrong, fresh.standing(ME).seen, [[]]))
    assert (
        spends.believe(replace(said, delta=1e-6, epsilon=said.epsilon * 1.2), first.seen, [[]]) is None
    )
    spends.save()
    kept = read_standings(spends.path)[ME].stated
    assert kept == ((1e-5, said.epsilon), (1e-6, said.epsilon * 1.2))


def test_a_node_cannot_fill_the_register_with_deltas(spends: Spends, ledger: Ledger) -> None:
    """Each true run has one delta: whoever states many is out, and the register stays small."""
    assert told(spends, ledger) is None
    said, problem = ledger.statement("run", 1, "release"), None
    for number in range(1, 40):
        seen = spends.standing(ME).seen
        more = replace(said, delta=said.delta / (1 + number), epsilon=said.epsilon * (1 + number))
        problem = problem or spends.believe(more, seen, [[]])
    assert "more than 16 deltas" in str(problem)
    assert len(spends.standing(ME).stated) == 16


def test_a_register_of_an_earlier_version_is_read(spends: Spends, ledger: Ledger) -> None:
    """It counts forgotten runs, and knows one delta."""
    assert told(spends, ledger) is None
    spends.save()
    values = json.loads(spends.path.read_text())
    entry = values["ledgers"][ME]
    del entry["stated"]
    spends.path.write_text(json.dumps({"ledgers": {ME: {**entry, "older": 7}}}))
    spends.refresh()
    assert told(spends, ledger) is None
    less = ledger.statement("run", 1, "release")
    less = replace(less, epsilon=less.epsilon / 2)
    assert spends.believe(less, spends.standing(ME).seen, [[]]) is not None


def test_what_a_run_learned_is_not_lost_to_a_readmission(spends: Spends, ledger: Ledger) -> None:
    """A node that is readmitted while a reply of another run is under way cannot have that reply forgotten."""
    running = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.put_out(ME, "another run says so")
    running.refresh()
    spends.save()
    spend(ledger, 2)
    assert running.believe(ledger.statement("run", 2, "r"), (), []) is None
    readmit(spends.path, ME, "looked into")
    running.save()
    kept = read_standings(spends.path)[ME]
    assert (kept.charges, len(kept.readmissions), kept.out) == (2, 1, "")
    assert kept.seen


def unprotect(ledger: Ledger, number: int = 1) -> None:
    """Records a release without privacy."""
    ledger.release_unprotected(Unprotected("open", number, ADAPTER, f"release-{number}"), AMPLE)


def no_constant(name: str) -> float:
    """JSON has no such number."""
    raise AssertionError(name)


def test_an_infinite_epsilon_is_kept(spends: Spends, ledger: Ledger) -> None:
    """The register carries it over restarts and readmissions, in JSON that every reader takes."""
    assert told(spends, ledger) is None
    unprotect(ledger)
    assert told(spends, ledger) is None
    spends.save()
    assert read_standings(spends.path)[ME].epsilon == math.inf
    values = json.loads(spends.path.read_text(), parse_constant=no_constant)
    assert values["ledgers"][ME]["epsilon"] == "infinite"
    spends.put_out(ME, "it says so")
    spends.save()
    readmit(spends.path, ME, "looked into")
    (again,) = read_standings(spends.path)[ME].readmissions
    assert again.epsilon == math.inf
    json.loads(spends.path.read_text(), parse_constant=no_constant)


@pytest.mark.parametrize("delta", [1e-5, 1e-6])
def test_an_infinite_epsilon_is_never_taken_back(spends: Spends, ledger: Ledger, delta: float) -> None:
    """A node that states a finite one afterwards is out, at whatever delta."""
    unprotect(ledger)
    assert told(spends, ledger) is None
    spend(ledger, 2)
    seen = spends.standing(ME).seen
    said = replace(ledger.statement("run", 2, "r"), epsilon=1.0, unprotected=0, delta=delta)
    assert "its epsilon was inf" in str(spends.believe(said, seen, ledger.extension(seen)))


def test_two_runs_do_not_lose_an_infinite_epsilon(spends: Spends, ledger: Ledger) -> None:
    """Whoever saves last, and however many charges the other run's statement has."""
    other = Spends(spends.path)
    assert told(spends, ledger) is None
    spends.save()
    other.refresh()
    asked = other.standing(ME).seen
    spend(ledger, 2)
    more = ledger.statement("run", 2, "release")
    spare = ledger.extension(asked)
    unprotect(ledger)
    bare = replace(ledger.statement("open", 1, "release"), charges=1)
    assert other.believe(bare, asked, ledger.extension(asked)) is None
    assert spends.believe(more, asked, spare) is None
    other.save()
    spends.save()
    kept = read_standings(spends.path)[ME]
    assert (kept.epsilon, kept.charges) == (math.inf, 2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epsilon", "Infinity"), ("epsilon", None), ("epsilon", True), ("epsilon", -1.0)),
        *(("delta", True), ("delta", 0.0), ("delta", "x"), ("charges", True), ("charges", -1)),
        *(("charges", 1.5), ("runs", {"run": True}), ("runs", {"run": "1"})),
        *(("seen", [[True, "00"]]), ("seen", [[1, 2]]), ("out", 5), ("ledger_id", None)),
        ("readmissions", [{"charges": True}]),
    ],
    ids=repr,
)
def test_a_register_with_another_type_believes_nobody(
    spends: Spends, ledger: Ledger, key: str, value: object
) -> None:
    """A boolean is no number of charges, and no word but one is an epsilon."""
    assert told(spends, ledger) is None
    spends.save()
    values = json.loads(spends.path.read_text())
    values["ledgers"][ME][key] = value
    spends.path.write_text(json.dumps(values))
    with pytest.raises(RunError, match="backup"):
        spends.refresh()
