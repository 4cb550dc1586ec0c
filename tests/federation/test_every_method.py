"""Every aggregation method, end to end: from data to an adapter that PEFT alone loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.saved import check_adapter
from support.served import StopAfter, records_of
from support.tiny import PRIVATE

from fedslm import simulation
from fedslm.aggregation.methods import METHODS
from fedslm.config import Config
from fedslm.federation.checkpoint import RunDirectory
from fedslm.inference.trained import load_trained, open_run
from fedslm.models.loaded import load
from fedslm.protocol.metrics import ClientMetrics
from fedslm.records import AdapterState
from fedslm.storage import load_adapter

MakeConfig = Callable[..., Config]
NO_PRIVACY = {"unit": "none"}


def run(config: Config) -> dict[str, Any]:
    """A whole run without a failure."""
    report = simulation.simulate(config)
    assert report["failures"] == []
    assert report["stopped"] == ""
    return report


def moving(report: dict[str, Any]) -> AdapterState:
    """The server's moving tensors at the end."""
    state = RunDirectory.open(Path(report["directory"]))[0].load()
    assert state is not None
    return state.server.moving


@pytest.mark.parametrize("privacy", [NO_PRIVACY, PRIVATE], ids=lambda p: p["unit"])
@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_from_data_to_adapter(
    make_config: MakeConfig, method: str, privacy: dict[str, Any]
) -> None:
    """Rounds pass, the adapter moves (FedSA: its A), and PEFT's files give the logits of ours."""
    aggregation = {"method": method}
    config = make_config(privacy=privacy, aggregation=aggregation, federation={"rounds": 2})
    report = run(config.resolved())
    assert report["aggregation"] == method
    if method != "fedsa":
        assert report["metrics_after"]["loss"] != report["metrics_before"]["loss"]
    sent = records_of(config)
    assert all(line["completed"] == 3 and line["bytes_up"] > 0 for line in sent)
    if method not in ("stack", "fedex", "flora", "fed-sb"):
        assert any(np.abs(tensor).sum() > 0 for tensor in moving(report).tensors.values())
        return
    assert report["adapter_lora"]["rank"] >= config.lora.rank
    check_plain(config.resolved(), report)


def check_plain(config: Config, report: dict[str, Any]) -> None:
    """The finished run, opened as `fedslm predict` opens it, gives the logits of the rounds' own model."""
    import torch

    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4).long()}
    directory = Path(report["directory"])
    opened = load_trained(open_run(directory)).model.adapter.network
    with torch.inference_mode():
        found = opened(**inputs).logits
    core = report["aggregation"] == "fed-sb"
    own = load(
        config.model,
        config.lora,
        config.task,
        len(report["labels"]),
        trains="core" if core else "factors",
    )
    own.adapter.write(load_adapter(directory / "frozen.safetensors").merged(moving(report)))
    with torch.inference_mode():
        expected = own.adapter.network.eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["fedit", "rolora", "flexlora"])
def test_peft_alone_loads_it(make_config: MakeConfig, method: str) -> None:
    """What was saved gives bit for bit the logits of the attached adapter."""
    config = make_config(privacy=NO_PRIVACY, aggregation={"method": method})
    check_adapter(config.resolved(), run(config.resolved()))


@pytest.mark.parametrize("method", ["rolora", "stack", "fedsa"])
@pytest.mark.parametrize("extra", [{}, {"compression": {"upload": "int8", "keep_fraction": 0.5}}])
def test_a_resumed_run_has_the_same_bits(
    make_config: MakeConfig, tmp_path: Path, method: str, extra: dict[str, Any]
) -> None:
    """Turn, moments, what was put aside and what clients keep survive an interruption."""
    values = {"privacy": NO_PRIVACY, "aggregation": {"method": method}, **extra}
    whole = run(make_config(run={"directory": str(tmp_path / "whole")}, **values).resolved())
    config = make_config(run={"directory": str(tmp_path / "cut")}, **values).resolved()
    with pytest.raises(KeyboardInterrupt):
        simulation.simulate(config, [StopAfter(1)])
    resumed = simulation.resume(tmp_path / "cut")
    assert resumed["adapter_sha256"] == whole["adapter_sha256"]


