"""Which instructions a node believes, and its signature under what it answers.

Formal guarantees:
    * An instruction is believed only if the operator's key that came with the admission has signed it
      for this node, this run, this type and exactly this content
      (:func:`fedslm.protocol.envelopes.opened`). Nothing is loaded, trained or charged for any other.
    * None is believed twice: its nonce is on disk before anything is done, until it expires. A node
      that is started again, or whose clock was set back by less than that, refuses it still.
    * Every reply with content carries this node's signature for exactly the request that it answers.

A list of nonces that cannot be read or written refuses everything: then nothing is known of
repetitions.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Message

from fedslm.deployment.admission import Admission
from fedslm.errors import FederationError, LedgerError, RunError
from fedslm.privacy.keys import public_hex, read_public_key, signing_key
from fedslm.protocol.envelopes import LONGEST_SECONDS, Envelope, opened, sealed
from fedslm.storage import write_text

NONCES = "nonces.json"
_MOST_NONCES = 20_000


@dataclass(frozen=True)
class Believed:
    """An instruction that was signed for this node.

    Attributes:
        envelope: What the operator signed.
        request_sha256: The request's hash, which the reply is signed for.
    """

    envelope: Envelope
    request_sha256: str


class Instructions:
    """Checks what comes, and signs what goes.

    Args:
        directory: The node's own: holds its ledger key and the nonces.
        admission: Names the operator's key.

    Raises:
        RunError: A key cannot be read.
    """

    def __init__(self, directory: Path, admission: Admission) -> None:
        try:
            self._key = signing_key(directory)
            self._operator = read_public_key(admission.operator_key)
        except LedgerError as error:
            raise RunError(str(error)) from error
        self._own, self._path = public_hex(self._key.public_key()), directory / NONCES

    def believed(self, message: Message, run_id: int) -> Believed:
        """Checks an instruction, and takes note of it.

        Args:
            message: As it came.
            run_id: Flower's number of the run.

        Raises:
            FederationError: It is not to be believed; the text says why.
        """
        if not message.has_content():
            raise FederationError("the instruction has no content")
        envelope, request = opened(
            message.content,
            self._operator,
            node=self._own,
            grid_run=run_id,
            kind=message.metadata.message_type,
        )
        self._note(envelope)
        return Believed(envelope, request)

    def signed(self, reply: Message, message: Message, believed: Believed) -> Message:
        """The reply with this node's signature; an error has no content, and stays as it is."""
        if not reply.has_content():
            return reply
        content = sealed(reply.content, believed.request_sha256, self._key)
        return Message(content, reply_to=message)

    def _note(self, envelope: Envelope) -> None:
        """Keeps a nonce until it expires; refuses one that is kept already."""
        now = time.time()
        kept = {
            nonce: until for nonce, until in self._nonces().items() if until > now - LONGEST_SECONDS
        }
        if envelope.nonce in kept:
            raise FederationError("the instruction was given before")
        if len(kept) >= _MOST_NONCES:
            raise FederationError(f"{_MOST_NONCES} instructions in four days are the most here")
        kept[envelope.nonce] = envelope.expires
        try:
            write_text(self._path, json.dumps(kept))
        except RunError as error:
            raise FederationError("this node cannot take note of instructions; see its log") from error

    def _nonces(self) -> dict[str, float]:
        """Nonces that were given before, and when each expires."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
            return {str(nonce): float(until) for nonce, until in values.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FederationError(
                f"{NONCES} of this node cannot be read; stop the node for "
                f"{LONGEST_SECONDS / 86_400:g} days, then remove the file"
            ) from error
