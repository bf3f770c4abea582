import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import get_object
from omegaconf import OmegaConf

import fedlora.strategies
from fedlora.config import class_fields
from fedlora.config.composition import choices, compose

ROOT = Path(__file__).parents[1]
CONF = ROOT / "fedlora" / "config" / "conf"
STUDIES = ROOT / "experiments" / "conf"
FILES = [*sorted(CONF.rglob("*.yaml")), *sorted(STUDIES.rglob("*.yaml"))]
NEEDED = {"model=hub": ["model.path=x"], "data=files": ["data.train=x"], "data=hub": ["data.path=x"]}
NEEDED["data=sites"] = ["data.test=x"]
NEEDED["experiment=instructions"] = NEEDED["data=files"]
names = pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")


def choice(path: Path) -> list[str]:
    if path.parent == CONF:
        return []
    word = f"{path.parent.name}={path.stem}"
    return [word, *NEEDED.get(word, [])]


def is_global(path: Path) -> bool:
    """Whether a choice of a group also sets keys of others, such as a strategy the client's rate."""
    return path.read_text(encoding="utf-8").startswith("# @package _global_\n")


def command(path: Path) -> str:
    """The line that says how to use a config: the first one, or that after the package."""
    return path.read_text(encoding="utf-8").splitlines()[is_global(path)]


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
    said = re.search(r"^#.*fedlora run(.*)$", command(path))
    assert said
    if path.parent != CONF and path.parent.name in ("model", "data", "strategy"):
        assert f"{path.parent.name}={path.stem}" in said[1].split()


@names
def test_only_a_strategy_or_an_experiment_sets_keys_of_other_groups(path: Path) -> None:
    if "@package" in path.read_text(encoding="utf-8"):
        assert is_global(path)
        assert path.parent.name in ("strategy", "experiment")
    if is_global(path) and path.parent.name == "strategy":
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["strategy"]["_target_"]


@pytest.mark.slow
@names
def test_the_command_of_a_config_composes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "F").touch()  # stands for a file in the commands; a deployment's must be there
    monkeypatch.chdir(tmp_path)
    words = command(path).partition("fedlora run")[2].split()
    compose([word for word in words if word != "-m" and "," not in word])  # a sweep is of many


@names
def test_a_config_composes_and_its_targets_take_its_keys(path: Path) -> None:
    config = OmegaConf.to_container(compose(choice(path)), resolve=True)
    assert isinstance(config, dict)
    alone = path.parent != CONF and not is_global(path)
    for node in targets(config[path.parent.name] if alone else config):
        parameters = inspect.signature(get_object(node["_target_"])).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in node:
            assert key.startswith("_") or key in parameters or takes_any, f"{path}: {key}"


@names
def test_a_default_is_written_once_in_its_class(path: Path) -> None:
    """A key without a value has the default of the class's field, and no file says that default again."""
    for node in targets(yaml.safe_load(path.read_text(encoding="utf-8"))):
        made = get_object(node["_target_"])
        cls = getattr(made, "__self__", made)
        if not dataclasses.is_dataclass(cls):
            continue  # a function that loads something
        defaults = {
            field.name: [*field.default] if isinstance(field.default, tuple) else field.default
            for field in dataclasses.fields(cls)
        }
        filled = class_fields.filled(node)
        said = OmegaConf.to_container(OmegaConf.create(yaml.safe_dump(node)))  # which reads 1e-2 as a number
        for key, value in said.items():
            default = defaults.get(key, dataclasses.MISSING)
            if value is None:
                assert (key, filled[key], type(filled[key])) == (key, default, type(default))
            else:
                assert value != default, f"{path}: {key}"


def test_only_a_key_without_a_value_is_filled_and_only_of_ours() -> None:
    node = {"_target_": "fedlora.clients.LocalTraining", "lr": "${model.lr}", "clip": None, "steps": None}
    node["optimizer"] = {"_target_": "torch.optim.AdamW", "eps": None}
    assert class_fields.filled(node) == {**node, "clip": 1.0}
    private = {"_target_": "fedlora.privacy.DPSGD", "epsilon": None, "public_counts": None}
    assert class_fields.filled([private]) == [{**private, "epsilon": 8.0, "public_counts": True}]
    loader = {"_target_": "fedlora.data.files.load", "test": None}
    assert class_fields.filled(loader) == loader


@names
def test_keys_of_a_group_are_the_same_in_all_its_files(path: Path) -> None:
    """So that an override works whichever choice is made."""
    if path.parent.name != "model":
        return
    keys = [set(yaml.safe_load(p.read_text(encoding="utf-8"))) for p in path.parent.glob("*.yaml")]
    assert all(found == keys[0] for found in keys)


@pytest.mark.slow
def test_every_strategy_has_a_config_with_all_its_hyper_parameters() -> None:
    stems = {*choices()["strategy"]}
    assert stems >= {name.lower() for name in fedlora.strategies.__all__}
    for stem in stems - {name.lower() for name in fedlora.strategies.__all__}:
        # A published algorithm that is one of ours with another client or with privacy.
        target = compose([f"strategy={stem}"]).strategy._target_
        assert target.removeprefix("fedlora.strategies.") in fedlora.strategies.__all__, stem
    for name in fedlora.strategies.__all__:
        made = compose([f"strategy={name.lower()}"]).strategy
        cls = getattr(fedlora.strategies, name)
        assert get_object(made._target_) is cls
        assert {field.name for field in dataclasses.fields(cls)} == set(made) - {"_target_"}, name


@pytest.mark.slow
def test_a_strategy_finds_the_client_that_it_needs() -> None:
    for name in fedlora.strategies.__all__:
        needed = getattr(fedlora.strategies, name).client or "LocalTraining"
        assert needed in compose([f"strategy={name.lower()}"]).client._target_.split("."), name


@names
def test_help_explains_every_key_of_every_choice(path: Path) -> None:
    """By the comments of the YAML files, each shown beside its key and default."""
    from fedlora.config.explain import explained

    if path.parent.name == "experiment":
        return
    _, _, shown = explained(choice(path)).partition("\nKeys, ")
    keys = [line for line in shown.splitlines() if re.match(r"  [\w.]+=", line)]
    assert len(keys) > 60
    assert [line for line in keys if len(re.split(r" {2,}", line.strip(), maxsplit=1)) < 2] == []
