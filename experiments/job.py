"""One run from a configuration to its folder: rounds, adapter, summary, report."""

import datetime
import hashlib
import platform
import resource
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import fedlora
from fedlora.engine import Central, Federation, InProcessGrid, Progress, Roster, RunFolder, megabytes
from fedlora.errors import CheckpointError, ConfigError, FedLoraError
from fedlora.models import save_adapter
from fedlora.privacy import ClientLevel
from fedlora.protocol import State

from . import private
from .build import Job, build, fuse_of


def run_job(config: DictConfig, console: Console) -> Path:
    """Run a new federation, or what is left of an old one, and write its folder.

    Args:
        config: composed, every reference resolved.
        console: where to show progress.

    Returns:
        The run's folder.
    """
    began = time.perf_counter()
    resumed = config.resume is not None
    path = Path(config.resume) if resumed else _out(config)
    if not resumed and (path / "config.yaml").exists():
        RunFolder.create(path, "")  # says what is there, before anything is loaded
    job = build(config)
    if resumed:
        folder = RunFolder(path)
        if not folder.started:  # killed before its first checkpoint
            folder.save_state(0, job.start)
        done, state = folder.load_state()
        (path / "summary.json").unlink(missing_ok=True)
        folder.write_config(_yaml(config))
    else:
        folder = RunFolder.create(path, _yaml(config))
        done, state = 0, job.start
        folder.save_state(0, state)
    initial = {}
    if config.evaluate.every:
        initial = job.named(*job.evaluate([job.initial()])[0])
    startup = time.perf_counter() - began
    console.print(_opening(job, config, path, done), soft_wrap=True, highlight=False, markup=False)
    private.check_ledgers(job.privacy, folder)
    central = _central(job, folder)
    with Progress(config.rounds, done, job.metric, console, job.privacy is not None) as progress:
        federation = Federation(
            job.strategy,
            state,
            Roster(job.peer, max(job.ranks), progress.warn),
            job.rules,
            job.evaluate,
            job.named,
            folder,
            progress,
            done,
            partial(_spent, job, folder),
            central,
        )
        site = replace(job.site, memory=folder.memory)
        grid = InProcessGrid(site, job.nodes(), fuse_of(config.engine.fuse), progress.advance)
        federation.run(grid)
        own = federation.last_look(grid)
    if not central and not any(line["clients"] for line in folder.rounds()):
        raise FedLoraError(
            f"no client sent a good update in any round; the reasons are in {path}/clients.jsonl"
        )
    _finish(job, config, folder, federation.state, initial, startup, own)
    return path


def continued(path: Path, overrides: list[str]) -> DictConfig:
    """The configuration to resume a run with: its own, with more rounds if `rounds=N` says so.

    Raises:
        CheckpointError: the folder holds no run, or one that is finished.
        ConfigError: an override that would make it another run.
    """
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"resume: expected a run's folder, '{path}' has no config.yaml")
    config = OmegaConf.load(path / "config.yaml")
    assert isinstance(config, DictConfig)
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "resume":
            continue
        if key != "rounds" or not value.isdigit():
            raise ConfigError(f"resume: only rounds=N can change when a run is continued, got '{override}'")
        private.more_rounds(config, int(value))
        config.rounds = int(value)
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


def _yaml(config: DictConfig) -> str:
    """The configuration as it is kept: a run that was continued is the same run."""
    return OmegaConf.to_yaml(OmegaConf.merge(config, {"resume": None}))


def _out(config: DictConfig) -> Path:
    if config.out is not None:
        return Path(config.out)
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    return Path("runs") / f"{_name(config)}-{stamp}"


def _central(job: Job, folder: RunFolder) -> Central | None:
    """The server's mechanism, where whole clients are protected."""
    if not isinstance(job.privacy, ClientLevel):
        return None
    return Central(job.privacy, job.plans[0], folder.ledger, job.peer(0, max(job.ranks)))


def _spent(job: Job, folder: RunFolder) -> dict[str, Any]:
    """What privacy has cost so far, for the line of a round; nothing to say without any."""
    return {} if job.privacy is None else private.spent(job.privacy, folder.ledgers().values())


def _name(config: DictConfig) -> str:
    return str(config.strategy["_target_"]).rsplit(".", 1)[-1].lower()


