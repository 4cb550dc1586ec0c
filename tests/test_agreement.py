"""What machines with other processors compute alike: all that a federation compares between them."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
from support.processors import KERNELS, environment

CODE = """
import json
import numpy as np
from fedslm import config as configuration
from fedslm.aggregation.compression import Packing, compress
from fedslm.models.base import DEMO_DIRECTORY, base_sha256
from fedslm.privacy import accounting
from fedslm.privacy.calibration import calibrated
from fedslm.records import AdapterState, Event
from fedslm.rng import reproducible_bytes

shapes = {"a.lora_A.weight": (8, 128), "a.lora_B.weight": (512, 8)}
state = AdapterState({
    key: np.frombuffer(reproducible_bytes(2 * a * b, 0, key), "<i2").reshape(a, b).astype(np.float32)
    for key, (a, b) in shapes.items()
})
config = configuration.from_mapping({
    "run": {"name": "agreement"},
    "model": {"base": "demo"},
    "data": {"source": "demo"},
    "task": {"name": "classification"},
    "privacy": {"unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "sample_rate": 0.05},
})
packed = {}
for upload in ("bfloat16", "int8"):
    packing = Packing(upload, 0.25, (0, 1))
    sent = compress(state, packing, np.random.default_rng(0), unbiased=True)
    arrived = packing.unpack(packing.pack(sent), sent.shapes)
    packed[upload] = [sent.sha256(), arrived.sha256()]
events = [(0.05, 1.0, 100), (0.3, 0.9, 60), (1.0, 5.0, 10)]
print(json.dumps({
    "exact": {
        "base": base_sha256(DEMO_DIRECTORY),
        "config": config.sha256(),
        "plan": calibrated(config.privacy, config.training, 10).to_json(),
        "update": state.sha256(),
        "places": [int(each) for each in Packing("float32", 0.1, (0, 1)).places("key", 300)],
        "packed": packed,
    },
    "epsilon": [accounting.epsilon([Event(*event)], 1e-5) for event in events],
}))
"""


@cache
def found(kernels: str) -> dict[str, Any]:
    """What a process with these kernels computes."""
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, env=environment(kernels), capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("kernels", [name for name in KERNELS if name != "native"])
def test_processors_agree_on_all_that_is_compared(kernels: str) -> None:
    """Hashes, plan, places and what arrives are the same bits; an epsilon differs by less than is allowed."""
    here, there = found("native"), found(kernels)
    assert here["exact"] == there["exact"]
    assert all(sent == arrived for sent, arrived in here["exact"]["packed"].values())
    assert there["epsilon"] == pytest.approx(here["epsilon"], rel=2.5e-10, abs=0)
