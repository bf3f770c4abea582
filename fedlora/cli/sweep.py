"""`fedlora run -m`: many runs under Hydra's sweepers and launchers, gone on with where a sweep was left.

A run's folder is named by what is swept, so that the same command finds what is done: finished runs are left
as they are, one that was cut off goes on from its checkpoint, one that failed is tried again. A failed run
stops no other.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from fedlora.cli.run_job import run_job
from fedlora.cli.sweep_job import Sweep
from fedlora.config import composition
from fedlora.config.instantiate import Trust
from fedlora.core.natural_order import natural
from fedlora.errors import CheckpointError, ConfigError
from fedlora.report.read import ERROR, SWEEP
from fedlora.runner.results import closing
from fedlora.storage.atomic import write_whole

# Flags of Hydra's that a value follows.
VALUED = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--cfg", "-c"}


def sweep(words: Sequence[str]) -> None:
    """Run what is missing of a sweep, and list what failed; then the exit code is 2.

    Args:
        words: the command line after `fedlora run`, flags included.

    Raises:
        ConfigError: a key or a choice that does not exist.
    """
    composition.register()
    trust, said = Trust.said(words)
    flags, said = _flags(said)
    folder, said = _placed([composition.opened(word) for word in said])
    composition.check_keys(said)
    pairs, jobs = _plan(said)
    last = {o.key_or_group: o for o in _parsed(said)}  # a key may be given twice
    constant = {key for key, override in last.items() if not override.is_sweep_override()}
    this = Sweep(folder.absolute(), tuple(pairs), trust, frozenset(constant))
    names = None if jobs is None else [this.name(job) for job in jobs]
    kept = {"words": [word for word in said if not _is_ours(word)], "jobs": names}
    if "resume" not in {word.partition("=")[0] for word in words}:
        _check_same(folder, kept)
    text = json.dumps(kept, indent=2) + "\n"
    write_whole(folder / SWEEP, lambda file: file.write_text(text, encoding="utf-8"))
    for stale in folder.glob(f"*/{ERROR}"):
        stale.unlink()
    before = len(_finished(folder, names))
    print(f"sweep -> {folder}" + (f", {len(names)} jobs, {before} finished before" if names else ""))
    _store(pairs)
    try:
        _launch([*flags, *said, *_over(pairs), *_quiet(said), f"hydra.sweep.dir='{this.folder}'"], this.run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; fedlora run -m resume={folder} goes on with what is missing"
        ) from None
    finally:
        ConfigStore.instance().repo.pop("pair", None)
        failed = _close(folder, names)
    if failed:
        raise SystemExit(2)


def hydra_s_own(words: Sequence[str]) -> None:
    """One run under Hydra's main, for flags of Hydra's such as --cfg."""
    composition.register()
    composition.check_keys(_flags(words)[1])
    trust, _ = Trust.said(words)

    def run(config: DictConfig, overrides: Sequence[str]) -> None:
        composition.resolve(config)
        print(closing(run_job(trust.into(config), Console())))

    _launch(words, run)


def _launch(words: Sequence[str], run: Callable[[DictConfig, Sequence[str]], Any]) -> None:
    """Give the command line to Hydra, which calls `run` for each job, in this process or in others."""

    def task(config: DictConfig) -> Any:
        composition.register()  # a process of a launcher's is new
        return run(config, HydraConfig.get().overrides.task)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here, and become one line
    sys.argv = ["fedlora run", *words]
    try:
        hydra.main("pkg://fedlora.config.conf", "config", version_base="1.3")(task)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composition.one_line(error)) from error


def _quiet(words: Sequence[str]) -> list[str]:
    """Hydra's own logs and folders, which would repeat ours; unless someone has asked for them."""
    off = {"hydra/hydra_logging": "disabled", "hydra/job_logging": "disabled"}
    asked = {word.partition("=")[0] for word in words}
    return [
        *(f"{key}={value}" for key, value in off.items() if key not in asked),
        "hydra.output_subdir=null",
        "hydra.sweep.subdir=.",
    ]


