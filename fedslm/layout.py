"""File and directory names of runs, students and nodes; each name is defined only here."""

from __future__ import annotations

# A run's directory.
CONFIG_TOML = "config.toml"
"""The requested config, for people."""
CONFIG_JSON = "config.json"
"""The requested config, with its hash and the run's identifier."""
ROUNDS = "rounds.jsonl"
STATEMENTS = "statements.jsonl"
CHECKPOINT, CHECKPOINT_STATE = "checkpoint", "state.json"
FROZEN = "frozen.safetensors"
"""Tensors that no round changes; at a deployed node, those that it received last."""
ADAPTER, ADAPTER_WEIGHTS = "adapter", "adapter_model.safetensors"
"""The adapter in PEFT's format."""
RECIPE = "recipe.json"
"""The recipe that completed the config, if one did."""
REPORT, REPORT_PAGE = "report.json", "report.md"
NODES = "nodes"
"""The directories of the simulated nodes."""
BEGUN = "begun-round"
"""The last round that secure aggregation began."""
DATA = "data"
"""The simulation's data."""
GIVEN = "data/given"
"""Records that a Python caller gave, or that were split from one file."""
GIVEN_BASE = "base"
"""The base model that a Python caller gave."""
HOLDOUT = "holdout.json"
"""Which share of the private file `fedslm train` held out and treats as public."""
TRAIN_TOML = "train.toml"
"""The short config of `fedslm train`, for people."""
ERROR = "error.txt"
CLIENTS_LOG = "clients.log"
"""What the workers log; runs that share workers share it, next to their directories."""

# A student's directory.
DISTILLED = "distilled"
DISTILL_REPORT, DISTILL_PAGE = "distill.json", "distill.md"

# A sweep's directory.
SWEEP, SWEEP_PAGE, SWEEP_PLOT = "sweep.json", "sweep.md", "sweep.png"

# A node's directory.
POLICY = "policy.toml"
LEDGER = "ledger.jsonl"
RELEASE, RELEASE_TENSORS = "release.json", "release.safetensors"
"""The last release, in case a request is repeated."""
NODE_RUNS = "runs"
"""The node's own files for each run."""
SECAGG = "secagg"
"""The node's secrets and answers of the latest attempt of each run under secure aggregation."""
SIGNED_ROSTER, ROSTER_AUTHORITY = "signed-roster.json", "roster-authority.pem"
"""The nodes that the authority admitted, and the authority's public key; in a simulation next to the
directories of its nodes. The server keeps the list too."""
SESSION = "session"
"""Random text of the node's process."""
ATTESTATIONS = "attestations"
"""Results of tests that the code passed on this machine."""
SELF_TEST = "self-test.json"
"""The self-test that the code of a simulation's nodes passed; next to their directories."""

# A server's directory.
OPERATOR_KEY = "operator.key"
"""Signs requests to nodes."""

# A search's directory.
TUNE_STATE = "tune.json"
"""What all trials share, with the hash of the config."""
TRIALS, TRIAL_RUNS = "trials.jsonl", "trials"
"""One line for each finished trial; its scores on the held-out records."""
TUNED, TUNE_PAGE = "recipe.toml", "tune.md"


def simulated(client: int) -> str:
    """Name of a simulated node's directory, below ``NODES``."""
    return f"client-{client:05d}"
