"""The records of a run at a deployed node, as they were when the run began there.

Records are added and removed while a run is in progress. If the run used the changed records, its
replies would reveal to the server, free of charge, that somebody was admitted or withdrawn; a refusal
would reveal it exactly. So a run keeps the records of its first request, in a separate directory at the
node, and new records serve new runs.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

from fedslm import layout
from fedslm.client.node import Node
from fedslm.data import store
from fedslm.errors import FederationError
from fedslm.protocol.setup import Setup

NOT_KEPT = (
    "this node does not keep the records of this run any more: they are removed when the run has not "
    "asked for a month, and when eight other runs have asked since; start a new run"
)
_RECORDS = "records"
_MOST_RUNS, _LONGEST_SECONDS = 8, 30 * 86_400.0


def with_own_records(setup: Setup, node: Node, *, has_begun: bool) -> Node:
    """Gives the node with the records that a run began with.

    Formal guarantees:
        * At a deployed node all requests of one run and plan read the same records, also after the
          node's records were replaced and the node was started again.
        * A run that has begun and whose records are no longer kept is refused with one fixed text,
          whether or not the node's records have changed since.
        * The records are on disk, readable only by the node's owner, before this returns. At most eight
          runs' records are kept, each for 30 days after the run's last request.

    Args:
        setup: Names the run and its plan.
        node: A simulated node is returned unchanged: its run directory has the records of one run.
        has_begun: Whether something was charged for this run.

    Raises:
        FederationError: The run's records are no longer kept.
        RunError: They cannot be kept.
    """
    if not node.deployed:
        return node
    own = node.run_directory(setup.run_id, setup.plan)
    records = own / _RECORDS
    if not store.holds(records, node.shard):
        if has_begun:
            raise FederationError(NOT_KEPT)
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        store.pin(node.data, node.shard, records, linked=node.data.is_relative_to(node.directory))
    os.utime(own)
    remove_old(node.directory)
    return replace(node, data=records)


def forget_records(setup: Setup, node: Node) -> None:
    """Removes a deployed node's records of a run that can make no more charges."""
    if node.deployed:
        own = node.run_directory(setup.run_id, setup.plan)
        shutil.rmtree(own / _RECORDS, ignore_errors=True)


def remove_old(directory: Path) -> None:
    """Removes the data of runs beyond the eight that asked last, or that have not asked for a month.

    Args:
        directory: The node's own directory.
    """
    asked = {each: each.stat().st_mtime for each in (directory / layout.NODE_RUNS).glob("*")}
    latest = sorted(asked, key=lambda each: asked[each], reverse=True)
    oldest = time.time() - _LONGEST_SECONDS
    for number, each in enumerate(latest):
        if number >= _MOST_RUNS or asked[each] < oldest:
            shutil.rmtree(each, ignore_errors=True)
