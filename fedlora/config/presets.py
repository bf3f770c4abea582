"""The packaged models and data sets, as the YAML files of the groups `model` and `data` describe them."""

from importlib import resources
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedlora.errors import ConfigError
from fedlora.runner.spec_parts import DataSpec, ModelSpec

from .translate import data_spec, model_spec, plain


def presets(group: str) -> list[str]:
    """The names in a group that are complete, such as minilm and trec."""
    folder = resources.files("fedlora.config.conf") / group
    found = {file.name.removesuffix(".yaml"): file.read_text("utf-8") for file in folder.iterdir()}
    return sorted(name for name, text in found.items() if "???" not in text and name != "__init__.py")


def preset(group: str, name: str, **around: Any) -> DictConfig:
    """A preset's settings under the key of its group, references resolved.

    Args:
        group: model or data.
        name: of the choice.
        around: keys outside of the group that its references name, such as seed, and keys in the group
            itself under the group's name, which replace the preset's.

    Raises:
        ConfigError: no such preset, or a key that it does not have.
    """
    if name not in presets(group) and name != "files":
        raise ConfigError(f"{group}: expected {', '.join(presets(group))}, a folder or a name, got '{name}'")
    text = (resources.files("fedlora.config.conf") / group / f"{name}.yaml").read_text("utf-8")
    own = around.pop(group, {})
    found = OmegaConf.merge({group: OmegaConf.create(text)}, {group: own}, around)
    assert isinstance(found, DictConfig)
    try:
        OmegaConf.resolve(found)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{group}={name}: {' '.join(str(error).split())}") from error
    return found


def model_preset(name: str, **own: Any) -> tuple[ModelSpec, dict[str, Any]]:
    """A packaged model, and its settings in plain values."""
    config = preset("model", name, model=own)
    return model_spec(config), plain(config.model)


def data_preset(name: str, seed: int, **own: Any) -> tuple[DataSpec, dict[str, Any]]:
    """A packaged data set, and its settings in plain values."""
    config = preset("data", name, data=own, seed=seed)
    return data_spec(config), plain(config.data)


def files_preset(seed: int, **own: Any) -> tuple[DataSpec, dict[str, Any]]:
    """Rows of files, and their settings in plain values."""
    config = preset("data", "files", data=own, seed=seed)
    return data_spec(config), plain(config.data)
