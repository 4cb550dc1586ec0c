"""File and directory names of runs, students and nodes; each name is defined only here."""

from __future__ import annotations

# A run's directory.
CONFIG_TOML = "config.toml"
"""What was asked, for people."""
CONFIG_JSON = "config.json"
"""What was asked, with its hash and the run's identifier."""
ROUNDS = "rounds.jsonl"
STATEMENTS = "statements.jsonl"
CHECKPOINT, CHECKPOINT_STATE = "checkpoint", "state.json"
FROZEN = "frozen.safetensors"
"""Tensors that no round changes; at a deployed node, those that it was sent last."""
ADAPTER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
"""The adapter in PEFT's format."""
REPORT, REPORT_PAGE = "report.json", "report.md"
NODES = "nodes"
"""The simulated nodes' own directories."""
DATA = "data"
"""The simulation's data."""
ERROR = "error.txt"

# A student's directory.
DISTILLED, DISTILL_REPORT = "distilled", "distill.json"

# A node's directory.
POLICY = "policy.toml"
LEDGER = "ledger.jsonl"
RELEASE, RELEASE_TENSORS = "release.json", "release.safetensors"
"""The last release, for a request that is sent again."""
NODE_RUNS = "runs"
"""What the node keeps of each run."""
SELF_TEST = "self-test.json"
"""Which code passed the self-test on this machine."""