def test_rolora_moves_one_factor_at_a_time(make_config: MakeConfig, tmp_path: Path) -> None:
    """On the first turn A stays bit-identical, on the second B."""
    states = []
    for rounds in (1, 2):
        config = make_config(
            privacy=NO_PRIVACY,
            aggregation={"method": "rolora"},
            federation={"rounds": rounds},
            run={"directory": str(tmp_path / str(rounds))},
        )
        states.append(moving(run(config.resolved())))
    one, two = states
    for key in one:
        if "lora_B" in key:
            assert one[key].any()
            np.testing.assert_array_equal(one[key], two[key])
        if "lora_A" in key:
            assert not np.array_equal(one[key], two[key])


SGD = {"optimizer": "sgd", "learning_rate": 0.1}
OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"training": SGD}, {"training": {**SGD, "drift": "scaffold"}}),
    ({}, {"training": {"drift": "fedprox", "proximal_strength": 1.0}}),
    ({}, {"aggregation": {"server_optimizer": "fedadam"}}),
    ({"aggregation": {"method": "ffa"}}, {"aggregation": {"method": "ffa", "rule": "median"}}),
    (
        {"aggregation": {"method": "flexlora"}, "lora": {"rank": 4}},
        {"aggregation": {"method": "flexlora"}, "lora": {"rank": 4, "client_ranks": [2, 4]}},
    ),
    (
        {"aggregation": {"method": "ffa"}, "lora": {"rank": 4}},
        {"aggregation": {"method": "ffa"}, "lora": {"rank": 4, "client_ranks": [2, 4]}},
    ),
    ({}, {"compression": {"upload": "bfloat16"}}),
    ({}, {"compression": {"upload": "int8", "keep_fraction": 0.25, "error_feedback": True}}),
]


@pytest.mark.parametrize(("without", "given"), OPTIONS, ids=lambda values: json.dumps(values)[:60])
def test_an_option_changes_the_run(
    make_config: MakeConfig, tmp_path: Path, without: dict[str, Any], given: dict[str, Any]
) -> None:
    """Each option runs, and does something: the adapter is not the one without it."""
    found = set()
    for name, values in (("without", without), ("given", given)):
        base = {"privacy": NO_PRIVACY, "run": {"directory": str(tmp_path / name)}}
        found.add(run(make_config(**base, **values).resolved())["adapter_sha256"])
    assert len(found) == 2


def test_each_factor_keeps_what_compression_lost_of_it(make_config: MakeConfig) -> None:
    """Under RoLoRA B's error waits through A's turn, and the other way round."""
    report = run(
        make_config(
            privacy=NO_PRIVACY,
            aggregation={"method": "rolora"},
            compression={"upload": "int8", "keep_fraction": 0.25, "error_feedback": True},
            federation={"rounds": 3},
        ).resolved()
    )
    node = Path(report["directory"]) / "nodes" / "client-00000"
    kept = [load_adapter(path) for path in sorted(node.glob("runs/*/memory-*.safetensors"))]
    for factor in ("lora_A", "lora_B"):
        assert any(key.startswith("error/") and factor in key for key in kept[-1])


def test_a_starts_from_public_records(make_config: MakeConfig, tmp_path: Path) -> None:
    """With public records a frozen A is EVA's: orthonormal rows, and not the seeded ones."""
    found = []
    for name, initial in (("seeded", "orthonormal"), ("eva", "eva")):
        config = make_config(
            privacy=PRIVATE,
            run={"directory": str(tmp_path / name)},
            lora={"initial": initial},
            federation={"rounds": 1},
        )
        public = Path(config.data.source) / "test.jsonl"
        data = config.data.model_copy(update={"public_source": str(public)})
        run(config.model_copy(update={"data": data}).resolved())
        found.append(load_adapter(tmp_path / name / "frozen.safetensors"))
    for key in found[0]:
        assert not np.array_equal(found[0][key], found[1][key])
        for state in found:
            np.testing.assert_allclose(state[key] @ state[key].T, np.eye(len(state[key])), atol=1e-5)


