"""Fetches the replies of one exchange from a SuperLink: in a fixed order, within the deadline.

Flower's own ``pull_messages`` waits for the objects of a reply that is still being uploaded, up to the
180 s of an upload session after each piece: one node that dies during an upload delays all others.

Formal guarantees:
    * One request asks for all outstanding replies; for waiting replies only the outline is kept.
    * Nothing is waited for after the deadline. A reply that was announced by then, and is complete when
      its turn comes, is still taken, for at most a minute; any other is late.
    * A reply is bounded as described in :mod:`fedslm.protocol.inflating`; one that is not allowed
      counts as failed, with the reason.
    * A reply answers the request that it is counted for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Error, Message

from fedslm.errors import FederationError, Unanswered
from fedslm.federation.steady import Steady
from fedslm.protocol.inflating import Limits, inflated, objects_of
from fedslm.protocol.lifetime import GRACE_SECONDS, SWEEP_SECONDS

logger = logging.getLogger(__name__)
_POLL_SECONDS, _LONGEST_POLL_SECONDS = 0.05, 1.0
_NOT_USABLE = 2  # Flower's code for a client that raised


@dataclass
class Fetch:
    """Fetches the replies to pushed messages.

    Attributes:
        steady: Calls the SuperLink.
        sent: Identifier to message.
        deadline: End of the exchange, by ``time.monotonic``.
        limits: How large a reply may be.
    """

    steady: Steady
    sent: Mapping[str, Message]
    deadline: float
    limits: Limits
    _outlines: dict[str, tuple[str, Any]] = field(default_factory=dict)
    _is_closed: bool = False
    _is_lost: bool = False

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._outstanding = set(self.sent)

    def reply(self, identifier: str) -> Message | None:
        """Waits for the reply to one message, within the deadline.

        Args:
            identifier: Identifier of the message.

        Returns:
            The reply; an error if it is not allowed or cannot be read; None if it is late.
        """
        if not self._is_there(identifier) or self._is_lost:
            return None
        root, tree = self._outlines.pop(identifier)
        try:
            contents = self._contents(tree)
            if contents is None:
                return None
            reply = inflated(root, contents, self.limits)
            reply.metadata.__dict__["_message_id"] = root
            if reply.metadata.reply_to_message_id != identifier:
                raise FederationError("the reply answers another message")
            return reply
        except Unanswered:
            self._is_lost = True
            return None
        except FederationError as error:
            return Message(Error(code=_NOT_USABLE, reason=str(error)), reply_to=self.sent[identifier])
        finally:
            self._forget(root)

    def _is_there(self, identifier: str) -> bool:
        """Waits for the outline of a reply; False if it did not arrive by the deadline."""
        while not self._is_closed:
            self._is_closed = time.monotonic() >= self.deadline  # the last poll, for all replies
            if identifier in self._outlines and not self._is_closed:
                break
            if self._outstanding:
                self._poll()
            if identifier not in self._outlines and not self._is_closed:
                waited = time.monotonic() - self._began
                self._sleep(min(_LONGEST_POLL_SECONDS, max(_POLL_SECONDS, waited / 10)))
        return identifier in self._outlines

    def _poll(self) -> None:
        """Asks for the outlines of all outstanding replies."""
        from flwr.proto.runtime_pb2 import PullAppMessagesRequest

        request = PullAppMessagesRequest(message_ids=sorted(self._outstanding))
        try:
            found = self.steady.call(
                lambda grid: grid._runtime_client.PullMessages(request), self._until
            )
        except Unanswered as error:
            logger.warning("the round continues without the replies that are missing: %s", error)
            self._is_closed = self._is_lost = True
            return
        for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
            metadata = message.metadata
            if metadata.reply_to_message_id in self._outstanding:
                self._outstanding.discard(metadata.reply_to_message_id)
                self._outlines[metadata.reply_to_message_id] = metadata.message_id, tree

    def _contents(self, tree: Any) -> dict[str, bytes] | None:
        """All objects of a reply; None if they are not complete by the deadline.

        Raises:
            FederationError: They are too many or too large, or the SuperLink has discarded them.
            Unanswered: The SuperLink does not answer.
        """
        contents: dict[str, bytes] = {}
        left_bytes = self.limits.most_bytes + self.limits.record_bytes
        for identifier in objects_of(tree, self.limits):
            content = self._object(identifier)
            if content is None:
                return None
            left_bytes -= len(content)
            if left_bytes < 0:
                raise FederationError(f"the reply is larger than {self.limits.most_bytes} bytes")
            contents[identifier] = content
        return contents

    def _object(self, identifier: str) -> bytes | None:
        """Waits for one object within the deadline; None if it is not available by then."""
        from flwr.proto.message_pb2 import PullObjectRequest

        wait_seconds = _POLL_SECONDS
        while time.monotonic() < self.deadline + SWEEP_SECONDS:
            found = self.steady.call(
                lambda grid: grid._runtime_client.PullObject(
                    PullObjectRequest(node=grid.node, run_id=grid.run.run_id, object_id=identifier)
                ),
                self._until,
            )
            if not found.object_found:
                raise FederationError("the upload of the reply was not finished in time")
            if found.object_available:
                content: bytes = found.object_content
                return content
            if time.monotonic() >= self.deadline:
                return None
            self._sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, _LONGEST_POLL_SECONDS)
        return None

    def _forget(self, root: str) -> None:
        """Makes the SuperLink delete a reply's objects, whether or not the reply was used."""
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest

        def confirm(grid: Any) -> None:
            grid._runtime_client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(
                    node=grid.node, run_id=grid.run.run_id, message_object_id=root
                )
            )

        if self._is_lost:
            return
        try:
            self.steady.call(confirm, self._until)
        except Unanswered as error:
            logger.warning("a reply stays at the SuperLink until the run ends: %s", error)
            self._is_lost = True

    @property
    def _until(self) -> float:
        """Until when a call is retried; after one unsuccessful call nothing more is requested."""
        return max(self.deadline, time.monotonic()) + GRACE_SECONDS

    def _sleep(self, seconds: float) -> None:
        """Waits, but not beyond the deadline."""
        time.sleep(max(0.0, min(seconds, self.deadline - time.monotonic())))
