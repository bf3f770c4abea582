"""The server of a deployment, as Flower's SuperLink starts it: the same run over sites on other machines."""

import os
import shutil
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from flwr.serverapp import Grid
from omegaconf import DictConfig, OmegaConf

from fedlora.callbacks.remote import ProgressSender, files_of
from fedlora.config.instantiate import differences
from fedlora.config.translate import run_spec
from fedlora.core.messages import Peer
from fedlora.data import Dataset
from fedlora.deploy.engine import Deployment
from fedlora.deploy.known_sites import registered
from fedlora.deploy.site_config import Invitation, check_name
from fedlora.deploy.superlink import NOTE
from fedlora.engines.polling import PollingGrid
from fedlora.errors import ConfigError, FedLoraError
from fedlora.models import Base
from fedlora.rounds.registry import ClientRegistry
from fedlora.runner.assemble import assemble
from fedlora.runner.assign_ranks import assign_ranks
from fedlora.runner.load_data import load_dataset
from fedlora.runner.load_models import trained_heads
from fedlora.runner.results import ANSWERS
from fedlora.runner.session import Session, Sites
from fedlora.runner.spec import RunSpec
from fedlora.runner.task_file import FILE as LEARNT
from fedlora.storage.run_folder import RunFolder

LEDGER = "checkpoint/ledger.json"  # of client-level privacy
BROUGHT = (
    LEARNT,
    "metrics.jsonl",
    "clients.jsonl",
    "data.json",
    "summary.json",
    "adapter",
    ANSWERS,
    "report.html",
    LEDGER,
)
MAY_CHANGE = ("out", "resume", "rounds", "engine")  # of a run that goes on
SOON = 5.0  # seconds that a check waits for sites that are not connected
LARGEST = 64 * 2**20  # bytes of files that go through the log; larger ones stay with the server


def serve(grid: Grid, given: Mapping[str, str]) -> None:
    """Run, or look over, a federation, and tell its user through the log.

    Args:
        grid: how the SuperLink reaches the sites.
        given: "config", the composed configuration as YAML, and "verb", run or check.
    """
    teller = ProgressSender()
    try:
        config = OmegaConf.create(given["config"])
        assert isinstance(config, DictConfig)
        check_name(str(config.engine.experiment))
        if given["verb"] == "check":
            _check(config, grid, teller)
        else:
            _run(config, grid, teller)
    except FedLoraError as error:
        teller.tell("error", str(error), 2)
        raise
    except Exception as error:
        teller.tell("error", f"unexpected {type(error).__name__} at the server: {error}", 1)
        teller.tell("trace", traceback.format_exc())
        raise


def state_folder() -> Path:
    """Where this server keeps its runs."""
    return Path(os.environ.get("FEDLORA_STATE", "~/.local/state/fedlora")).expanduser()


def _run(config: DictConfig, grid: Grid, teller: ProgressSender) -> None:
    path, spec = state_folder() / str(config.engine.experiment), run_spec(config)
    resumed = (path / "config.yaml").exists()  # the server was stopped in this run before
    if resumed and (differ := differences(spec.settings, path, MAY_CHANGE)):
        raise ConfigError(
            f"engine.experiment: '{path.name}' is another run on this server, whose {', '.join(differ)} "
            "differ; give this one a name of its own"
        )
    session = Session.begin(spec, path, resumed, [teller])
    with session.held, _nothing_left(resumed, session.folder):
        private = spec.privacy is not None
        teller.tell("opening", session.opening(), session.done, session.assembly.metric, private)
        session.folder.write_json(NOTE, {"run": grid.run.run_id})  # so that `deploy status` finds it
        polling = PollingGrid(grid, session.enough, done=session.advance, late=session.warn)
        invitation = _invitation(spec, session.assembly.base, session.assembly.dataset)
        session.run(polling, Sites(invitation.record(), registered()))
    _bring(session.folder, teller)


@contextmanager
def _nothing_left(resumed: bool, folder: RunFolder) -> Iterator[None]:
    """Remove a new run's folder if no round of it has come to an end: there is nothing to go on with."""
    try:
        yield
    except FedLoraError:
        if not resumed and not folder.rounds():
            shutil.rmtree(folder.path)
        raise


def _bring(folder: RunFolder, teller: ProgressSender) -> None:
    """Send the files of a finished run to whoever follows it."""
    names = [*BROUGHT, *(str(file.relative_to(folder.path)) for file in folder.result_files)]
    if (size := sum(file.stat().st_size for file in files_of(folder.path, names))) > LARGEST:
        teller.tell(
            "warn",
            f"{size / 1e6:.0f} MB are too much for the log; adapter and checkpoint stay in {folder.path}",
        )
        names = [name for name in BROUGHT if name != "adapter"]
    teller.bring(folder.path, names)
    teller.tell("done")


def _invitation(spec: RunSpec, base: Base | None, dataset: Dataset) -> Invitation:
    """What a node is told of a run; without a base it is not asked about its model."""
    model = "" if base is None else base.fingerprint(trained_heads(spec.lora, base))
    assert isinstance(spec.engine, Deployment)
    return Invitation(str(spec.engine.experiment), dataset.task.name, dataset.labels, model)


def _refused_early(spec: RunSpec, grid: Grid, teller: ProgressSender) -> set[int]:
    """The nodes whose settings or rows do not suit the run, which they say before anyone loads a model.

    Raises:
        FedLoraError: no node could take part, or the run's own settings cannot work.
    """
    clients = spec.clients or 1  # without a number `assemble` refuses the run
    registry = ClientRegistry(
        Peer,
        max(assign_ranks(spec.ranks, clients, spec.seed)),
        lambda text: teller.tell("refused", text),
        _invitation(spec, None, load_dataset(spec)).record(),
        registered(),
        spec.strategy.mixed_ranks,
    )
    registry.gather(PollingGrid(grid, int, poll=0.1), clients, min(spec.engine.wait, SOON))
    return registry.refused


def _check(config: DictConfig, grid: Grid, teller: ProgressSender) -> None:
    """Meet every site, and tell what each says of itself: first without the model, which is slow to load."""
    spec = run_spec(config)
    refused = _refused_early(spec, grid, teller)
    made = assemble(spec)
    registry = ClientRegistry(
        made.peer,
        max(made.ranks),
        lambda text: teller.tell("refused", text),
        _invitation(spec, made.base, made.dataset).record(),
        registered(),
        spec.strategy.mixed_ranks,
    )
    registry.refused |= refused  # they have said why
    patient = PollingGrid(grid, made.rules.enough)
    there = registry.gather(patient, made.rules.clients, min(spec.engine.wait, SOON))
    for node in there:
        said, heard = registry.profiles[node], registry.heard[node]
        more = {"ahead": float(str(said["clock"])) - heard, "server_torch": str(torch.__version__)}
        more["name"] = registry.peers[node].called
        teller.tell("site", {name: value for name, value in said.items() if name != "clock"} | more)
    away = [name for name in registry.away(made.rules.clients) if len(there) < made.rules.clients]
    teller.tell("done", len(there), made.rules.clients, away)
