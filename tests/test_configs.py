import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object

from fedlora.experiments.settings import compose

CONF = Path(__file__).parents[1] / "experiments" / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
NEEDED = {"model=hub": ["model.path=x"], "data=files": ["data.train=x"], "data=hub": ["data.path=x"]}
names = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF).with_suffix("")))


def choice(path: Path) -> list[str]:
    if path.parent == CONF:
        return []
    word = f"{path.parent.name}={path.stem}"
    return [word, *NEEDED.get(word, [])]


def targets(node: Any) -> Any:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)


def test_there_are_configs() -> None:
    assert len(FILES) > 10


@names
def test_a_config_says_in_its_first_line_how_to_use_it(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    command = re.search(r"fedlora run(.*)$", first)
    assert first.startswith("#")
    assert command
    if path.parent != CONF and path.parent.name in ("model", "data", "strategy"):
        assert f"{path.parent.name}={path.stem}" in command[1]


@names
def test_the_command_of_a_config_composes(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    compose(first.partition("fedlora run")[2].split())


@names
def test_a_config_composes_and_its_targets_take_its_keys(path: Path) -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.to_container(compose(choice(path)), resolve=True)
    assert isinstance(config, dict)
    for node in targets(config[path.parent.name] if path.parent != CONF else config):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in node:
            assert key.startswith("_") or key in parameters or takes_any, f"{path}: {key}"


@names
def test_keys_of_a_group_are_the_same_in_all_its_files(path: Path) -> None:
    """So that an override works whichever choice is made."""
    if path.parent.name not in ("model", "engine"):
        return
    keys = [set(yaml.safe_load(p.read_text(encoding="utf-8"))) for p in path.parent.glob("*.yaml")]
    assert all(found == keys[0] for found in keys)


def test_every_strategy_has_a_config() -> None:
    import fedlora.strategies

    stems = {path.stem for path in (CONF / "strategy").glob("*.yaml")}
    assert stems == {name.lower() for name in fedlora.strategies.__all__}
