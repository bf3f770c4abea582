"""`fedlora replay`: the updates that a run recorded, aggregated again by another strategy, without training.

Every round is given what the recording strategy was given: the state before the round, and the updates. An
update answers to the state that its client started from, which is an earlier one where a scheduler did not
wait. So a replay says what one aggregation makes of these updates. It does not say where the other strategy's
own run would have gone: from the second round on its clients would have started elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fedlora.config import composition
from fedlora.config.instantiate import Trust, make, named, read
from fedlora.config.translate import kept_spec
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.parametrization import LORA
from fedlora.core.strategy import Strategy, next_state
from fedlora.errors import CheckpointError, ConfigError
from fedlora.report import Table
from fedlora.report.tables import score
from fedlora.rounds.aggregation_error import aggregation_error, sizes
from fedlora.runner.load_data import encode_rows
from fedlora.runner.task_file import TaskFile
from fedlora.seeds import generator
from fedlora.server_optimizers import ServerOptimizer
from fedlora.server_optimizers.advance import OWN, advance, without_optimizer
from fedlora.storage.run_folder import RunFolder
from fedlora.storage.update_log import UpdateLog
from fedlora.training.evaluation import evaluate
from fedlora.training.rules import LocalRule

MEANING = (
    "Each round aggregates the recorded updates from the recorded state; clients trained from the recording "
    "strategy's own states, so this is one aggregation against another, and no run of the other strategy."
)
SHOWN = ("aggregation_error", "delta_norm", "effective_rank", "loss", "accuracy", "perplexity")


def replay(run: Path, words: Sequence[str], trust: Trust) -> Table:
    """Aggregate a run's recorded updates again; what came out, beside what the run had.

    Args:
        run: the run's folder.
        words: `strategy=NAME` and its settings; none replays the run's own strategy.
        trust: what the command line grants.

    Returns:
        The table; the same is in `replay-STRATEGY.json` in the run's folder.

    Raises:
        FedLoraError: nothing was recorded, or the strategy cannot combine what the clients sent.
    """
    config, folder, recording = read(run, trust), RunFolder(run), UpdateLog(run)
    spec, optimizer = kept_spec(config, strategy=True), named(config, "server", ServerOptimizer)
    if not (rounds := recording.rounds()):
        raise CheckpointError(f"'{run}' has no recorded updates; run it with record_updates=true")
    name, chosen = _chosen(words)
    learnt, recorder = TaskFile.read(run), spec.strategy
    other = recorder
    if chosen is not None:
        other = make(OmegaConf.merge(config, {"strategy": None}, {"strategy": chosen}), "strategy", Strategy)  # type: ignore[arg-type]
    name = name or type(other).__name__.lower()
    if other.personal:
        raise ConfigError(
            f"strategy {type(other).__name__} makes no global model of updates; nothing to replay"
        )
    if optimizer is not None and other.server_space != recorder.server_space:
        raise ConfigError(
            f"replay: what the run's {type(optimizer).__name__} remembers is of the space of "
            f"{type(recorder).__name__} ({recorder.server_space}), and {type(other).__name__} has "
            f"{other.server_space or 'none'}; replay a strategy of the same, or none"
        )
    dataset, base = learnt.tested(spec), learnt.load_base(spec)
    test = encode_rows(spec.data.max_length, dataset, dataset.test, base)
    modules = recording.read(rounds[0])[0].adapter.pairs
    widest = spec.lora.scaling.peer(0, max(learnt.ranks), modules)
    had = {line["round"]: line for line in folder.rounds()}
    lines, at = [], dict[int, int]()  # the round before which the state of a version was recorded
    for round in rounds:
        before, updates = recording.read(round)
        at[before.round] = round
        began = _began(recording, at, before, updates)
        combined, tasks = again(recorder, other, widest, spec.seed, before, updates, began, round)
        after = combined.state
        if optimizer is not None:
            rng = generator(spec.seed, "aggregate", 0, round)
            after, _ = advance(other, optimizer, combined.before, after, combined.answered, rng)
        found = {**sizes(after), **aggregation_error(combined.state, updates, tasks)}
        found |= base.task.metrics(
            *evaluate(base, [Task(after.adapter, base_delta=after.base_delta)], [test])[0]
        )
        kept = {key: had[round][key] for key in SHOWN if key in had.get(round, {})}
        stale = max(before.round - state.round for state in began)
        line = {"round": round, "staleness": stale, "recorded": kept, "replayed": found}
        lines.append({**line, "state": after.digest()})
    said = OmegaConf.to_container(OmegaConf.create({"strategy": chosen or config.strategy}), resolve=True)
    assert isinstance(said, dict)
    result = {"recorded": learnt.strategy, "meaning": MEANING, **said, "rounds": lines}
    folder.write_json(f"replay-{name}.json", {str(key): value for key, value in result.items()})
    return _table(f"{type(other).__name__} on what clients of {learnt.strategy} sent", lines)


@dataclass(frozen=True)
class Combined:
    """What a strategy made of a recorded round.

    Args:
        before: the state before the round in the strategy's own form, with what a server optimizer remembers.
        state: the strategy's next state.
        answered: the updates, and what each would have answered to.
    """

    before: State
    state: State
    answered: Sequence[tuple[Update, Task]]


def again(
    recorder: Strategy,
    other: Strategy,
    widest: Peer,
    seed: int,
    before: State,
    updates: Sequence[Update],
    began: Sequence[State],
    round: int,
) -> tuple["Combined", list[Task]]:
    """The state that a strategy makes of a recorded round, and what the clients had been asked.

    Args:
        recorder: the strategy of the run.
        other: the one that aggregates now.
        widest: a client of the largest rank, whose start has all of the state.
        seed: the run's.
        before: the state before the round.
        updates: what the clients sent.
        began: the state that each of them started from.
        round: its number.

    Raises:
        FedLoraError: the strategy would have asked its clients for something else.
    """
    asked = [(update.peer, state) for update, state in zip(updates, began, strict=True) if update.peer]
    tasks = [recorder.task(without_optimizer(state), peer) for peer, state in asked]
    rng = generator(seed, "aggregate", 0, round)
    if other == recorder:
        state = next_state(other, without_optimizer(before), updates, rng)
        return Combined(before, state, list(zip(updates, tasks, strict=True))), tasks

    def own(state: State) -> State:
        """What the widest client starts from is the state in a form that every strategy knows."""
        start = recorder.task(without_optimizer(state), widest)
        made = other.init(start.adapter, start.base_delta, state.seed)
        memory = dict(made.memory) | {n: t for n, t in state.memory.items() if n.startswith(OWN)}
        made = replace(made, adapter=start.adapter, base_delta=start.base_delta)
        return replace(made, round=state.round, memory=memory)

    owns = {state.round: own(state) for state in (before, *began)}
    others = [other.task(without_optimizer(owns[state.round]), peer) for peer, state in asked]
    for (peer, _), task, was in zip(asked, others, tasks, strict=True):
        _check_alike(other, recorder, task, was, peer, round)
    begun = owns[before.round]
    state = next_state(other, without_optimizer(begun), updates, rng)
    return Combined(begun, state, list(zip(updates, others, strict=True))), tasks


def _began(
    recording: UpdateLog, at: Mapping[int, int], before: State, updates: Sequence[Update]
) -> list[State]:
    """The state that each update started from: that before the round, or an earlier one.

    Args:
        recording: what was recorded.
        at: version of a state -> the round before which it was recorded.
        before: the state before the round, from which an update of no known version is taken to have started.
        updates: those of the round.
    """
    known = {before.round: before}
    for version in {update.version for update in updates if update.version in at} - known.keys():
        assert version is not None
        known[version] = recording.read(at[version])[0]
    return [known.get(update.version, before) for update in updates]  # type: ignore[arg-type]


def _check_alike(other: Strategy, recorder: Strategy, asked: Task, was: Task, peer: Peer, round: int) -> None:
    """Refuse updates that answer to another question; what bends a client's training is part of none."""

    def sent(task: Task) -> str:
        form = task.adapter.parametrization
        name = "LoRA" if form == LORA else type(form).__name__
        parts = [type(part).__name__ for part in task.method if not isinstance(part, LocalRule)]
        return " and ".join([f"factors of {name}", *parts])

    forms = [
        (
            sent(task),
            "+".join(sorted(task.train)) + " trained",
            "+".join(sorted(task.share)) + " shared",
            f"{len(task.shared())} shared tensors",
            f"ranks {sorted({pair.rank for pair in task.adapter.pairs.values()})}",
            f"{len(task.adapter.extra)} extras",
        )
        for task in (asked, was)
    ]
    for wants, had in zip(*forms, strict=True):
        if wants != had:
            raise ConfigError(
                f"round {round}, client {peer.id}: strategy {type(other).__name__} combines updates with "
                f"{wants}, the recorded ones of {type(recorder).__name__} are with {had}; replay another one"
            )