def _model(config: DictConfig) -> str:
    """The name of the model, or those of several."""
    return ", ".join(map(str, config.models)) if config.models else str(config.model.name)


def _opening(job: Job, config: DictConfig, path: Path, done: int) -> str:
    """What is about to happen, in two lines."""
    ranks = ", ".join(map(str, sorted(set(job.ranks))))
    sizes = [len(part.rows) for part in job.parts]
    goes = (
        f"rounds {done + 1} to {config.rounds}"
        if done
        else f"{config.rounds} round{'s' * (config.rounds > 1)}"
    )
    who = f"{len(job.parts)} clients of {min(sizes)} to {max(sizes)} rows"
    what = f"{type(job.strategy).__name__}: {_model(config)} on {config.data.name}"
    lines = [f"{what}, {who}, rank {ranks}, {goes}", f"-> {path}"]
    if job.privacy is not None:
        lines.insert(1, private.opening(job.privacy, job.plans))
    if job.rules.secure_sum:
        lines.insert(1, "secure_sum: clients send under masks, the server sees their weighted sum alone")
    return "\n".join(lines)


def _finish(
    job: Job,
    config: DictConfig,
    folder: RunFolder,
    state: State,
    initial: dict[str, float],
    startup: float,
    own: dict[int, dict[str, float]],
) -> None:
    """Write the adapter, the summary and the report."""
    digest = None
    whole = state.whole()
    if whole.pairs and not job.strategy.personal:  # a personal one's adapter is only a part of a model
        made = folder.write("adapter", lambda to: save_adapter(whole, job.base, to))
        digest = hashlib.sha256((made / "adapter_model.safetensors").read_bytes()).hexdigest()
    rounds = folder.rounds()
    evaluated = [line for line in rounds if "loss" in line]
    last = evaluated[-1] if evaluated else {}
    names = ("accuracy", "loss", "perplexity", "token_accuracy", "aggregation_error")
    told = [found for found in own.values() if found.keys() >= {"local_accuracy", "local_loss"}]
    ends = {n: fmean(found[n] for found in told) for n in ("local_accuracy", "local_loss") if told}
    if job.strategy.personal and told:
        ends |= job.named(ends["local_loss"], ends["local_accuracy"])
    privacy: dict[str, Any] = {}
    if job.privacy is not None:
        privacy = private.summary(job.privacy, folder.ledgers(), job.rules.secure_sum)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    summary = {
        "strategy": _name(config),
        "model": _model(config),
        "data": config.data.name,
        "metric": job.metric,
        **{name: last[name] for name in names if name in last},
        **ends,
        "initial": initial,
        "majority": job.majority(),
        "rounds": config.rounds,
        "clients": len(job.parts),
        "ranks": sorted(set(job.ranks)),
        "seed": config.seed,
        "bytes_down": sum(line["bytes_down"] for line in rounds),
        "bytes_up": sum(line["bytes_up"] for line in rounds),
        "dropped": sum(line["dropped"] for line in rounds),
        "startup_seconds": startup,
        "wall_seconds": startup + sum(line["seconds"] for line in rounds),
        "peak_memory_mb": round(peak),
        "adapter_sha256": digest,
        **({"own": own} if own else {}),
        **privacy,
        "versions": {
            "fedlora": fedlora.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "flwr")},
        },
    }
    folder.write_json("summary.json", summary)
    from fedlora.report import read_run, write_report

    write_report([read_run(folder.path)], folder.path / "report.html")


def closing(path: Path) -> str:
    """The result of a finished run and where it lies, for the terminal."""
    from fedlora.report import read_run

    run = read_run(path)
    best = run.summary.get(run.metric)
    said = f"{run.metric} {best:.3f}, " if best is not None else ""
    sent = f"{megabytes(run.summary['bytes_down'])} down, {megabytes(run.summary['bytes_up'])} up"
    lines = [f"{said}{sent}, {run.summary['wall_seconds']:.0f} s"]
    if "ledger" in run.summary:
        lines.append(private.closing(run.summary))
    for what, name in (("adapter", "adapter"), ("metrics", "metrics.jsonl"), ("report", "report.html")):
        if (path / name).exists():
            lines.append(f"{what:8} {path / name}")
    return "\n".join(lines)
