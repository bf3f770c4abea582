"""Imports go down only, third parties stay behind their walls, files stay small and say what they are."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [  # low to high: a module imports from its own layer or a lower one, at any depth of the code
    {
        "fedlora.errors",
        "fedlora.ranges",
        "fedlora.seeds",
        "fedlora.core.natural_order",
        "fedlora.core.threads",
    },
    {"fedlora.core", "fedlora.storage.atomic"},
    {"fedlora"},  # fedlora/__init__.py itself
    # server_optimizers: over states and strategies alone, and below the loop that applies them
    {
        "fedlora.data",
        "fedlora.tasks",
        "fedlora.models",
        "fedlora.privacy",
        "fedlora.compression",
        "fedlora.server_optimizers",
    },
    {"fedlora.training"},
    {"fedlora.storage", "fedlora.rounds.round_config"},
    {"fedlora.callbacks", "fedlora.robust", "fedlora.secure_aggregation", "fedlora.rounds", "fedlora.report"},
    {"fedlora.engines", "fedlora.schedulers"},
    {"fedlora.strategies", "fedlora.clients"},
    {"fedlora.runner"},
    {"fedlora.config"},
    {"fedlora.saved_runs"},
    {"fedlora.api"},
    {"fedlora.deploy", "fedlora.cli", "fedlora.testing"},
    {"fedlora.experiments"},
]
# Algorithms know nothing of what runs and shows them.
WIRING = {"fedlora.storage", "fedlora.callbacks", "fedlora.rounds", "fedlora.report", "fedlora.engines"}
FORBIDDEN = {
    "fedlora": {"fedlora.seeds"},
    "fedlora.tasks": {"fedlora.models", "fedlora.privacy"},  # which are built on the tasks
    "fedlora.strategies": {"fedlora.clients"} | WIRING,
    "fedlora.clients": {"fedlora.strategies"} | WIRING,
}
WALLS = {
    "flwr": {
        "fedlora.rounds",
        "fedlora.runner.session",
        "fedlora.schedulers",
        "fedlora.engines",
        "fedlora.secure_aggregation",
        "fedlora.deploy",
    },
    "peft": {"fedlora.models", "fedlora.tasks"},
    "transformers": {"fedlora.models", "fedlora.tasks"},
    "hydra": {"fedlora.config", "fedlora.cli"},
    "omegaconf": {"fedlora.config", "fedlora.cli", "fedlora.deploy", "fedlora.saved_runs.replay"},
    "opacus": {"fedlora.privacy"},
    "datasets": {"fedlora.data.hub"},
}


def module_name(path: Path) -> str:
    """fedlora/data/hub.py is fedlora.data.hub, strategies/fedit.py is fedlora.strategies.fedit."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in ("fedlora", *parts[parts[0] == "fedlora" :]) if part != "__init__")


FILES = {
    module_name(path): path
    for root in ("fedlora", "strategies", "clients", "experiments")
    for path in sorted((ROOT / root).rglob("*.py"))
}
ALGORITHMS = [module for module in FILES if module.startswith(("fedlora.strategies.", "fedlora.clients."))]
every_module = pytest.mark.parametrize("module", FILES)


def within(module: str, parent: str) -> bool:
    return module == parent or module.startswith(parent + ".")


def unit(module: str) -> str:
    """The entry of LAYERS that holds a module."""
    units = [name for layer in LAYERS for name in layer if within(module, name)]
    found = max(units, key=len)
    assert found != "fedlora" or module == "fedlora", f"{module} has no layer: add it to LAYERS, design.md §3"
    return found


def height(module: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if unit(module) in layer)


def imports(module: str) -> Iterator[tuple[str, str]]:
    """Every (module imported, name it is bound to), under TYPE_CHECKING and inside functions too."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, (alias.asname or alias.name).split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in FILES else source, alias.asname or alias.name


@every_module
def test_imports_go_down_only(module: str) -> None:
    if module == "fedlora":
        return  # offers every room's public names, each when it is first asked for
    ours = sorted({target for target, _ in imports(module) if within(target, "fedlora")})
    up = [target for target in ours if height(target) > height(module)]
    assert not up, f"{module} imports from a higher layer: {up}"
    barred = [target for target in ours if unit(target) in FORBIDDEN.get(unit(module), ())]
    assert not barred, f"{module} must not import {barred}"


@every_module
def test_third_parties_stay_behind_their_walls(module: str) -> None:
    if within(module, "fedlora.experiments.benchmarks"):
        pytest.skip("a benchmark is where we meet the peers")
    for target, _ in imports(module):
        wall = WALLS.get(target.split(".")[0])
        assert wall is None or any(within(module, place) for place in wall), (
            f"{module} imports {target}, which only {sorted(wall or ())} may"
        )


@pytest.mark.parametrize("module", ALGORITHMS)
def test_siblings_do_not_subclass_one_another(module: str) -> None:
    folder = module.rpartition(".")[0]
    siblings = {name for target, name in imports(module) if within(target, folder)}
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            bases = {name.id for base in node.bases for name in ast.walk(base) if isinstance(name, ast.Name)}
            assert not bases & siblings, f"{module}.{node.name} subclasses a sibling: compose instead"


@pytest.mark.parametrize("path", [*FILES.values(), *sorted((ROOT / "tests").rglob("*.py"))], ids=str)
def test_no_file_is_over_300_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300


@every_module
def test_every_public_module_says_what_it_is(module: str) -> None:
    if not any(part.startswith("_") for part in module.split(".")):
        doc = ast.get_docstring(ast.parse(FILES[module].read_text(encoding="utf-8"))) or ""
        assert len(doc) >= 10, f"{module} has no docstring to speak of: {doc!r}"
