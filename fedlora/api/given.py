"""What a caller gives for the parts of a run that its config.yaml could not name."""

from collections.abc import Mapping
from typing import Any

from fedlora.config.resume import check_given
from fedlora.errors import ConfigError
from fedlora.runner.spec_parts import DataSpec

from .parts import model_of, server_of, strategy_of
from .settings import OPTIONS, Settings

# What belongs to rows in memory, as `simulate` takes it.
ROWS = (
    "test",
    "text",
    "label",
    "prompt",
    "response",
    "client_column",
    "task",
    "columns",
    "labels",
    "test_rows",
    "partition",
)


def given_objects(config: Mapping[str, Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The parts of a run as a caller gives them, in the forms that `simulate` takes.

    Args:
        config: the run's own, which says how its rows were dealt and cut.
        given: by the names of `PARTS`; beside `data` the arguments of `simulate` that belong to rows.
        where: the call that they were given to, for messages.

    Raises:
        FedLoraError: a part that the configuration names, or one that cannot be.
    """
    words = {name: given[name] for name in ROWS if name in given}
    parts = {name: part for name, part in given.items() if name not in words}
    check_given(config, parts, where)
    if words and "data" not in parts:
        raise ConfigError(f"{where}: {', '.join(words)} belong to rows; give data=... as well, or neither")
    if "model" in parts:
        parts["model"], _ = model_of(parts["model"])
    if "strategy" in parts:
        parts["strategy"] = strategy_of(parts["strategy"])
    if "server" in parts:
        parts["server"] = server_of(parts["server"])
    if "data" in parts and not isinstance(parts["data"], DataSpec):
        parts["data"] = _rows(config, parts["data"], words, where)
    return parts


def _rows(config: Mapping[str, Any], data: Any, words: dict[str, Any], where: str) -> DataSpec:
    """Rows in memory, dealt and cut as the run had them."""
    options = {name: config["data"][name] for name in OPTIONS if name in config["data"]}
    how = options.pop("partition", "iid")
    if how in ("iid", "dirichlet", "shards", "natural"):
        words = {"partition": how} | words
    elif "partition" not in words:
        raise ConfigError(f"{where}: the rows of this run were dealt by '{how}'; give partition={how} too")
    spec, _ = Settings(data=data, seed=config["seed"], data_options=options, **words).data_spec()
    return spec
