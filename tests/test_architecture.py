"""The laws of docs/architecture.md: each test lists all offenders."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedslm

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fedslm"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

# The arrow: a module imports only what stands in a lower storey, or beside it in its own room.
STOREYS = {
    "errors": 0,
    "records": 1,
    "rng": 1,
    "layout": 1,
    "adapter_keys": 1,
    "worker_process": 1,
    "extras": 1,
    "scheduling": 2,
    "storage": 2,
    "workers": 3,
    "rendering": 2,
    "fingerprint": 2,
    "attestations": 3,
    "config": 3,
    "data": 4,
    "tasks": 5,
    "models": 6,
    "privacy": 6,
    "training": 7,
    "aggregation": 7,
    "secagg": 7,
    "recipes": 8,
    "drafting": 8,
    "verification": 8,
    "protocol": 8,
    "client": 9,
    "federation": 9,
    "engines": 10,
    "validation": 11,
    "reporting": 11,
    "progress": 11,
    "inference": 12,
    "distillation": 13,
    "audit": 14,
    "simulation": 14,
    "flower": 15,
    "tuning": 15,
    "api": 15,
    "sweep": 15,
    "doctor": 15,
    "deployment": 15,
    "demonstration": 15,
    "cli": 16,
    "__main__": 17,
    "__init__": 17,
}

OWNERS = {
    "prometheus_client": {"deployment.metrics"},
    "pydantic": {"config", "privacy.policy", "deployment.settings"},
    "tomllib": {"config"},
    "datasets": {"data"},
    "pyarrow": {"data"},
    "sqlalchemy": {"data"},
    "huggingface_hub": {"data"},
    "transformers": {"tasks", "models", "inference", "distillation"},
    "peft": {"models"},
    "bitsandbytes": {"models"},
    "torch": {
        "tasks",
        "models",
        "training",
        "verification",
        "inference",
        "distillation",
        "worker_process",
    },
    "opacus": {"training", "verification", "privacy.agreement"},
    "dp_accounting": {"privacy.accounting", "privacy.renyi"},
    "filelock": {"storage", "privacy", "distillation.run"},
    "scipy": {"verification.self_test", "verification.canaries", "distillation.losses"},
    "safetensors": {"storage", "inference.export", "protocol.tensors"},
    "flwr": {"protocol", "client", "federation", "engines", "flower", "simulation", "deployment"},
    "ray": {"engines.ray", "engines.ray_cluster"},
    "jinja2": {"rendering"},
    "markdown_it": {"rendering"},
    "matplotlib": {"reporting"},
    "typer": {"cli"},
    "rich": {"cli", "progress", "demonstration"},
    "cryptography": {"deployment", "privacy", "audit", "secagg"},
}

# Only these see the whole config.
SEE_CONFIG = {
    "validation",
    "recipes.choice",
    "sweep",
    "cli.sweep",
    "recipes.expected",
    "federation.rounds",
    "federation.sharing",
    "federation.start",
    "federation.observers",
    "federation.visible",
    "federation.checkpoint",
    "reporting.report",
    "audit.runs",
    "progress",
    "simulation",
    "tuning.search",
    "tuning.setting",
    "engines.options",
    "engines.placement",
    "flower",
    "api.given",
    "api.runs",
    "api.single",
    "demonstration",
    "deployment.runs",
    "deployment.lab",
    "deployment.status",
    "deployment.bundle",
    "cli.__init__",
    "cli.budget",
    "cli.console",
    "cli.data",
    "cli.init",
    "cli.model",
    "cli.plan",
    "__init__",  # the public names
    "config.__init__",
}


def name_of(path: Path) -> str:
    """Dotted name below fedslm."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(module, names) of each import in a file."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", tuple(alias.name for alias in node.names)


def own_imports(path: Path) -> Iterator[str]:
    """Names below fedslm that a file imports."""
    for module, names in imports(path):
        if module == "fedslm":
            yield from (name for name in names if (PACKAGE / name).exists() or name in STOREYS)
        elif module.startswith("fedslm."):
            yield module.removeprefix("fedslm.")


def test_imports_go_one_way() -> None:
    """Law 1: no module imports from a storey above its own, and none imports an edge."""
    edges = {"clients", "server", "simulations", "benchmarks", "tests"}
    wrong = []
    for path in MODULES:
        own = name_of(path).split(".")[0]
        rooms = {imported: imported.split(".")[0] for imported in own_imports(path)}
        wrong += [
            f"{name_of(path)} imports {imported}"
            for imported, room in rooms.items()
            if room != own and STOREYS[room] >= STOREYS[own]
        ]
        found = edges & {module.split(".")[0] for module, _ in imports(path)}
        wrong += [f"{name_of(path)} imports {edge}" for edge in found]
    assert wrong == []


