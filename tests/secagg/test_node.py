"""Tests of what an honest node refuses, and of what it has on disk before an answer leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.secagg import (
    PLAN,
    RUN,
    Federation,
    Vector,
    authority_key,
    ledger_key,
    members_of,
    roster_of,
)

from fedslm import layout, storage
from fedslm.errors import FederationError, FedslmError, PolicyRefused, RunError
from fedslm.secagg.cohort import Cohort, Requirements
from fedslm.secagg.kept import Kept
from fedslm.secagg.keys import RoundSecrets, survivor_values
from fedslm.secagg.messages import (
    InputRequest,
    KeysRequest,
    SharesRequest,
    SurvivorsRequest,
    Unmask,
    UnmaskRequest,
    decode,
    encode,
    survivors_context,
)
from fedslm.secagg.node import Node
from fedslm.secagg.roster import signed_roster, verified


def never(cohort: Cohort) -> Vector:
    """A vector that must not be asked for."""
    raise AssertionError("the node trained and charged")


def zeros(federation: Federation) -> Callable[[Cohort], Vector]:
    """Makes a vector of zeros."""
    return lambda cohort: np.zeros(federation.num_values, np.uint32)


def asks_keys(federation: Federation, **changes: Any) -> bytes:
    """A request for keys with another cohort."""
    return encode(KeysRequest(replace(federation.cohort, **changes)))


# The first leg.


def test_a_cohort_of_unknown_peers_is_refused(tmp_path: Path) -> None:
    """Sybil: clients that are not on the node's own roster, or a roster of another authority."""
    federation = Federation(tmp_path, 4)
    node = federation.nodes[0]
    with pytest.raises(FederationError, match="client=9 is not on the roster"):
        node.keys(asks_keys(federation, clients=(0, 1, 2, 9)))
    sybils = roster_of([0, 9, 10, 11])
    with pytest.raises(PolicyRefused, match="another run or roster"):
        node.keys(asks_keys(federation, clients=(0, 9, 10, 11), roster_sha256=sybils.sha256))
    text = signed_roster(authority_key(2), "federation", 1, members_of(range(4)))
    with pytest.raises(FedslmError):
        verified(text, authority_key().public_key())
    assert node.kept.read() is None


def test_a_cohort_without_the_node_or_of_another_run_is_refused(tmp_path: Path) -> None:
    """A node signs keys only for the run and the cohort that it is in."""
    federation = Federation(tmp_path, 4)
    node = federation.nodes[0]
    with pytest.raises(PolicyRefused, match="not in the cohort"):
        node.keys(asks_keys(federation, clients=(1, 2, 3), threshold=2))
    with pytest.raises(PolicyRefused, match="another run"):
        node.keys(asks_keys(federation, run="run-2"))
    stranger = replace(node, key=ledger_key(7))
    with pytest.raises(FederationError, match="not on the roster"):
        stranger.keys(asks_keys(federation))


def test_a_policy_is_kept(tmp_path: Path) -> None:
    """Fewer honest survivors, or fewer colluding nodes, than the node requires."""
    federation = Federation(tmp_path, 4)
    for requirements in (Requirements(1, 2, PLAN), Requirements(0, 4, PLAN)):
        with pytest.raises(PolicyRefused, match="policy"):
            replace(federation.nodes[0], requirements=requirements).keys(asks_keys(federation))


def test_an_attempt_has_one_cohort_and_time_runs_forward(tmp_path: Path) -> None:
    """Another cohort for the same attempt, an earlier attempt, an earlier round: refused."""
    federation = Federation(tmp_path, 4)
    node = federation.nodes[0]
    first = node.keys(asks_keys(federation, round=2))
    assert node.keys(asks_keys(federation, round=2)) == first
    for changes in (
        {"round": 2, "num_values": 6},
        {"round": 2, "threshold": 4},
        {"round": 1, "attempt": 9},
    ):
        with pytest.raises(PolicyRefused, match="must come after"):
            node.keys(asks_keys(federation, **changes))
    assert node.keys(asks_keys(federation, round=2, attempt=2)) != first
    with pytest.raises(PolicyRefused, match="must come after"):
        node.keys(asks_keys(federation, round=2))


# The second leg.


