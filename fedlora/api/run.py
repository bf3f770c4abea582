"""A run that has finished, or that lies in a folder, as an object."""

import html
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fedlora.config.instantiate import Trust, read
from fedlora.config.resume import with_rounds
from fedlora.config.translate import kept_spec, plain, run_spec
from fedlora.core.adapter import Adapter
from fedlora.core.messages import State, Task
from fedlora.errors import CheckpointError, ConfigError
from fedlora.models import Base, load
from fedlora.report import read_run, write_report
from fedlora.report.progress import Progress, read_progress
from fedlora.runner.spec import RunSpec
from fedlora.runner.task_file import TaskFile
from fedlora.saved_runs.export import export, verify
from fedlora.storage.run_folder import RunFolder
from fedlora.training.evaluation import predictions
from fedlora.training.generation import LONGEST, answer

from .given import given_objects
from .scratch import Scratch

PARTS = (
    "strategy",
    "client",
    "lora",
    "privacy",
    "robust",
    "rule",
    "steps",
    "compression",
    "server",
    "scheduler",
    "engine",
    "model",
    "data",
)


class Run:
    """One run: its numbers, its adapter, its model, and what can be done with them.

    Args:
        path: the run's folder.
        kept: a temporary folder that is removed with this object; None for a folder of the user's.
        given: parts of the run that its config.yaml cannot name, by the names of `PARTS`.
        trust: which modules of the user's own its config.yaml may name.
    """

    def __init__(
        self,
        path: str | Path,
        kept: Scratch | None = None,
        given: dict[str, Any] | None = None,
        trust: Trust | None = None,
    ) -> None:
        self.path = Path(path)
        self._kept, self._given, self._trust = kept, given or {}, trust or Trust()
        read(self.path, self._trust)  # says at once what is wrong with the folder

    def __repr__(self) -> str:
        """One line: what ran, and what it has come to."""
        folder = RunFolder(self.path)
        if not folder.finished:
            done = len(folder.rounds())
            return f"Run({str(self.path)!r}, unfinished: {done} of {self.config['rounds']} rounds)"
        found = self.summary
        score = found.get(found["metric"])
        score_text = "" if score is None else f", {found['metric']} {score:.3f}"
        where = "in memory" if self._kept else repr(str(self.path))
        return f"Run({where}, {found['strategy']}, {found['model']} on {found['data']}{score_text})"

    def _repr_html_(self) -> str:
        """A table of the rounds and the curve of the headline metric, for a notebook."""
        from fedlora.report.notebook import notebook_html

        if not RunFolder(self.path).finished:
            return f"<p>{html.escape(repr(self))}</p>"
        return notebook_html(read_run(self.path), repr(self))

    @property
    def config(self) -> dict[str, Any]:
        """The run's settings, the content of config.yaml."""
        found: dict[str, Any] = plain(read(self.path, self._trust))
        return found

    @cached_property
    def spec(self) -> RunSpec:
        """The run's description.

        Raises:
            ConfigError: a part that no configuration can name, and that was not given.
        """
        return run_spec(read(self.path, self._trust), self._given)

    @cached_property
    def _read(self) -> RunSpec:
        """The part of the description that is needed to read what the run has left."""
        return kept_spec(read(self.path, self._trust), self._given)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json.

        Raises:
            CheckpointError: the run has not finished.
        """
        return read_run(self.path).summary

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """A dict a round, the content of metrics.jsonl; a frame: pandas.DataFrame(run.metrics)."""
        return RunFolder(self.path).rounds()

    @property
    def clients(self) -> list[dict[str, Any]]:
        """A dict a client a round, the content of clients.jsonl."""
        return RunFolder(self.path).clients()

    @property
    def progress(self) -> Progress:
        """How far the run is, while another process may be at work on it: what `fedlora watch` shows."""
        return read_progress(self.path)

    @property
    def state(self) -> State:
        """The state that the run has come to: after its last round, or after the one that was selected."""
        return RunFolder(self.path).result()[1]

    @property
    def adapter(self) -> Adapter:
        """The global adapter: low-rank pairs by module, and the head's tensors."""
        return self.state.whole()

    @cached_property
    def task(self) -> TaskFile:
        """What was learnt: the name of the task, the labels and the base."""
        return TaskFile.read(self.path)

    def base(self, plain: bool = False) -> Base:
        """The base model, loaded anew; `plain` leaves it as transformers makes it."""
        return self.task.load_base(self._read, partial(load, plain=plain))

    def model(self) -> Any:
        """The base with the adapter in it, as a PeftModel.

        Raises:
            ConfigError: the run has no global adapter.
        """
        from fedlora.models import by_peft

        if not (self.path / "adapter").is_dir():
            raise ConfigError(
                "model: this run has no global adapter: it has not finished, or its strategy is personal, or "
                "it trained the head alone"
            )
        return by_peft(self.base(plain=True), self.path / "adapter").model

    def predict(self, texts: Sequence[str], longest: int = LONGEST) -> list[Any]:
        """The label of each text, the response to each prompt, or what another task says of a text.

        Args:
            texts: texts or prompts.
            longest: tokens of a response at most.

        Raises:
            ConfigError: the strategy is personal, so that there is no one model.
        """
        if self.task.personal:
            raise ConfigError(
                f"predict: the result of {self.task.strategy} is a model for each client; export one with "
                "fedlora export --client N"
            )
        if isinstance(texts, str):
            raise ConfigError("predict: expected a list of texts, got one text; put it into a list")
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise ConfigError(f"predict: expected texts, got {text!r:.60} at position {at}")
        base, state = self.base(), self.state
        examples = base.task.encode_sources(texts, base.tokenizer, self._read.data.max_length)
        task = Task(state.adapter, base_delta=state.base_delta)
        if base.task.generates:
            return [said.strip() for said in answer(base, task, examples, longest=longest)]
        return predictions(base, task, examples, self.task.labels)

    def save(self, to: str | Path, merge: bool = False) -> Path:
        """Write the adapter in PEFT's form, or the whole model with it merged, into a new folder.

        Raises:
            FedLoraError: the folder is there already, or there is no global adapter.
        """
        export(self.path, Path(to), merge, self._trust, self._read)
        return Path(to)

    def keep(self, to: str | Path) -> "Run":
        """Copy the whole run into a folder, so that it can be resumed and reported; the run there."""
        if Path(to).exists():
            raise ConfigError(f"keep: '{to}' is there already; name a new folder")
        shutil.copytree(self.path, to)
        return Run(to, given=self._given, trust=self._trust)

    def report(self, to: str | Path | None = None) -> Path:
        """Write the run's HTML page; into its own folder if no place is named."""
        path = Path(to) if to is not None else self.path / "report.html"
        return write_report([read_run(self.path)], path)

    def verify(self) -> str:
        """Check that plain PEFT gives the run's logits and accuracy.

        Raises:
            CheckpointError: a hash, a logit or the accuracy differs.
        """
        return verify(self.path, self._trust, self._read)

    def resume(self, rounds: int | None = None, progress: bool = True, **given: Any) -> "Run":
        """Go on with the run, with more rounds if a number is given.

        Args:
            rounds: in all.
            progress: whether to show a table of the rounds.
            given: parts that config.yaml cannot name, such as strategy=MyStrategy() or data=rows with what
                belongs to the rows, in the forms that `simulate` takes; and callbacks.

        Raises:
            FedLoraError: the run is finished, something of it has changed, or config.yaml names a given part.
        """
        from .simulate import carry_out

        found = read(self.path, self._trust)
        parts = self._given | given_objects(plain(found), given, "resume")
        config = with_rounds(found, self.path, rounds, parts)
        spec = run_spec(config, parts)
        if rounds is not None and spec.settings == "":
            raise CheckpointError("resume: the run has no settings to go on with")
        carry_out(replace(spec), self.path, True, progress)
        return Run(self.path, self._kept, parts, self._trust)


def open_run(path: str | Path, allow: Sequence[str] = (), **given: Any) -> Run:
    """The run in a folder, finished or not.

    Args:
        path: the folder.
        allow: modules of your own that its config.yaml may name.
        given: parts that its config.yaml cannot name, such as strategy=MyStrategy() or data=rows with what
            belongs to the rows, in the forms that `simulate` takes; and callbacks.

    Raises:
        CheckpointError: the folder holds no run.
        ConfigError: config.yaml names a given part.
    """
    trust = Trust(tuple(allow))
    return Run(path, given=given_objects(plain(read(Path(path), trust)), given, "open"), trust=trust)
