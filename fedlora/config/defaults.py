"""The settings of `fedlora run` without any words, for reports to say what is different."""

from functools import cache
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fedlora.config import composition


@cache
def defaults() -> dict[str, Any]:
    """Every key with its default, references resolved."""
    # In a job of a sweep Hydra stands at that job, and does not compose a second time.
    held, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        return cast("dict[str, Any]", OmegaConf.to_container(composition.compose([])))
    finally:
        GlobalHydra.instance().hydra = held
