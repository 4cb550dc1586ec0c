"""What a node keeps of the latest attempt of one run: written and synced before anything leaves.

The directory holds one attempt: a later one replaces it, and an earlier one is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedslm import layout
from fedslm.errors import RunError
from fedslm.secagg.cohort import Cohort
from fedslm.secagg.keys import RoundSecrets
from fedslm.secagg.messages import KeysRequest, decode
from fedslm.storage import locked, read_text, replacing

_STATE, _INPUT, _LOCK = "state.json", "input.u32", "lock"
_LOCK_SECONDS, _MOST_BYTES, _VERSION = 60.0, 8 << 20, 1
KEYS, SHARES, INPUT, SURVIVORS, UNMASK = "keys", "shares", "input", "survivors", "unmask"
LEGS = (KEYS, SHARES, INPUT, SURVIVORS, UNMASK)


@dataclass(frozen=True, repr=False)
class Leg:
    """One leg that was asked for.

    Attributes:
        request: The request, as text.
        reply: The reply, as text; empty while a masked input is computed.
    """

    request: str
    reply: str


@dataclass(frozen=True, repr=False)
class Attempt:
    """A node's state in one attempt.

    Attributes:
        session: The process that began it: another one only repeats replies.
        secrets: The node's secrets; None once it has unmasked.
        own_shares: The node's share of its own secrets, hexadecimal.
        legs: Each leg so far, by name.
    """

    session: str
    secrets: RoundSecrets | None
    own_shares: str = ""
    legs: Mapping[str, Leg] = field(default_factory=dict)

    @property
    def cohort(self) -> Cohort:
        """The cohort that the server named."""
        return decode(KeysRequest, self.legs[KEYS].request.encode()).cohort

    def with_leg(self, name: str, request: bytes, reply: bytes) -> Attempt:
        """The state after one more leg."""
        leg = Leg(request.decode(), reply.decode())
        return replace(self, legs={**self.legs, name: leg})


@dataclass(frozen=True)
class Kept:
    """The files of one run at one node.

    Attributes:
        directory: The node's directory.
        run: Identifier of the run; any text.
        session: Random text of the node's process; a restarted one must have another.
    """

    directory: Path
    run: str
    session: str

    @property
    def path(self) -> Path:
        """The directory of the run's files."""
        name = hashlib.sha256(self.run.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        return self.directory / layout.SECAGG / name

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes of the node out.

        Raises:
            RunError: Another process has worked on an answer for a minute, or the directory cannot be
                written.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"{self.path} cannot be made: {error}") from error
        problem = (
            f"another process has answered for run {self.run!r} for {_LOCK_SECONDS:.0f} s; try later"
        )
        with locked(self.path / _LOCK, _LOCK_SECONDS, problem):
            yield

    def read(self) -> Attempt | None:
        """The latest attempt; None before the first.

        Raises:
            RunError: It cannot be read: what was sent is then not known.
        """
        path = self.path / _STATE
        if not path.exists():
            return None
        try:
            values = json.loads(read_text(path, _MOST_BYTES))
            if values.pop("version") != _VERSION:
                raise ValueError("it was written by another release")
            secrets = values.pop("secrets")
            legs = {name: Leg(**leg) for name, leg in values.pop("legs").items()}
            kept = None if secrets is None else RoundSecrets(*map(bytes.fromhex, secrets))
            return Attempt(**values, secrets=kept, legs=legs)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise RunError(
                f"{path} cannot be read ({str(error)[:100]}): what this node sent is not known. "
                f"End the run, then remove {self.path}"
            ) from error

    def write(self, attempt: Attempt) -> None:
        """Replaces the latest attempt.

        Raises:
            RunError: It cannot be written; nothing may be sent.
        """
        secrets = attempt.secrets
        values = {
            "version": _VERSION,
            "session": attempt.session,
            "secrets": None if secrets is None else [each.hex() for each in _each(secrets)],
            "own_shares": attempt.own_shares,
            "legs": {name: asdict(leg) for name, leg in attempt.legs.items()},
        }
        with replacing(self.path / _STATE) as temporary:
            temporary.touch(mode=0o600)
            temporary.write_text(json.dumps(values, allow_nan=False), encoding="utf-8")

    def write_input(self, vector: NDArray[np.uint32]) -> None:
        """Keeps a masked vector.

        Raises:
            RunError: It cannot be written; nothing may be sent.
        """
        with replacing(self.path / _INPUT) as temporary:
            temporary.touch(mode=0o600)
            vector.astype("<u4", copy=False).tofile(temporary)

    def read_input(self, num_values: int) -> NDArray[np.uint32]:
        """The kept masked vector.

        Raises:
            RunError: It cannot be read.
        """
        path = self.path / _INPUT
        try:
            vector = np.fromfile(path, "<u4").astype(np.uint32, copy=False)
        except OSError as error:
            raise RunError(f"{path} cannot be read: {error}") from error
        if len(vector) != num_values:
            raise RunError(f"{path} has {len(vector)} values, not {num_values}: it is damaged")
        return vector


def _each(secrets: RoundSecrets) -> tuple[bytes, bytes, bytes]:
    """The secrets in the order of their fields."""
    return secrets.share_key, secrets.mask_key, secrets.seed