def test_changed_or_missing_keys_are_refused(tmp_path: Path) -> None:
    """Wrong signature, swapped peers, a key used twice, the node's own keys, too few, an old leg."""
    federation = Federation(tmp_path, 4)
    federation.until("shares")
    node, keys = federation.nodes[0], decode(SharesRequest, federation.server.shares_request()).keys
    context = federation.cohort.sha256

    def refused(*changed: Any, context: str = context) -> None:
        with pytest.raises(FedslmError):
            node.shares(encode(SharesRequest(context, changed)))
        assert "shares" not in node.kept.read().legs  # type: ignore[union-attr]

    own, one, two, three = keys
    other = RoundSecrets.fresh()
    refused(own, replace(one, signature=two.signature), two, three)  # wrong signature
    refused(own, replace(two, client=1), replace(one, client=2), three)  # swapped peers
    refused(own, replace(one, mask_key=two.mask_key), two, three)
    refused(other.public(federation.cohort, 0, ledger_key(0)), one, two, three)  # not its own keys
    refused(one, two, three)
    refused(own, one)  # fewer than t
    stale = other.public(replace(federation.cohort, attempt=9), 1, ledger_key(1))
    refused(own, stale, two, three)  # a replay from another attempt
    forged = other.public(federation.cohort, 1, ledger_key(2))
    refused(own, forged, two, three)  # another peer's signature
    twin = replace(other, share_key=other.mask_key).public(federation.cohort, 1, ledger_key(1))
    refused(own, twin, two, three)  # a key used twice
    refused(*keys, context="ab" * 32)
    node.shares(encode(SharesRequest(context, keys)))


def test_a_mirrored_key_is_refused(tmp_path: Path) -> None:
    """A colluding peer signs the node's own public keys as its own."""
    federation = Federation(tmp_path, 4)
    federation.until("shares")
    node, keys = federation.nodes[0], decode(SharesRequest, federation.server.shares_request()).keys
    secrets = node.kept.read().secrets  # type: ignore[union-attr]
    assert secrets is not None
    mirrored = secrets.public(federation.cohort, 1, ledger_key(1))  # only public values are mirrored
    with pytest.raises(PolicyRefused, match="equal"):
        node.shares(encode(SharesRequest(federation.cohort.sha256, (keys[0], mirrored, *keys[2:]))))


# The third leg.


def test_changed_shares_are_refused_or_left_out(tmp_path: Path) -> None:
    """Too few senders, unknown ones, the node itself, another context; a swapped box is not kept."""
    federation = Federation(tmp_path, 5)
    federation.until("input")
    request = decode(InputRequest, federation.server.input_requests()[0])
    node, boxes = federation.nodes[0], dict(request.boxes)
    wrong = [
        replace(request, context="ab" * 32),
        replace(request, boxes={1: boxes[1], 2: boxes[2]}),  # 3 with the node itself: fewer than t = 4
        replace(request, boxes={**boxes, 7: boxes[1]}),
        replace(request, boxes={0: boxes[1], **boxes}),
    ]
    for each in wrong:
        with pytest.raises(PolicyRefused):
            node.masked_input(encode(each), never)
    swapped = replace(request, boxes={**boxes, 1: boxes[2], 2: boxes[1]})
    assert node._boxes(node._attempt(), encode(swapped))[1] is None
    assert node._boxes(node._attempt(), encode(swapped))[2] is None


def test_a_second_input_is_never_computed(tmp_path: Path) -> None:
    """The same request gets the same bytes without a second vector; another is refused."""
    federation = Federation(tmp_path, 5)
    federation.until("input")
    request = federation.server.input_requests()[0]
    node = federation.nodes[0]
    asked_with: list[Cohort] = []

    def make(cohort: Cohort) -> Vector:
        asked_with.append(cohort)
        return np.zeros(federation.num_values, np.uint32)

    first = node.masked_input(request, make)
    assert asked_with == [federation.cohort]
    again = node.masked_input(request, never)
    assert (first.head, first.vector.tobytes()) == (again.head, again.vector.tobytes())
    boxes = dict(decode(InputRequest, request).boxes)
    del boxes[4]
    other = encode(replace(decode(InputRequest, request), boxes=boxes))
    with pytest.raises(PolicyRefused, match="another 'input' request"):
        node.masked_input(other, never)


