"""The server's view of one masked vector is uniform, also for those who know all masks but one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.secagg import Federation, Vector
from support.secagg_views import is_uniform, small_numbers, without_masks

from fedslm.secagg import node as node_module
from fedslm.secagg.masking import add_masks

LENGTH = 100_000


def views(federation: Federation) -> dict[str, Vector]:
    """What is left of node 1's masked vector for those who know more and more."""
    federation.input({client: small_numbers(client, LENGTH) for client in federation.nodes})
    return {
        "server": federation.inputs[1].vector,
        "server and two nodes": without_masks(federation, 1, [0, 2], with_self=False),
        "server and all others": without_masks(federation, 1, [0, 2, 3], with_self=False),
        "server and two nodes, unmasked": without_masks(federation, 1, [0, 2], with_self=True),
        "everybody": without_masks(federation, 1, [0, 2, 3], with_self=True),
    }


def test_one_masked_vector_is_uniform(tmp_path: Path) -> None:
    """Whoever knows all masks but one sees uniform numbers; who knows all of them sees the vector."""
    federation = Federation(tmp_path, 4, LENGTH)
    federation.until("input")
    found = views(federation)
    assert found.pop("everybody").tolist() == small_numbers(1, LENGTH).tolist()
    assert [name for name, vector in found.items() if not is_uniform(vector)] == []


@pytest.mark.parametrize(
    ("left_out", "view"),
    [(0, "server and all others"), (-1, "server and two nodes, unmasked")],
)
def test_the_test_notices_a_missing_mask(
    left_out: int, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Power: without the self mask, or that with an honest peer, the view that needs it fails."""
    federation = Federation(tmp_path, 4, LENGTH)
    federation.until("input")

    def without_one(vector: Vector, plus: list[bytes], minus: list[bytes]) -> None:
        if len(plus) == 3:  # node 1 adds its own mask and those with 2 and 3; it subtracts that with 0
            plus = [key for key in plus if key != plus[left_out]]
        add_masks(vector, plus, minus)

    monkeypatch.setattr(node_module, "add_masks", without_one)
    found = views(federation)
    assert is_uniform(found["server"])  # three masks are left
    assert not is_uniform(found[view])


@pytest.mark.parametrize("span", [2, 16, 250])
def test_the_test_has_power(span: int) -> None:
    """Bytes that never take the highest values fail."""
    values = np.random.default_rng(1).integers(0, 1 << 32, LENGTH, np.uint32)
    narrow = (values.view(np.uint8) % np.uint8(span)).view(np.uint32)
    assert is_uniform(values)
    assert not is_uniform(narrow)
    assert not is_uniform(small_numbers(1, LENGTH))
