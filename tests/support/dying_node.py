"""A node that is killed (-9) in the middle of its first upload: a process of its own, with a node's directory.

python dying_node.py DIRECTORY
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import numpy as np
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)

from fedslm.deployment.enrolment import node_key
from fedslm.deployment.fleet import connected
from fedslm.deployment.link import Link
from fedslm.deployment.node import open_node
from fedslm.protocol.messages import Reply
from fedslm.records import AdapterState


class DyingLink(Link):
    """Sends a reply's outline and one of its objects."""

    def _send(self, reply: Message, run_id: int) -> None:
        """Dies before the rest."""
        _, send, _, _, _, push_object, _ = self.calls
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            wanted, session = send(remove_content_from_message(reply), get_object_tree(reply), 0.0)
            objects = get_all_nested_objects(reply)
            first = next(name for name in objects if name in wanted)
            push_object(run_id, session, first, objects[first].deflate())
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Connects, answers one message, and dies."""
    ready = open_node(Path(sys.argv[1]))
    pem = ready.admission.authority.encode()
    with connected(ready.admission.address, pem, node_key(ready.directory)) as found:
        link = DyingLink(*found, ready.approved, 1 << 30)

        def answer(message: Message, _: int) -> Message:
            delta = AdapterState({"weight": np.zeros(9, np.float32)})
            return Message(Reply("ok", 1, delta=delta).to_records(), reply_to=message)

        link.serve(answer, lambda _: True, 0.2)


if __name__ == "__main__":
    main()