def _placed(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder of a sweep, and the words that say what runs in it."""
    keys = ("out", "resume", "hydra.sweep.dir")  # the last is Hydra's own word for the first
    said = {key: word for word in words for key in keys if word.startswith(f"{key}=")}
    words = [word for word in words if word not in said.values()]
    if "resume" in said:
        folder = Path(said["resume"].partition("=")[2].strip("'\""))
        if not (folder / SWEEP).is_file():
            raise CheckpointError(f"resume: expected the folder of a sweep, '{folder}' has no {SWEEP}")
        return folder, [*_kept_words(folder), *words]
    if named := said.get("out", said.get("hydra.sweep.dir")):
        return Path(named.partition("=")[2].strip("'\"")), words
    same = sorted(word for word in words if not word.startswith(("-", "hydra")))
    return Path("runs") / f"sweep-{hashlib.sha256(' '.join(same).encode()).hexdigest()[:8]}", words


def _kept_words(folder: Path) -> list[str]:
    """The command line of a sweep; how it is launched, and what is trusted, has to be said again."""
    try:
        words = json.loads((folder / SWEEP).read_text(encoding="utf-8"))["words"]
        return [str(word) for word in words if not _is_ours(str(word))]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"'{folder / SWEEP}' is broken ({error}); give the sweep's command") from error


def _check_same(folder: Path, kept: Mapping[str, Any]) -> None:
    """Refuse a folder that holds runs of another sweep; one that has jobs more than before goes on.

    Raises:
        ConfigError: what is not swept differs, or jobs of before are missing.
    """
    if not (folder / SWEEP).is_file() or not any(folder.glob("*/config.yaml")):
        return
    before = _kept_words(folder)
    if sorted(before) == sorted(kept["words"]):
        return
    jobs = json.loads((folder / SWEEP).read_text("utf-8")).get("jobs")
    once = [sorted(word for word in words if not _swept(word)) for words in (before, kept["words"])]
    if jobs is None or kept["jobs"] is None or once[0] != once[1] or not set(jobs) <= set(kept["jobs"]):
        raise ConfigError(
            f"out: '{folder}' holds another sweep ({' '.join(before)}); name another folder, or go on with "
            f"that one by fedlora run -m resume={folder}"
        )


def _swept(word: str) -> bool:
    return _parsed([word])[0].is_sweep_override()


def _is_ours(word: str) -> bool:
    """Whether a word is one that a folder, which may come from anyone, must not say."""
    key = word.partition("=")[0]
    return key.startswith("-") or "hydra" in key or key.lstrip("+~") in ("allow", "model.allow_pickle")


def _flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags with their values, and the overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        (flags if word.startswith("-") or before in VALUED else overrides).append(word)
    return flags, overrides


def _parsed(words: Sequence[str]) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except HydraException as error:
        raise ConfigError(composition.one_line(error)) from error


def _plan(words: Sequence[str]) -> tuple[list[Mapping[str, Any]], list[list[str]] | None]:
    """The pairs that the configuration lists, and the overrides of every job where Hydra knows them now."""
    choices, parsed = composition.choices(), _parsed(words)
    still = [
        str(override.input_line)
        for override in parsed
        if not override.is_sweep_override()
        and (override.key_or_group in choices or override.key_or_group.startswith(("hydra", "pairs")))
    ]
    config = composition.with_hydra(still)
    pairs: Any = OmegaConf.to_container(config.pairs, resolve=True)
    for pair in pairs:
        if not isinstance(pair, dict) or not pair:
            raise ConfigError(f"pairs: expected settings such as {{strategy: fedit, ranks: 8}}, got {pair!r}")
        composition.check_keys([f"{k}={v}" if k in choices else f"{k}=null" for k, v in pair.items()])
    if "basic_sweeper" not in str(config.hydra.sweeper["_target_"]):
        return pairs, None  # an optimiser decides as it goes
    given = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    task = [o for o in _parsed([*given, *words, *_over(pairs)]) if not o.key_or_group.startswith("hydra")]
    try:
        return pairs, BasicSweeper.split_arguments(task, None)[0]
    except HydraException as error:
        raise ConfigError(composition.one_line(error)) from error


def _store(pairs: Sequence[Mapping[str, Any]]) -> None:
    """Make the pairs choices of a group of Hydra's, so that a sweep over them is one over that group."""
    choices = composition.choices()
    for at, pair in enumerate(pairs):
        node = OmegaConf.create({})
        for key, value in pair.items():
            if key not in choices:
                OmegaConf.update(node, key, value, force_add=True)
        groups: list[Any] = [{f"override /{key}": value} for key, value in pair.items() if key in choices]
        made = OmegaConf.merge({"defaults": [*groups, "_self_"]}, node)
        ConfigStore.instance().store(group="pair", name=f"p{at}", node=made, package="_global_")


def _over(pairs: Sequence[Any]) -> list[str]:
    """The override that sweeps over the pairs, if there are any."""
    return [f"+pair={','.join(f'p{at}' for at in range(len(pairs)))}"] if pairs else []


def _finished(folder: Path, names: Sequence[str] | None) -> set[str]:
    found = {summary.parent.name for summary in folder.glob("*/summary.json")}
    return found if names is None else found & set(names)


def _close(folder: Path, names: Sequence[str] | None) -> bool:
    """Say what has finished, what failed and why, and what to do; whether anything failed."""
    files = sorted(folder.glob(f"*/{ERROR}"), key=lambda file: natural(file.parent.name))
    found = {file.parent.name: file.read_text(encoding="utf-8").splitlines()[0] for file in files}
    done = _finished(folder, names)
    missing = set(names or []) - done - found.keys()
    counts = [f"{len(done)} finished", f"{len(found)} failed", f"{len(missing)} missing"]
    print(f"{folder}: {', '.join(counts)}; fedlora report {folder}")
    for why in found.values():
        print(f"failed: {why}", file=sys.stderr)
    if found or missing:
        print(f"what failed or is missing: fedlora run -m resume={folder}", file=sys.stderr)
    return bool(found or missing)
