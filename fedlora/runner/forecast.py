"""What a private run will cost before it spends anything, and what one has spent."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low

from fedlora.clients import LocalTraining
from fedlora.core.algebra import negative, norm, stack
from fedlora.core.messages import State, Task, Update
from fedlora.errors import ConfigError, FedLoraError
from fedlora.models import layer_at, layer_weight
from fedlora.privacy import ADJACENCY, DPSGD, ClientLevel, Entry, Ledger, Plan, Privacy
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.report import Table
from fedlora.runner.assemble import Assembly, assemble
from fedlora.runner.privacy_checks import planned
from fedlora.runner.spec import RunSpec
from fedlora.seeds import generator
from fedlora.server_optimizers.advance import next_round, without_optimizer
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

COMPARED = ("fedit", "ffalora", "fedsvd", "flexlora")
ROUNDS = 3  # of nothing but noise; more grow alike and take longer
# Signal over noise of a whole run, at best: what was measured is in experiments/studies/privacy.
HOPELESS, HARD = 10.0, 20.0


@dataclass(frozen=True)
class Outlook:
    """What noise does to a run.

    Args:
        strategy: by its name in the configuration.
        trained: how many numbers a client trains, every one of which gets noise.
        signal: the run's signal over its noise, if every record, or client, pulled one way at the clip.
        noise: ‖ΔW‖ of rounds in which nothing but noise is learned, over ‖W‖ of the adapted weights.
    """

    strategy: str
    trained: int
    signal: float
    noise: float

    @property
    def verdict(self) -> str:
        """In a word or two, by what was measured on small models."""
        if self.signal < HOPELESS:
            return "hopeless"
        return "hard" if self.signal < HARD else "worth a try"


def plan(
    spec: RunSpec, others: Callable[[str], RunSpec], records: int | None = None, name: str = ""
) -> list[Table]:
    """Noise of every client and what it does to ΔW under several strategies, before anything is spent.

    Args:
        spec: the run that is meant, with its privacy.
        others: from the name of another strategy to the same run under it.
        records: of every client, in the place of the data's own numbers.
        name: what the table calls the run; empty takes the name of its strategy.

    Raises:
        FedLoraError: the run itself would be refused.
    """
    privacy = spec.privacy
    if privacy is None:
        raise ConfigError("privacy plan: there is nothing to plan for privacy=none; say privacy=dp_sgd")
    job = _bare(spec)
    plans = _plans(job, privacy, records)
    name = name or spec.strategy_name
    found = [_outlook(name, job, privacy, plans)]
    for other in COMPARED:
        if other != name:
            try:
                found.append(_outlook(other, _bare(others(other)), privacy, plans))
            except FedLoraError:  # it would be refused with these ranks, or this privacy
                continue
    return [_plans_table(privacy, plans), _outlooks_table(found, min(job.rules.rounds, ROUNDS))]


def _bare(spec: RunSpec) -> Assembly:
    """The run without its privacy, which the plan itself looks after."""
    return assemble(replace(spec, privacy=None))


def _plans(job: Assembly, privacy: Privacy, records: int | None) -> list[tuple[int, Plan]]:
    """(records, plan) of every client; (clients, plan) of the server."""
    if isinstance(privacy, ClientLevel):
        clients = len(job.parts)
        sampled = job.rules.clients_per_round or clients
        return [(clients, privacy.plan(clients, sampled, job.rules.secure_sum))]
    assert isinstance(privacy, DPSGD)
    sizes = [records or len(part.rows) for part in job.parts]
    client = job.runtime.client.privately(privacy)
    return [(size, made) for size in sizes if (made := client.plan(size)) is not None]


def _outlook(name: str, job: Assembly, privacy: Privacy, plans: Sequence[tuple[int, Plan]]) -> Outlook:
    tasks = [job.spec.strategy.task(job.start, job.peer(k, rank)) for k, rank in enumerate(job.ranks)]
    trained = max(_trained(task) for task in tasks)
    n = min(job.rules.clients_per_round or len(tasks), len(tasks))
    worst = max((own for _, own in plans), key=lambda own: own.sigma / own.batch_size)
    releases = worst.steps * job.rules.rounds * (1 if isinstance(privacy, ClientLevel) else n)
    signal = worst.batch_size * math.sqrt(releases) / (worst.sigma * math.sqrt(trained))
    state, rng = job.start, generator(0, "plan")
    with tempfile.TemporaryDirectory() as folder:
        for round in range(1, min(job.rules.rounds, ROUNDS) + 1):
            shown = without_optimizer(state)
            if isinstance(privacy, ClientLevel):
                central = ClientLevelMechanism(privacy, worst, Path(folder) / "ledger.json")
                central.sample([], round)
                wide = job.spec.strategy.task(shown, job.peer(0, max(job.ranks)))
                total = central.total(job.spec.strategy, wide, [], [])
                updates, asked = [central.release(job.spec.strategy, wide, total)], [wide]
            else:
                updates = list(_noise(job, shown, [own for _, own in plans][:n], round))
                asked = [job.spec.strategy.task(shown, job.peer(k, job.ranks[k])) for k in range(n)]
            state = next_round(job.spec.strategy, job.spec.server, state, updates, asked, rng)
    return Outlook(name, trained, signal, _moved(job, state))


def _noise(job: Assembly, state: State, plans: Sequence[Plan], round: int) -> Iterator[Update]:
    """The updates of clients whose every batch is empty: their own trainer, with nothing but noise."""
    client = job.runtime.client
    if not isinstance(client, LocalTraining):
        raise ConfigError(f"privacy plan: client {type(client).__name__} does not train privately")
    peers = [job.peer(k, job.ranks[k]) for k in range(len(plans))]
    jobs = [
        FitJob(job.spec.strategy.task(state, peer), [[]] * own.steps, own.mechanism(peer.id, round))
        for peer, own in zip(peers, plans, strict=True)
    ]
    fitted = fit(job.base, jobs, client.make_optimizer, client.rate_factor)
    for peer, found in zip(peers, fitted, strict=True):
        yield Update(found.adapter, 1.0, peer)


def _trained(task: Task) -> int:
    """How many numbers a client trains."""
    tensors = dict(task.adapter.tensors())
    return sum(tensors[name].numel() for name in task.trained())


def _moved(job: Assembly, state: State) -> float:
    """‖ΔW_now − ΔW_start‖ over ‖W‖, over the adapted modules; 0 without any."""
    model, before, after = job.base.model, job.start.whole(), state.whole()
    weights = math.hypot(*(float(layer_weight(layer_at(model, m), m).norm()) for m in after.pairs))
    gaps = [norm(stack([pair, negative(before.pairs[m])], [1.0, 1.0])) for m, pair in after.pairs.items()]
    return math.hypot(*gaps) / weights if gaps else 0.0


def _plans_table(privacy: Privacy, plans: Sequence[tuple[int, Plan]]) -> Table:
    """One row a number of records; of many, the least, the middle one and the most."""
    sizes = sorted({size for size, _ in plans})
    shown = sizes if len(sizes) <= 8 else [sizes[0], int(median_low(sizes)), sizes[-1]]
    rows = []
    for size in shown:
        own = next(plan for n, plan in plans if n == size)
        total = own.steps * planned(privacy)
        spent = Ledger(own.delta, (Entry(own.sigma, own.q, total),), privacy.accountant).epsilon
        count = sum(n == size for n, _ in plans)
        cells = [str(size), str(count), f"{own.q:.4f}", str(total), f"{own.delta:g}", f"{own.sigma:.3f}"]
        rows.append([*cells, f"{spent:.3f}"])
    what = "records" if privacy.unit == "record" else "clients"
    of = "clients" if privacy.unit == "record" else "servers"
    header = [what, of, "q", "steps", "delta", "sigma", "epsilon"]
    note = f"Epsilon is that of the whole run; {ADJACENCY[privacy.unit]}. Clip {privacy.clip:g}."
    return Table("Noise for a budget of epsilon " + f"{privacy.epsilon:g}", header, rows, note)


def _outlooks_table(found: Iterable[Outlook], rounds: int) -> Table:
    rows = [[o.strategy, f"{o.trained:,}", f"{o.signal:.2f}", f"{o.noise:.4f}", o.verdict] for o in found]
    header = [
        "strategy",
        "trained",
        "signal / noise, at best",
        f"noise / W, {rounds} rounds",
        "outlook",
    ]
    note = (
        f"At best: every record pulls one way at the clip. Below {HOPELESS:g} nothing was learned where it "
        f"was measured, below {HARD:g} little. Noise: ‖ΔW‖ of rounds of nothing else. What helps: more "
        "records a client, larger batches, fewer trained numbers (smaller ranks, fewer lora.targets, "
        "lora.head=last or freeze), more clients a round, a larger epsilon."
    )
    return Table("What that noise does", header, rows, note)
