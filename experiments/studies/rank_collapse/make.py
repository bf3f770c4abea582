"""What mixed ranks do to the tail of an update: rounds in which nobody learns, and rounds of a known target.

    python experiments/studies/rank_collapse/make.py [--ranks 2 4 8 16] [--sampled 8 2] [--out DIR]

Still: the server starts from an update of 16 directions and clients send back what they were sent; the table
has what is left of σ_i. Learning: every client has rows of one linear map W*, of full rank, and takes plain
gradient steps on its own A and B for the squared error, in float64; the table has the distance of the
server's model from W*, and the least that any adapter of the largest rank could reach. HetLoRA runs without
its penalty and pruning here, so that its ranks are those of the others.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.messages import Peer, State, Task, Update
from fedlora.core.strategy import Strategy
from fedlora.rounds.codec import Held, write_task
from fedlora.seeds import generator
from fedlora.strategies import FedFold, FlexLoRA, FLoRA, HetLoRA, RaFLoRA

ROUNDING = """\
FedFold with an energy below 1 cuts at a threshold, which rounding can cross, so its last rounds differ
between processors. One unit in the last place of the start moved its distance at round 150 to 0.065, 0.071,
0.065, 0.073 and 0.069, and other kernels of the matrix library moved it to 0.068 and 0.070. One processor
gives the same bits each time.
"""
INTRODUCTION = """
What happens to the directions of an update that only the clients of larger ranks can hold. A mean in which
the other clients count as zeros shrinks them every round; a mean over those that hold them, or an exact sum,
does not. The numbers and the picture are written by
`python experiments/studies/rank_collapse/make.py --out experiments/studies/rank_collapse`.
"""
Train = Callable[[int, Task], Adapter]
D_OUT, D_IN, SCALE, M = 24, 32, 2.0, "layer"
SHOWN = (1, 3, 5, 9, 16)  # the first direction of each partition of ranks 2, 4, 8, 16, and the last of all
STRATEGIES: dict[str, Strategy] = {
    "FlexLoRA": FlexLoRA(),
    "HetLoRA, zero-padding": HetLoRA(penalty=0.0),
    "HetLoRA, mean over holders": HetLoRA(penalty=0.0, mean_over="holders"),
    "raFLoRA": RaFLoRA(),
    "FLoRA": FLoRA(),
    "FedFold": FedFold(),
    "FedFold, leading directions": FedFold(fresh=0.0),
    "FedFold, energy 0.99": FedFold(energy=0.99),
}
LOOKS = dict(
    zip(
        STRATEGIES,
        [
            "#0072B2 o",
            "#D55E00 s",
            "#E69F00 D",
            "#56B4E9 ^",
            "#777777 v",
            "#000000 *",
            "#009E73 P",
            "#CC79A7 X",
        ],
        strict=True,
    )
)


@dataclass(frozen=True)
class Course:
    """What a run of one strategy left, an entry a round, the start included.

    Args:
        sigma: the singular values of the server's update.
        distance: ‖ΔW − W*‖ / ‖W*‖.
        down: numbers sent to all clients of the round together.
    """

    sigma: list[list[float]] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    down: list[int] = field(default_factory=list)

    def note(self, state: State, target: Tensor, down: int) -> None:
        """Add a round."""
        delta = state.delta(M)
        self.sigma.append([_short(x) for x in torch.linalg.svdvals(delta).tolist()])
        self.distance.append(_short(float((delta - target).norm() / target.norm())))
        self.down.append(down)


@dataclass(frozen=True)
class Setting:
    """Who takes part: client k has the k-th rank, and so many are sampled each round, alike for everyone."""

    ranks: Sequence[int]
    sampled: int

    def run(self, strategy: Strategy, start: Pair, target: Tensor, rounds: int, train: Train) -> Course:
        """So many rounds, all clients of one weight."""
        state, course, held = strategy.init(Adapter({M: start})), Course(), dict[int, Held]()
        course.note(state, target, 0)
        for round in range(1, rounds + 1):
            rng = generator(0, "sample", 0, round)
            chosen = sorted(rng.choice(len(self.ranks), self.sampled, replace=False).tolist())
            updates, down = [], 0
            for client in chosen:
                peer = Peer(client, self.ranks[client])
                task = strategy.task(state, peer)
                content, held[client] = write_task(task, round, 0, held.get(client), state.round)
                down += sum(math.prod(array.shape) for array in content.array_records["arrays"].values())
                updates.append(Update(train(client, task), 1.0, peer))
            state = strategy.aggregate(state, updates, rng)
            course.note(state, target, down)
        return course


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def still(client: int, task: Task) -> Adapter:
    """A client that learns nothing."""
    return task.adapter


def learner(target: Tensor, clients: int, rows: int, steps: int, lr: float) -> Train:
    """Clients that fit W* on rows of their own by plain gradient descent on A and B."""
    moments = []
    for client in range(clients):
        X = torch.from_numpy(generator(0, "rows", client).standard_normal((rows, D_IN)))
        moments.append(X.T @ X / rows)

    def train(client: int, task: Task) -> Adapter:
        pair = task.adapter.pairs[M]
        A, B, s = pair.A, pair.B, pair.scale
        rest = (dense(task.base_delta[M]) if M in task.base_delta else 0.0) - target
        for _ in range(steps):
            G = (rest + s * B @ A) @ moments[client]  # the gradient of ½‖X (ΔW − W*)ᵀ‖² / rows
            A, B = A - lr * s * B.T @ G, B - lr * s * G @ A.T
        return Adapter({M: Pair(A, B, s)})

    return train


def of_spectrum(count: int) -> Pair:
    """A pair whose product has so many singular values, each 0.9 of the one before."""
    rng, sigma = generator(0, "directions"), torch.tensor([0.9**i for i in range(count)], dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.from_numpy(rng.standard_normal((d, count)))).Q for d in (D_OUT, D_IN))
    return Pair(V.T.contiguous(), U * sigma / SCALE, SCALE)


def still_table(courses: dict[str, Course]) -> list[str]:
    """σ_i relative to the start, after the first round and the last."""

    def left(course: Course, i: int) -> str:
        shares = [course.sigma[at][i - 1] / course.sigma[0][i - 1] for at in (1, -1)]
        return " → ".join("0" if share < 1e-12 else f"{share:.2g}" for share in shares)

    lines = [f"| strategy | {' | '.join(f'σ_{i}' for i in SHOWN)} |", "|---|" + "--:|" * len(SHOWN)]
    return lines + [f"| {n} | {' | '.join(left(c, i) for i in SHOWN)} |" for n, c in courses.items()]


def learned_table(courses: dict[str, Course], nearest: float, rank: int) -> list[str]:
    """The distance over rounds, the rank in the end, and the download of a client and round."""
    rounds = len(next(iter(courses.values())).distance) - 1
    marks = sorted({max(1, rounds // 20), max(1, rounds // 5), rounds})
    heads = [*(f"round {at}" for at in marks), "rank at the end", "numbers down"]
    lines = [f"| strategy | {' | '.join(heads)} |", "|---|" + "--:|" * len(heads)]
    for name, course in courses.items():
        sigma = np.array(course.sigma[-1])
        cells = [f"{course.distance[at]:.2g}" for at in marks]
        cells += [str(int((sigma > 1e-9 * sigma[0]).sum())), f"{sum(course.down) / rounds:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    cells = [f"{nearest:.2g}"] * len(marks)
    return [*lines, f"| nearest of rank {rank} | {' | '.join(cells)} | {rank} | |"]


def draw(found: dict[int, tuple[dict[str, Course], dict[str, Course]]], nearest: float, rank: int) -> Figure:
    """A row a setting: the last direction's σ in the still rounds, the distance in the learning ones."""
    figure = Figure(figsize=(9.6, 0.8 + 3.3 * len(found)), layout="constrained")
    for row, (sampled, (quiet, learned)) in zip(
        figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True
    ):
        left = {n: [s[rank - 1] / c.sigma[0][rank - 1] for s in c.sigma] for n, c in quiet.items()}
        _lines(row[0], left, f"nobody learns, {sampled} clients a round", f"σ_{rank} left")
        gone = {n: c.distance for n, c in learned.items()}
        _lines(row[1], gone, f"learning, {sampled} clients a round", "‖ΔW − W*‖ / ‖W*‖")
        row[1].axhline(nearest, color="#777777", linestyle="--", label=f"nearest of rank {rank}")
    handles, names = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _lines(axes: Axes, lines: dict[str, list[float]], title: str, y: str) -> None:
    for at, (name, line) in enumerate(lines.items()):
        colour, marker = LOOKS[name].split()
        every = max(1, len(line) // 10)
        points = np.clip(line, 1e-14, None)
        axes.plot(
            points, color=colour, marker=marker, markersize=5, markevery=(at % every, every), label=name
        )
    axes.set(title=title, xlabel="round", ylabel=y, yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color="#e4e4e4", linewidth=0.7)


def main() -> None:
    """Run all, print the tables, write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16], help="two clients of each")
    parser.add_argument(
        "--sampled", type=int, nargs="+", default=[8, 2], help="clients a round, a run for each"
    )
    parser.add_argument("--rounds", type=int, default=20, help="in which nobody learns")
    parser.add_argument("--learning", type=int, default=150, help="rounds in which everybody does")
    parser.add_argument("--steps", type=int, default=10, help="local steps of a learning round")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()

    ranks, rank = given.ranks * 2, max(given.ranks)
    full, target = of_spectrum(rank), dense(of_spectrum(min(D_OUT, D_IN)))
    A = torch.from_numpy(generator(0, "adapter").uniform(-1, 1, (rank, D_IN))) / D_IN**0.5
    fresh = Pair(A, torch.zeros(D_OUT, rank, dtype=torch.float64), SCALE)
    train = learner(target, len(ranks), 200, given.steps, given.lr)
    sigma = torch.linalg.svdvals(target)
    nearest = float(sigma[rank:].norm() / sigma.norm())

    found, parts = (
        {},
        [f"One layer of {D_OUT} × {D_IN}, {len(ranks)} clients of ranks {ranks}, scale {SCALE}."],
    )
    for sampled in given.sampled:
        setting = Setting(ranks, sampled)
        quiet = {n: setting.run(s, full, dense(full), given.rounds, still) for n, s in STRATEGIES.items()}
        learned = {n: setting.run(s, fresh, target, given.learning, train) for n, s in STRATEGIES.items()}
        found[sampled] = (quiet, learned)
        parts += [
            f"\nNobody learns, {sampled} clients a round: share of σ_i left after round 1 → {given.rounds}.\n"
        ]
        parts += still_table(quiet)
        parts += [
            f"\nLearning, {sampled} clients a round, {given.steps} steps at {given.lr}: ‖ΔW − W*‖ / ‖W*‖.\n"
        ]
        parts += learned_table(learned, nearest, rank)
    text = "\n".join(parts) + "\n"
    print(text)
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(found, nearest, rank).savefig(
            given.out / "rank_collapse.png", dpi=110, metadata={"Software": None}
        )
        picture = "![σ and distance over rounds](rank_collapse.png)"
        page = f"# Rank collapse\n{INTRODUCTION}\n{text}\n{ROUNDING}\n{picture}\n"
        (given.out / "README.md").write_text(page, encoding="utf-8")
        record = {
            "settings": {k: v for k, v in vars(given).items() if k != "out"},
            "nearest": nearest,
            "still": {k: {n: c.sigma for n, c in q.items()} for k, (q, _) in found.items()},
            "learning": {
                k: {
                    n: {"distance": c.distance, "sigma": c.sigma[-1], "down": c.down} for n, c in done.items()
                }
                for k, (_, done) in found.items()
            },
        }
        (given.out / "rank_collapse.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
