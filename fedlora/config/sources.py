"""Where Hydra finds the choices of a configuration: our YAML files, those of studies, and classes."""

from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from importlib import resources
from typing import Any

import hydra
from hydra._internal.core_plugins.importlib_resources_config_source import ImportlibResourcesConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from . import class_fields

_READ: dict[str, tuple[ConfigResult, Any]] = {}  # of our YAML files, which stay as they are in a process


class _Ours(ImportlibResourcesConfigSource):
    """Our YAML files, in which a key without a value has the default of its class."""

    @staticmethod
    def scheme() -> str:
        return "fedlora"

    def load_config(self, config_path: str) -> ConfigResult:
        if config_path not in _READ:
            found = super().load_config(config_path)
            _READ[config_path] = found, class_fields.filled(OmegaConf.to_container(found.config))
        found, whole = _READ[config_path]
        return replace(found, config=OmegaConf.create(whole))


class _Places(SearchPathPlugin):
    """Where YAML files lie: our own, and those of the studies, `experiment=NAME`, beside the studies."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.prepend("fedlora", "fedlora://fedlora.config.conf")  # before the same files as they are
        search_path.append("fedlora", "pkg://fedlora.experiments.conf")


def hydra_here() -> AbstractContextManager[Any]:
    """Hydra, while it stands at our configuration groups."""
    know_choices()
    return hydra.initialize_config_module("fedlora.config.conf", version_base="1.3")


def know_choices() -> None:
    """Tell Hydra of the choices that are no file of our own folder: studies, and most strategies."""
    Plugins.instance().register(_Ours)
    Plugins.instance().register(_Places)
    for name, choice in _without_a_file().items():
        ConfigStore.instance().store(group="strategy", name=name, node=choice.node)


@cache
def _without_a_file() -> dict[str, class_fields.Choice]:
    """The strategies that need no YAML file, by their names."""
    written = {file.name for file in (resources.files("fedlora.config.conf") / "strategy").iterdir()}
    return {n: choice for n, choice in class_fields.choices().items() if f"{n}.yaml" not in written}