def test_a_vector_that_failed_is_not_asked_for_again(tmp_path: Path) -> None:
    """Training failed after the charge, or gave another form: the attempt is over for this node."""
    federation = Federation(tmp_path, 4)
    federation.until("input")
    requests = federation.server.input_requests()

    def failing(cohort: Cohort) -> Vector:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        federation.nodes[0].masked_input(requests[0], failing)
    for wrong in (np.zeros(4, np.uint32), np.zeros(5, np.int64), np.zeros((5, 1), np.uint32)):
        client = len(wrong) % 3 + (wrong.ndim == 2)
        with pytest.raises(FedslmError):
            federation.nodes[client].masked_input(requests[client], lambda _, wrong=wrong: wrong)
    for client in range(3):
        with pytest.raises(PolicyRefused, match="did not finish"):
            federation.nodes[client].masked_input(requests[client], never)
    for leg in (federation.nodes[0].survivors, federation.nodes[0].unmask):
        with pytest.raises(FedslmError):
            leg(encode(SurvivorsRequest("ab" * 32, (0, 1, 2))))


# The fourth and the last leg.


def test_one_survivor_set_is_signed(tmp_path: Path) -> None:
    """Two different sets; a set without the node, with a stranger, or too small; another context."""
    federation = Federation(tmp_path, 6)
    assert federation.cohort.threshold == 4
    federation.until("survivors")
    request = decode(SurvivorsRequest, federation.server.survivors_request())
    node = federation.nodes[0]
    for survivors in ((1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 9), (0, 1, 2)):
        with pytest.raises(PolicyRefused):
            node.survivors(encode(replace(request, survivors=survivors)))
    with pytest.raises(PolicyRefused):
        node.survivors(encode(replace(request, context="ab" * 32)))
    first = node.survivors(encode(request))
    assert node.survivors(encode(request)) == first
    with pytest.raises(PolicyRefused, match="another 'survivors' request"):
        node.survivors(encode(replace(request, survivors=(0, 1, 2, 3, 4))))


def test_too_few_or_wrong_signatures_open_nothing(tmp_path: Path) -> None:
    """Fewer than t, another's, of another set, of another attempt, of a node that is not in the set."""
    federation = Federation(tmp_path, 6)
    federation.until("unmask")
    request = decode(UnmaskRequest, federation.server.unmask_request())
    node, signatures = federation.nodes[0], dict(request.signatures)
    named = decode(SurvivorsRequest, federation.requests["survivors"])
    smaller = (0, 1, 2, 3, 4)

    def signed(client: int, cohort: Cohort, context: str, survivors: tuple[int, ...]) -> str:
        from fedslm.privacy.keys import signature_of

        return signature_of(ledger_key(client), survivor_values(cohort, context, survivors))

    old = replace(federation.cohort, attempt=7)
    wrong = [
        {client: signatures[client] for client in (0, 1, 2)},
        {**signatures, 1: signatures[2]},
        {**signatures, 1: signed(1, federation.cohort, named.context, smaller)},
        {**signatures, 1: signed(1, old, named.context, named.survivors)},
        {**signatures, 1: signed(1, federation.cohort, "ab" * 32, named.survivors)},
        {**signatures, 9: signed(9, federation.cohort, named.context, named.survivors)},
    ]
    for each in wrong:
        with pytest.raises(FedslmError):
            node.unmask(encode(replace(request, signatures=each)))
    for survivors in (smaller, named.survivors):  # of the other set, and of the right one under it
        context = survivors_context(named.context, smaller)
        other = {who: signed(who, federation.cohort, named.context, survivors) for who in range(5)}
        with pytest.raises(PolicyRefused, match="other survivors"):
            node.unmask(encode(UnmaskRequest(context, other)))
    assert "unmask" not in node.kept.read().legs  # type: ignore[union-attr]
    node.unmask(encode(request))


