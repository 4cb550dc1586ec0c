"""A node's check of instructions, and its signature on replies.

Formal guarantees:
    * An instruction is accepted only if the operator's key that came with the admission has signed it
      for this node, this run, this type and exactly this content
      (:func:`fedslm.protocol.envelopes.opened`). Nothing is loaded, trained or charged for any other.
    * No instruction is accepted twice: its nonce is on disk before anything is done, until it expires.
      A node that is restarted, or whose clock was set back by less than that, still refuses it.
    * Every reply with content has this node's signature for exactly the request that it answers.

If the list of nonces cannot be read or written, everything is refused: repetitions could not be
detected.
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
        envelope: The envelope that the operator signed.
        request_sha256: The request's hash, for which the reply is signed.
    """

    envelope: Envelope
    request_sha256: str


class Instructions:
    """Checks incoming instructions, and signs outgoing replies.

    Args:
        directory: The node's own directory: contains its ledger key and the nonces.
        admission: Contains the operator's public key.

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
        """Checks an instruction, and stores its nonce.

        Args:
            message: The received message.
            run_id: Flower's number of the run.

        Raises:
            FederationError: It is not accepted; the text states the reason.
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
        """The reply with this node's signature; an error has no content, and is returned unchanged."""
        if not reply.has_content():
            return reply
        content = sealed(reply.content, believed.request_sha256, self._key)
        return Message(content, reply_to=message)

    def _note(self, envelope: Envelope) -> None:
        """Stores a nonce until it expires; refuses one that is already stored."""
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
        """The stored nonces, with the time at which each expires."""
        try:
            values = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
            return {str(nonce): float(until) for nonce, until in values.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise FederationError(
                f"{NONCES} of this node cannot be read; stop the node for "
                f"{LONGEST_SECONDS / 86_400:g} days, then remove the file"
            ) from error
