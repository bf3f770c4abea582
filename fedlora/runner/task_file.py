"""What a run learns, kept in its folder, so that it can be read without its rows and its strategy's code."""

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedlora.data import Dataset
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base, load
from fedlora.runner.assemble import Assembly
from fedlora.runner.load_data import load_dataset
from fedlora.runner.load_models import load_base
from fedlora.runner.spec import RunSpec
from fedlora.storage.run_folder import RunFolder
from fedlora.tasks import TASKS, LearningTask, learning_task

FILE = "task.json"


@dataclass(frozen=True)
class TaskFile:
    """What is learnt, and from which base.

    Args:
        kind: the name of the learning task.
        labels: the names of the model's outputs, in their order.
        base: the folder or hub name that the base was loaded from.
        ranks: the clients', in their order.
        strategy: the name of the strategy's class.
        personal: whether the result is a model for each client, and none for all.
    """

    kind: str
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
            job.dataset.task.name,
            tuple(job.dataset.labels),
            str(path.absolute()) if path.is_dir() else job.base.path,
            tuple(job.ranks),
            type(job.spec.strategy).__name__,
            job.spec.strategy.personal,
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

    def task(self, spec: RunSpec) -> LearningTask:
        """The learning task.

        Args:
            spec: the run's description, which has the task if it is the user's own.

        Raises:
            ConfigError: the task is the user's own, and was not given.
        """
        own = spec.data.task
        if own is not None and own.name == self.kind:
            return own
        if self.kind not in {task.name for task in TASKS}:
            raise ConfigError(
                f"this run was started from Python with objects that no configuration can name (data): its "
                f"task '{self.kind}' is the user's own; read it with fedlora.open(DIR, data=..., task=...)"
            )
        return learning_task(self.kind)

    def write(self, folder: RunFolder) -> None:
        """Write it into a run's folder."""
        folder.write_json(FILE, asdict(self))

    def load_base(self, spec: RunSpec, loader: Callable[..., Base] = load) -> Base:
        """The base model, from where the run had it if that is still there, else as its settings say."""
        model = replace(spec.model, path=self.base) if Path(self.base).is_dir() else spec.model
        if model.loaded is not None:  # the user's own object, and whoever merges an adapter changes the base
            model = replace(model, loaded=(deepcopy(model.loaded[0]), model.loaded[1]))
        return load_base(model, Dataset("", self.task(spec), (), (), self.labels), spec.seed, loader)

    def tested(self, spec: RunSpec) -> Dataset:
        """The rows that the run was evaluated on; training rows are read only if these were cut from them."""
        if spec.evaluate.rows == "test" and spec.data.tested is not None:
            return spec.data.tested(self.labels)
        return load_dataset(spec)