def test_one_share_of_each_peer_leaves(tmp_path: Path) -> None:
    """Seeds of survivors, mask keys of the others, never both; then the secrets are gone from the disk."""
    federation = Federation(tmp_path, 6)
    federation.until("input")
    federation.input(federation.vectors(), [0, 1, 2, 3])
    federation.survivors()
    request = federation.server.unmask_request()
    node = federation.nodes[0]
    before = node.kept.read()
    assert before is not None
    assert before.secrets is not None
    reply = node.unmask(request)
    found = decode(Unmask, reply)
    assert (set(found.seeds), set(found.mask_keys)) == ({0, 1, 2, 3}, {4, 5})
    text = (node.kept.path / "state.json").read_text()
    for secret in (before.secrets.share_key, before.secrets.mask_key, before.secrets.seed):
        assert secret.hex() not in text
    assert before.own_shares not in text
    assert node.unmask(request) == reply
    fewer = decode(UnmaskRequest, request)
    with pytest.raises(PolicyRefused, match="another 'unmask' request"):
        node.unmask(encode(replace(fewer, signatures={**fewer.signatures, 3: "ab" * 64})))


def test_legs_come_in_their_order(tmp_path: Path) -> None:
    """A leg that is skipped, or asked of a node without an attempt."""
    federation = Federation(tmp_path, 4)
    node = federation.nodes[0]
    legs = [node.shares, lambda request: node.masked_input(request, never), node.survivors, node.unmask]
    for leg in legs:
        with pytest.raises(PolicyRefused, match="sent no keys"):
            leg(b"{}")
    federation.until("shares")
    for leg in legs[1:]:
        with pytest.raises(PolicyRefused, match="comes after"):
            leg(b"{}")


# Restarts, crashes and files.


def asked(node: Node, leg: str, request: bytes, vector_fn: Callable[[Cohort], Vector] = never) -> bytes:
    """Asks a node for a leg by name."""
    if leg == "input":
        sent = node.masked_input(request, vector_fn)
        return sent.head + sent.vector.tobytes()
    answer: bytes = getattr(node, leg)(request)
    return answer


def test_a_restarted_node_repeats_and_does_no_more(tmp_path: Path) -> None:
    """After each leg another process gives the same bytes for it, and refuses the next leg."""
    federation = Federation(tmp_path, 4)
    legs = ["keys", "shares", "input", "survivors", "unmask"]
    steps: list[Callable[[], None]] = [
        federation.keys,
        federation.shares,
        lambda: federation.input(federation.vectors()),
        federation.survivors,
        federation.unmask,
    ]
    for i, step in enumerate(steps):
        step()
        restarted = federation.node(0, "process 2")
        for leg in legs[: i + 1]:
            request = federation.requests[leg]
            request = request[0] if leg == "input" else request
            assert asked(restarted, leg, request) == asked(federation.nodes[0], leg, request)
        if i < 4:
            with pytest.raises(PolicyRefused, match="restarted"):
                asked(restarted, legs[i + 1], b"{}", never)


def test_an_older_copy_gives_no_second_noise(tmp_path: Path) -> None:
    """The node's directory is put back to each earlier leg: a restarted node computes no vector."""
    federation = Federation(tmp_path, 4)
    path = federation.nodes[0].kept.path
    federation.keys()
    shutil.copytree(path, tmp_path / "after-keys")
    federation.shares()
    shutil.copytree(path, tmp_path / "after-shares")
    federation.input(federation.vectors())
    shutil.copytree(path, tmp_path / "after-input")
    federation.survivors()
    for copy in ("after-keys", "after-shares"):
        shutil.rmtree(path)
        shutil.copytree(tmp_path / copy, path)
        restarted = federation.node(0, "process 2")
        with pytest.raises(PolicyRefused):
            restarted.masked_input(federation.requests["input"][0], never)
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "after-input", path)
    restarted = federation.node(0, "process 2")
    again = restarted.masked_input(federation.requests["input"][0], never)
    assert again.vector.tobytes() == federation.inputs[0].vector.tobytes()
    with pytest.raises(PolicyRefused, match="restarted"):  # so no second survivor set is signed
        restarted.survivors(encode(SurvivorsRequest("ab" * 32, (0, 1, 2))))


def test_a_restarted_node_joins_the_next_attempt(tmp_path: Path) -> None:
    """A later attempt begins with fresh secrets, whatever became of the one before."""
    federation = Federation(tmp_path, 4)
    federation.until("input")
    federation.nodes[0] = federation.node(0, "process 2")
    federation.begin(2)
    federation.until("sum")
    assert federation.finish().survivors == (0, 1, 2, 3)