@pytest.mark.parametrize(("upload", "share"), [("bfloat16", 0.5), ("int8", 0.25)])
def test_fewer_bytes_are_counted(make_config: MakeConfig, upload: str, share: float) -> None:
    """What the wire saved is in the record."""
    config = make_config(privacy=NO_PRIVACY, compression={"upload": upload})
    run(config.resolved())
    for line in records_of(config):
        assert line["bytes_up"] == pytest.approx(share * line["bytes_down"], rel=0.05)


@pytest.mark.parametrize("method", ["fine-tune", "second-adapter"])
def test_clients_measure_what_is_their_own(make_config: MakeConfig, method: str) -> None:
    """Without privacy the report has every client's metrics, shared and personal, and their spread."""
    report = run(
        make_config(
            privacy=NO_PRIVACY,
            data={"validation_fraction": 0.3},
            personalization={"method": method, "steps": 3},
        ).resolved()
    )
    measured = report["measured_by_clients"]
    assert len(measured["clients"]) == 3
    for values in measured["clients"].values():
        found = ClientMetrics(**values)
        assert found.records > 0
        assert found.personal["loss"] != found.shared["loss"]
    assert set(measured["shared"]["loss"]) == {"min", "median", "max", "worst_decile"}
    assert "| loss (personal) |" in (Path(report["directory"]) / "report.md").read_text()


def test_under_privacy_nobody_tells(make_config: MakeConfig) -> None:
    """Numbers and personal adapters stay in the nodes' directories."""
    report = run(
        make_config(
            privacy=PRIVATE,
            data={"validation_fraction": 0.3},
            personalization={"method": "fine-tune", "steps": 2},
        ).resolved()
    )
    assert report["measured_by_clients"] is None
    own = sorted((Path(report["directory"]) / "nodes").glob("client-*/personal/*/*"))
    assert [path.name for path in own].count("metrics.json") == 3
    assert [path.name for path in own].count("adapter_model.safetensors") == 3
    page = (Path(report["directory"]) / "report.md").read_text(encoding="utf-8")
    assert "is not covered by this ε" in page


@pytest.mark.parametrize("kind", ["sign-flip", "scale", "nan", "label-flip", "backdoor"])
def test_an_attack_is_carried_out(make_config: MakeConfig, kind: str) -> None:
    """A hostile client changes the result, or is found out and left out; the others' run completes."""
    values = {"privacy": NO_PRIVACY, "federation": {"rounds": 1}}
    directory = make_config().run.directory
    honest = run(make_config(run={"directory": f"{directory}-h"}, **values).resolved())
    config = make_config(attack={"kind": kind, "clients": 1}, **values).resolved()
    report = simulation.simulate(config)
    assert report["adapter_sha256"] != honest["adapter_sha256"]
    (line,) = records_of(config)
    assert line["failed"] == (1 if kind == "nan" else 0)
    assert report["attack"] == {"kind": kind, "clients": 1, "rule": "mean", "hostile": 0}
    for page in ("report.md", "adapter/README.md"):
        assert "Simulated attack" in (Path(report["directory"]) / page).read_text(encoding="utf-8")


def test_a_report_names_what_is_not_the_default(make_config: MakeConfig) -> None:
    """Settings of training and aggregation that a reader would not guess, and FedSA's missing model."""
    report = run(
        make_config(
            privacy=NO_PRIVACY,
            aggregation={"method": "fedsa", "server_optimizer": "fedavgm"},
            compression={"upload": "int8"},
            data={"validation_fraction": 0.3},
        ).resolved()
    )
    assert report["settings"]["aggregation.server_optimizer"] == "fedavgm"
    assert report["settings"]["compression.upload"] == "int8"
    page = (Path(report["directory"]) / "report.md").read_text(encoding="utf-8")
    assert "There is no global model" in page
    assert "`compression.upload = int8`" in page
    own = (Path(report["directory"]) / "nodes").glob("client-*/personal/*/adapter_config.json")
    assert len(list(own)) == 3