def test_heavy_libraries_have_one_owner() -> None:
    """Law 2: each heavy dependency is imported by its owner alone."""
    wrong = []
    for path in MODULES:
        name = name_of(path)
        for module, _ in imports(path):
            owners = OWNERS.get(module.split(".")[0])
            if owners is None or any(name == o or name.startswith(f"{o}.") for o in owners):
                continue
            if not _only_for_types(path, module):
                wrong.append(f"{name} imports {module}")
    assert wrong == []


def test_client_and_server_share_the_protocol_alone() -> None:
    """Law 6: neither side imports the other, nor an engine, which knows both."""
    sides = {"client", "federation", "engines"}
    wrong = [
        f"{name_of(path)} imports {imported}"
        for path in MODULES
        if (own := name_of(path).split(".")[0]) in {"client", "federation", "protocol"}
        for imported in own_imports(path)
        if imported.split(".")[0] in sides - {own}
    ]
    assert wrong == []


def _only_for_types(path: Path, module: str) -> bool:
    """True if a module is imported under TYPE_CHECKING alone."""
    tree = tree_of(path)
    guarded = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            guarded |= {id(child) for child in ast.walk(node)}
    found = [
        node
        for node in ast.walk(tree)
        if (isinstance(node, ast.ImportFrom) and node.module == module)
        or (isinstance(node, ast.Import) and any(alias.name == module for alias in node.names))
    ]
    return all(id(node) in guarded for node in found)


def test_wheel_ships_the_package_alone() -> None:
    """Law 2: the wheel holds fedslm and all its rooms; the Flower App bundle holds the edges."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == rooms
    assert project["tool"]["flwr"]["app"]["fab-include"] == ["clients/*.py", "server/*.py"]
    assert project["project"]["version"] == fedslm.__version__
    assert f"version: {fedslm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_only_edges_and_rounds_see_the_config() -> None:
    """Law 3: everything else takes the section or value that it needs."""
    wrong = [
        name_of(path)
        for path in MODULES
        if name_of(path) not in SEE_CONFIG and not name_of(path).startswith("config.")
        for module, names in imports(path)
        if module == "fedslm.config" and "Config" in names
    ]
    assert wrong == []


def test_modules_hold_definitions_alone() -> None:
    """Law 4: at top level there are imports, definitions and constants; no calls for effect."""
    wrong = [
        f"{name_of(path)}: {ast.unparse(node)[:100]}"
        for path in MODULES
        for node in tree_of(path).body
        if _has_effect(node)
    ]
    assert wrong == []


def _has_effect(node: ast.stmt) -> bool:
    """Whether a statement does more than define; typer's groups may be put together."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        target = node.value.func
        root = target.value if isinstance(target, ast.Attribute) else target
        return not isinstance(root, ast.Name) or root.id not in {"app", "config_app"}
    return isinstance(node, ast.For | ast.While | ast.With | ast.Try)