@pytest.mark.parametrize("leg", ["keys", "shares", "input", "survivors", "unmask"])
def test_nothing_leaves_that_is_not_on_disk(
    leg: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at each leg: no answer. What the node then has allows no second answer."""
    federation = Federation(tmp_path, 4)
    federation.until(leg)
    server, node = federation.server, federation.nodes[0]
    requests = {
        "keys": server.keys_request,
        "shares": server.shares_request,
        "input": lambda: server.input_requests()[0],
        "survivors": server.survivors_request,
        "unmask": server.unmask_request,
    }
    request = requests[leg]()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(storage, "_sync", full)
        with pytest.raises(RunError, match="No space left"):
            asked(node, leg, request, zeros(federation))
    found = node.kept.read()
    assert found is None or leg not in found.legs


def test_each_answer_is_synced_before_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first write and the answer, the state and its directory are synced at every leg."""
    federation = Federation(tmp_path, 2)
    path = federation.nodes[0].kept.path
    synced: list[str] = []
    monkeypatch.setattr(storage, "_sync", lambda each: synced.append(each.name.split(".")[0]))
    steps: list[Callable[[], None]] = [
        lambda: federation.keys([0, 1]),
        federation.shares,
        lambda: federation.input(federation.vectors()),
        federation.survivors,
        federation.unmask,
    ]
    for i, step in enumerate(steps):
        synced.clear()
        step()
        one = ["state", path.name]
        assert synced == 2 * ([*one, "input", path.name, *one] if i == 2 else one)


def test_a_crash_during_the_input_ends_the_attempt(tmp_path: Path) -> None:
    """The vector was kept but not the answer: the node never computes another one."""
    federation = Federation(tmp_path, 4)
    federation.until("input")
    request = federation.server.input_requests()[0]

    class Killed(BaseException):
        """As kill -9 between two writes."""

    class Dying(Kept):
        """Dies when it would keep the answer."""

        def write_input(self, vector: Vector) -> None:
            super().write_input(vector)
            raise Killed

    alive = federation.nodes[0].kept
    dying = replace(federation.nodes[0], kept=Dying(alive.directory, alive.run, alive.session))
    with pytest.raises(Killed):
        dying.masked_input(request, zeros(federation))
    for session in ("process 1", "process 2"):
        with pytest.raises(PolicyRefused, match="did not finish"):
            federation.node(0, session).masked_input(request, never)


def test_a_new_attempt_during_the_input_wins(tmp_path: Path) -> None:
    """The server begins another attempt while a node trains: the vector of the old one is not kept."""
    federation = Federation(tmp_path, 4)
    federation.until("input")
    node = federation.nodes[0]

    def meanwhile(cohort: Cohort) -> Vector:
        node.keys(asks_keys(federation, attempt=2))
        return np.zeros(5, np.uint32)

    with pytest.raises(PolicyRefused, match="later attempt"):
        node.masked_input(federation.server.input_requests()[0], meanwhile)
    assert not (node.kept.path / "input.u32").exists()


def test_damaged_files_are_not_guessed_at(tmp_path: Path) -> None:
    """A state that cannot be read: no leg is answered; a vector of another length is not sent."""
    federation = Federation(tmp_path, 4)
    federation.until("survivors")
    node = federation.nodes[0]
    vector = node.kept.path / "input.u32"
    vector.write_bytes(vector.read_bytes()[:-4])
    with pytest.raises(RunError, match="damaged"):
        node.masked_input(federation.requests["input"][0], never)
    vector.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        node.masked_input(federation.requests["input"][0], never)
    for content in ("", "{}", "[]", '{"version": 2}', "\udcff"):
        (node.kept.path / "state.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(RunError, match="remove"):
            node.keys(asks_keys(federation, attempt=2))


def test_files_are_private_and_in_their_place(tmp_path: Path) -> None:
    """Only the owner reads them; a run's name is never a path."""
    federation = Federation(tmp_path, 2)
    federation.until("survivors")
    path = federation.nodes[0].kept.path
    assert path.parent == tmp_path / "0" / layout.SECAGG
    for name in ("state.json", "input.u32"):
        assert (path / name).stat().st_mode & 0o077 == 0
    assert path.stat().st_mode & 0o077 == 0
    for run in ("../../etc", "/etc/passwd", RUN + "\x00", "\ud800"):
        assert Kept(tmp_path, run, "").path.parent == tmp_path / layout.SECAGG
