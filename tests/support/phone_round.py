"""Run by test_phone.py within a limit on memory: one private round at a node, message in, reply out.

python phone_round.py NODE MESSAGE REPLY [CGROUP] joins the cgroup first, with all that it starts.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path


def main() -> None:
    """Answers as ``fedslm node up`` does, but for the connection."""
    node_directory, message_file, reply_file = map(Path, sys.argv[1:4])
    if len(sys.argv) > 4:
        (Path(sys.argv[4]) / "cgroup.procs").write_text(str(os.getpid()))
    import fedslm.deployment.fleet  # noqa: F401  (what a connected node has in memory)
    from fedslm.deployment import node
    from fedslm.engines.local import handle, wait_for

    ready = node.open_node(node_directory)
    node.import_records(ready)
    message = pickle.loads(message_file.read_bytes())  # noqa: S301  (the test's own)
    with node.worker(ready) as pool:
        replies = []
        for _ in range(2):  # the second time from a warm worker; the same request: its release is kept
            job = pool.submit(handle, message, ready.context(5, 1, 0))
            replies.append(wait_for(pool, job, message, 600.0))
    reply_file.write_bytes(pickle.dumps(replies))


if __name__ == "__main__":
    main()
