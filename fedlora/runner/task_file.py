"""What a run learns, kept in its folder, so that it can be read without its rows and its strategy's code."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from fedlora.data import Dataset, Kind
from fedlora.errors import CheckpointError
from fedlora.models import Base, load
from fedlora.runner.assemble import Assembly
from fedlora.runner.load_data import HELD_OUT, load_dataset
from fedlora.runner.load_models import load_base
from fedlora.storage.run_folder import RunFolder

FILE = "task.json"
FILES = "fedlora.data.files.load"


@dataclass(frozen=True)
class TaskFile:
    """What is learnt, and from which base.

    Args:
        kind: classification or instruction.
        labels: of a classification, in the order of the logits.
        base: the folder or hub name that the base was loaded from.
        ranks: the clients', in their order.
        strategy: the name of the strategy's class.
        personal: whether the result is a model for each client, and none for all.
    """

    kind: Kind
    labels: tuple[str, ...]
    base: str
    ranks: tuple[int, ...]
    strategy: str
    personal: bool

    @classmethod
    def of(cls, job: Assembly) -> "TaskFile":
        """What a job learns."""
        path = Path(job.base.path)
        return cls(
            job.dataset.kind,
            tuple(job.dataset.labels),
            str(path.absolute()) if path.is_dir() else job.base.path,
            tuple(job.ranks),
            type(job.strategy).__name__,
            job.strategy.personal,
        )

    @classmethod
    def read(cls, run: Path) -> "TaskFile":
        """What a run learnt, by its folder.

        Raises:
            CheckpointError: the file is missing or broken.
        """
        try:
            found = json.loads((run / FILE).read_text("utf-8"))
            return cls(**found | {name: tuple(found[name]) for name in ("labels", "ranks")})
        except FileNotFoundError as error:
            raise CheckpointError(
                f"'{run}' has no {FILE}, which says what was learnt: it is no run, or one of an older fedlora"
            ) from error
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"'{run / FILE}' is damaged: {error}") from error

    def write(self, folder: RunFolder) -> None:
        """Write it into a run's folder."""
        folder.write_json(FILE, asdict(self))

    def load_base(self, config: DictConfig, loader: Callable[..., Base] = load) -> Base:
        """The base model, from where the run had it if that is still there, else as its settings say."""
        if Path(self.base).is_dir():
            config = OmegaConf.merge(config, {"model": {"path": self.base}})  # type: ignore[assignment]
        return load_base(config, Dataset("", self.kind, (), (), self.labels), loader)

    def tested(self, config: DictConfig) -> Dataset:
        """The rows that the run was evaluated on; training rows are read only if these were cut from them."""
        source = config.data.source
        if config.evaluate.rows == "test" and source.get("_target_") == FILES and source.test is not None:
            names = ("test", "text", "label", "prompt", "response", "quotes")
            held = {
                "_target_": HELD_OUT,
                "labels": list(self.labels),
                **{name: source.get(name) for name in names},
            }
            config = config.copy()
            config.data.source = held
        return load_dataset(config)
