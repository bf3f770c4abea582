"""A run that goes on: its own settings, with more rounds if the user says so."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import Privacy
from fedlora.runner.privacy_checks import check_more_rounds
from fedlora.storage.run_folder import RunFolder

from .instantiate import Trust, named, read
from .translate import check_lacking


def continued(path: Path, overrides: Sequence[str]) -> DictConfig:
    """The configuration to resume a run with: its own, with more rounds if `rounds=N` says so.

    A run of engine=ray may go on at another `engine.address`, which changes nothing of its result.

    Raises:
        CheckpointError: the folder holds no run, or one that is finished.
        ConfigError: an override that would make it another run.
    """
    trust, overrides = Trust.said(overrides)
    config, rounds = read(path, trust), None
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "resume":
            continue
        if key == "engine.address" and "address" in config.engine:  # a cluster may have moved
            config.engine.address = None if value == "null" else value
            continue
        if key != "rounds" or not value.isdigit():
            raise ConfigError(f"resume: only rounds=N can change when a run is continued, got '{override}'")
        rounds = int(value)
    return with_rounds(config, path, rounds)


def check_given(config: Mapping[str, Any], given: Collection[str], where: str) -> None:
    """Refuse objects in the place of what a run's configuration names, which would make it another run.

    Args:
        config: the run's own.
        given: the names of the parts that the user gave as objects.
        where: the call that they were given to, for the message.

    Raises:
        ConfigError: a part that the configuration names, or no part at all.
    """
    open_to = [*(config.get("from_python") or ()), "callbacks"]
    if wrong := sorted({*given} - {*open_to}):
        raise ConfigError(
            f"{where}: expected only what config.yaml does not name ({', '.join(open_to)}), got "
            f"{', '.join(wrong)}; a run keeps its own settings, so start a new run to change them"
        )


def with_rounds(
    config: DictConfig, path: Path, rounds: int | None, given: Mapping[str, Any] | None = None
) -> DictConfig:
    """The configuration of a run to be continued, with so many rounds; None leaves them.

    Args:
        config: the run's own.
        path: its folder.
        rounds: in all.
        given: parts of it as objects, by their names.

    Raises:
        CheckpointError: the run is finished.
        ConfigError: fewer rounds than are done, or more than its noise is for.
    """
    if rounds is not None:
        parts = given or {}
        check_lacking(config, parts)
        privacy = parts["privacy"] if "privacy" in parts else named(config, "privacy", Privacy)
        privacy = privacy and privacy.for_rounds(config.rounds)  # an object may leave it to the run
        check_more_rounds(privacy, config.rounds, rounds)
        config.rounds = rounds
    folder = RunFolder(path)
    last = folder.rounds()[-1:]
    if last and last[0]["round"] > config.rounds:
        raise ConfigError(f"resume: rounds={config.rounds}, but {last[0]['round']} are done")
    if folder.finished and last and last[0]["round"] >= config.rounds:
        raise CheckpointError(
            f"resume: '{path}' has finished its {config.rounds} rounds; say rounds=N to add some"
        )
    config.resume = str(path)
    return config