def test_importing_everything_has_no_effect(tmp_path: Path) -> None:
    """Law 4: importing all modules changes no environment, no logging, no file, and no network."""
    names = [f"fedslm.{name_of(p)}" for p in MODULES if p.name not in ("__init__.py", "__main__.py")]
    code = f"""
import json, logging, os, socket, sys
import torch, transformers, peft, datasets, flwr, opacus, matplotlib, flwr.serverapp, flwr.clientapp
import opacus.optimizers, opacus.grad_sample.grad_sample_module
before = (dict(os.environ), list(logging.getLogger().handlers), torch.get_num_threads())
def refuse(*_): raise AssertionError("network")
socket.socket.connect = refuse
for name in {names!r}:
    __import__(name)
after = (dict(os.environ), list(logging.getLogger().handlers), torch.get_num_threads())
print(json.dumps(before[0] == after[0] and before[1] == after[1] and before[2] == after[2]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) is True
    assert not list(tmp_path.iterdir())


def test_a_simulation_imports_no_database() -> None:
    """Asking local clients does not import Flower's grid of a server, and with it SQLAlchemy."""
    code = """
import sys
from fedslm import simulation
from fedslm.engines.local import LocalGrid
from fedslm.federation.steady import Steady
from fedslm.workers import InlinePool
assert not Steady(LocalGrid(1, InlinePool())).is_remote
print("sqlalchemy" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_engines_share_their_functions() -> None:
    """Law 5: the ClientApp and the local grid answer alike (tests/real/test_engines.py runs them all)."""
    from flwr.app import Message, RecordDict

    from fedslm.client.app import client_app
    from fedslm.engines.local import LocalGrid, handle
    from fedslm.protocol.messages import HELLO, TRAIN
    from fedslm.workers import InlinePool

    grid = LocalGrid(1, InlinePool())
    (node,), context = grid.get_node_ids(), grid._context(0)
    for kind, record, key in [(HELLO, "hello", "client"), (TRAIN, "reply", "status")]:
        message = Message(RecordDict(), node, kind)
        by_app, by_grid = client_app()(message, context), handle(message, context)
        answers = [dict(reply.content.config_records[record]) for reply in (by_app, by_grid)]
        for answer in answers:
            answer.pop("salt", None)  # random
        assert answers[0] == answers[1]
        assert key in answers[0]
    for path, word in [("clients/app.py", "client_app"), ("server/app.py", "serve_flower")]:
        source = (ROOT / path).read_text()
        assert word in source
        assert len(source.splitlines()) <= 20


# Texts, counts, hashes and signed values that are checked before; or TOML, which has NaN.
NO_FIGURES = {
    *("config.reading", "data.columns", "data.holdout", "data.store", "data.tables"),
    "distillation.run",
    *(
        "protocol.bounds",
        "protocol.envelopes",
        "federation.roster",
        "protocol.messages",
        "protocol.setup",
    ),
    *("models.demo_large", "privacy.chain", "privacy.keys", "privacy.ledger"),
    *("deployment.admission", "deployment.bundle", "deployment.enrolment", "deployment.guard_rules"),
    *("deployment.instructions", "deployment.journal", "deployment.lab", "deployment.starters"),
}


def test_json_is_written_without_nan() -> None:
    """Figures go through storage.json_text, or are refused where they are not finite."""
    wrong = [
        f"{name_of(path)}: {ast.unparse(node)[:100]}"
        for path in MODULES
        if name_of(path) not in NO_FIGURES
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("json.dump", "json.dumps")
        if not any(ast.unparse(word) == "allow_nan=False" for word in node.keywords)
    ]
    assert wrong == []


def test_public_names() -> None:
    """Law 7: the public list is exactly this, and every name in it is there."""
    assert fedslm.__all__ == [
        "Config",
        "FedslmError",
        "Observer",
        "Proof",
        "RunResult",
        "__version__",
        "load_config",
        "resume",
        "simulate",
        "train",
    ]
    for name in fedslm.__all__:
        assert getattr(fedslm, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fedslm.nonsense


def test_sizes() -> None:
    """A file has at most 400 lines, a function 40 without its docstring; no assert."""
    wrong = []
    for path in MODULES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        wrong += [f"{name_of(path)}: {lines} lines"] if lines > 400 else []
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef) and (length := _length(node)) > 40:
                wrong.append(f"{name_of(path)}.{node.name}: {length} lines")
            if isinstance(node, ast.Assert):
                wrong.append(f"{name_of(path)}: assert in line {node.lineno}")
    assert wrong == []


def _length(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    documented = ast.get_docstring(node) is not None
    start = node.body[1] if documented and len(node.body) > 1 else node.body[0]
    return (node.body[-1].end_lineno or 0) - start.lineno + 1


def test_the_trips_name_what_is_there() -> None:
    """Each ``module.function`` of the three trips in docs/architecture.md exists."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    trips = page[page.index("## Three trips") : page.index("## The round")]
    named = re.findall(r"`([a-z_]+(?:\.\w+)+)`", trips)
    assert len(named) >= 20
    assert [name for name in named if not _is_defined(name)] == []


def _is_defined(name: str) -> bool:
    """Whether a dotted name below fedslm is a module's function, class or method."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        path = PACKAGE.joinpath(*parts[:cut]).with_suffix(".py")
        if path.exists():
            body: list[ast.stmt] = tree_of(path).body
            for part in parts[cut:]:
                found = [each for each in body if getattr(each, "name", None) == part]
                if not found:
                    return False
                body = getattr(found[0], "body", [])
            return True
    return False


def test_the_map_names_every_module() -> None:
    """docs/architecture.md names each module, and each room."""
    named = set(re.findall(r"`([a-z_0-9]+)/?`", (ROOT / "docs" / "architecture.md").read_text()))
    modules = {name_of(path) for path in MODULES if path.stem not in ("__init__", "__main__")}
    assert sorted(name for name in modules if not set(name.split(".")) <= named) == []
