"""The tracker that a run asks for.

By name and not by `_target_`: a kept configuration, which may come from anyone, brings no code that sends
numbers anywhere.
"""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlora.callbacks.console import Display
from fedlora.callbacks.trackers import CSV, MLflow, TensorBoard, Tracked, WandB
from fedlora.errors import ConfigError
from fedlora.storage.run_folder import RunFolder

TRACKERS: dict[str, Any] = {"csv": CSV, "tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def check(config: DictConfig) -> None:
    """Refuse a tracker that there is none of, and settings that it does not have.

    Raises:
        ConfigError: says which there are.
    """
    _made(config)


def tracked(config: DictConfig, folder: RunFolder, display: Display) -> Tracked | None:
    """The display with the run's tracker behind it; None without one."""
    tracker = _made(config)
    if tracker is None:
        return None
    settings: Any = OmegaConf.to_container(config, resolve=True)
    return Tracked(display, tracker, folder, settings, bool(config.track.get("clients")))


def _made(config: DictConfig) -> Any:
    track = dict(config.get("track") or {"name": "none"})
    name = track["name"]
    if name == "none":
        return None
    if name not in TRACKERS:
        raise ConfigError(f"track: expected none, {', '.join(TRACKERS)}, got '{name}'")
    given = {key: value for key, value in track.items() if key not in ("name", "clients")}
    try:
        return TRACKERS[name](**given)
    except TypeError as error:
        raise ConfigError(f"track: {' '.join(str(error).split())}") from error