def _chosen(words: Sequence[str]) -> tuple[str | None, Any]:
    """The name and the settings of the strategy that the command line names."""
    for word in words:
        if not word.lstrip("+").startswith(("strategy=", "strategy.")):
            raise ConfigError(f"replay: only the strategy can be another one, got '{word}'")
    if not words:
        return None, None
    name = next((word.partition("=")[2] for word in words if word.startswith("strategy=")), None)
    if name is None:
        raise ConfigError("replay: whose settings are these? say strategy=NAME first")
    composed: DictConfig = composition.compose(list(words))
    return name, OmegaConf.to_container(composed.strategy, resolve=True)


def _table(title: str, lines: Sequence[dict[str, Any]]) -> Table:
    """A row a round, a pair of columns a number: as recorded, and as replayed.

    Staleness is how many states the oldest of a round's updates was behind.
    """
    keys = [key for key in SHOWN if any(key in line["replayed"] for line in lines)]
    stale = any(line["staleness"] for line in lines)  # no column of zeros where every round has waited
    header = ["round", *(["staleness"] if stale else [])]
    header += [f"{key.replace('_', ' ')}{end}" for key in keys for end in ("", ", replayed")]
    rows = []
    for line in lines:
        cells = [score(line[side].get(key), key) for key in keys for side in ("recorded", "replayed")]
        rows.append([str(line["round"]), *([str(line["staleness"])] if stale else []), *cells])
    return Table(title, header, rows, MEANING)
