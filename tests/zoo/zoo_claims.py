"""What fedlora claims of every architecture, each claim a function of a `Case` that asserts it.

To add a claim, write the function and give it a line in `CLAIMS`.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from zoo_entry import Entry
from zoo_models import LABELS, checkpoint, rows
from zoo_plain import adapted, gradients, logits, plain

from fedlora.adapter import Adapter, Pair
from fedlora.data import Example, collate
from fedlora.models import Bank, Base, load, merge, save_adapter, targets
from fedlora.protocol import Task
from fedlora.trainer import Job, fit

RATE = 0.1


class Case:
    """One architecture with everything that its claims share, each made when it is first asked for."""

    def __init__(self, entry: Entry, root: Path, name: str) -> None:
        self.entry, self.root, self.name = entry, root, name
        self.dtype = torch.float32 if entry.single else torch.float64
        self.tolerance = 3e-5 if entry.single else 1e-9

    def load(self) -> Base:
        """The model as fedlora loads it; anew each time."""
        path = checkpoint(self.entry, self.root / self.name)
        labels = LABELS if self.entry.kind == "classification" else ()
        return load(path, self.entry.kind, labels, str(self.dtype).removeprefix("torch."))

    @cached_property
    def base(self) -> Base:
        return self.load()

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        named = self.entry.targets
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", UserWarning)
            found = targets(self.base, named if isinstance(named, str) else list(named))
        said = " ".join(str(one.message) for one in told if "lora.targets" in str(one.message))
        left = self.entry.left_out
        assert said == (f"lora.targets=all-linear leaves out {left}" if left else "")
        return found

    @cached_property
    def clients(self) -> list[list[Example]]:
        return [rows(self.entry, number, seed) for seed, number in enumerate((4, 2, 3))]

    def adapter(self, seed: int) -> Adapter:
        """Random factors, B too, of mixed ranks and scales; heads moved off their start."""
        rng = np.random.default_rng([seed, 5])

        def random(*shape: int, spread: float) -> Tensor:
            return torch.from_numpy(spread * rng.standard_normal(shape)).to(self.dtype)

        pairs = {}
        for k, (name, (d_out, d_in)) in enumerate(sorted(self.modules.items())):
            rank = (3, 1, 2)[(k + seed) % 3]
            A, B = random(rank, d_in, spread=d_in**-0.5), random(d_out, rank, spread=0.2)
            pairs[name] = Pair(A, B, (2.0, 0.5, 1.3)[(k + 2 * seed) % 3])
        heads = {n: p.to(self.dtype) for n, p in self.base.head_state().items()}
        return Adapter(pairs, {n: p + random(*p.shape, spread=0.1) for n, p in heads.items()})

    @cached_property
    def peft(self) -> object:
        """Plain PEFT with client 0's adapter, from the files that fedlora wrote."""
        folder = self.root / f"{self.name}-adapter"
        save_adapter(self.adapter(0), self.base, folder)
        return adapted(plain(Path(self.base.path), self.entry.kind, len(LABELS), self.dtype), folder)

    @cached_property
    def gradients(self) -> list[dict[str, Tensor]]:
        """By plain PEFT, of each of client 0's rows alone."""
        return [gradients(self.peft, row) for row in self.clients[0]]

    def fit(self, clients: Sequence[int]) -> list[dict[str, Tensor]]:
        """One SGD step of these clients in one pass, by fedlora."""
        jobs = [Job(Task(self.adapter(client)), [self.clients[client]]) for client in clients]
        found = fit(self.base, jobs, _sgd)
        return [dict(one.adapter.tensors()) for one in found]

    def ours(self, base: Base, adapter: Adapter) -> list[Tensor]:
        """fedlora's logits of client 0's rows in one padded batch, without the padding's."""
        batch = collate(self.clients[0], base.pad_id)
        with torch.no_grad(), Bank(base, [Task(adapter)]):
            found = base.logits(batch)
        return self.real(found)

    def real(self, found: Tensor) -> list[Tensor]:
        """Each row's logits without those of padding."""
        if self.entry.kind == "classification":
            return list(found)
        return [one[: len(row.input_ids)] for one, row in zip(found, self.clients[0], strict=True)]

    def same(self, got: dict[str, Tensor], want: dict[str, Tensor], wide: float = 1.0) -> None:
        """Assert that tensors are the same up to rounding, relative to the largest entry of all."""
        assert got.keys() == want.keys()
        size = max(float(value.abs().max()) for value in want.values())
        gaps = {name: float((got[name] - want[name]).abs().max()) / size for name in want}
        worst = max(gaps, key=lambda name: gaps[name])
        assert gaps[worst] < wide * self.tolerance, f"{worst} is off by {gaps[worst]:.1e}"


def _sgd(groups: dict[str, list[nn.Parameter]]) -> torch.optim.SGD:
    return torch.optim.SGD([p for group in groups.values() for p in group], RATE)


def step(case: Case) -> None:
    """One step of SGD is that of plain PEFT, row by row and unpadded."""
    before, after = dict(case.adapter(0).tensors()), case.fit([0])[0]
    count = len(case.gradients)
    want = {n: sum(g[n] for g in case.gradients) / count for n in before}
    assert case.gradients[0].keys() == before.keys()
    case.same({n: (before[n] - after[n]) / RATE for n in before}, want)


def fused(case: Case) -> None:
    """Clients of other ranks in one pass take the steps that each takes alone."""
    for client, got in enumerate(case.fit([0, 1, 2])):
        case.same(got, case.fit([client])[0])


def peft(case: Case) -> None:
    """Plain PEFT loads the saved adapter whole and gives fedlora's logits."""
    ours = case.ours(case.base, case.adapter(0))
    with torch.no_grad():
        theirs = [logits(case.peft, row) for row in case.clients[0]]
    case.same(dict(enumerate(ours)), dict(enumerate(theirs)))  # type: ignore[arg-type]


def merged(case: Case) -> None:
    """The model with the adapter merged gives the adapter's logits."""
    base, adapter = case.load(), case.adapter(0)
    want = case.ours(base, adapter)
    merge(base, adapter)
    with torch.no_grad():
        got = case.real(base.logits(collate(case.clients[0], base.pad_id)))
    case.same(dict(enumerate(got)), dict(enumerate(want)))  # type: ignore[arg-type]


def private(case: Case) -> None:
    """Each row's own gradient, in one padded batch, is that of the row alone by plain PEFT."""
    task, batch = Task(case.adapter(0)), case.clients[0]
    names = [f"{module}.{factor}" for factor in "AB" for module in task.adapter.pairs]
    names += case.base.head_state()
    with Bank(case.base, [task], train=True, per_row=True) as bank:
        bank.route([len(batch)])
        groups = bank.factors(0)
        losses, _ = case.base.losses(collate(batch, case.base.pad_id))
        parameters = [p for found in groups.values() for p in found]
        found = torch.autograd.grad(losses.sum(), bank.leaves(parameters))
    for row, want in enumerate(case.gradients):
        case.same({name: g[row] for name, g in zip(names, found, strict=True)}, want)


CLAIMS: dict[str, Callable[[Case], None]] = {
    "step": step,
    "fused": fused,
    "peft": peft,
    "merged": merged,
    "private": private,
}
