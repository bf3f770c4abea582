"""What fedlora claims of every architecture, each claim a function of a `Case` that asserts it.

To add a claim, write the function and give it a line in `CLAIMS`.
"""

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from zoo_entry import Entry
from zoo_models import LABELS, LONG, checkpoint, rows
from zoo_plain import adapted, generated, gradients, logits, loss, plain

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.models import Base, MultiAdapterModel, load, merge, save_adapter, targets
from fedlora.privacy import self_test
from fedlora.training.batches import micro_batches
from fedlora.training.evaluation import evaluate
from fedlora.training.generation import answer, answer_ends
from fedlora.training.steps import FitJob
from fedlora.training.trainer import fit

RATE = 0.1
ANY = 10**6  # tokens of a micro-batch: whatever the model lets be together is


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
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            base = load(path, self.entry.kind, labels, str(self.dtype).removeprefix("torch."))
        said = [str(one.message) for one in warned if str(path) in str(one.message)]
        assert len(said) == len(self.entry.fed), said
        assert all(part in line for part, line in zip(self.entry.fed, said, strict=True)), said
        return base

    @cached_property
    def base(self) -> Base:
        return self.load()

    @cached_property
    def modules(self) -> dict[str, tuple[int, int]]:
        named = self.entry.targets
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            found = targets(self.base, named if isinstance(named, str) else list(named))
        said = " ".join(str(one.message) for one in warned if "lora.targets" in str(one.message))
        left = self.entry.left_out
        assert said == (f"lora.targets=all-linear leaves out {left}" if left else "")
        return found

    @cached_property
    def clients(self) -> list[list[Example]]:
        return [rows(self.entry, number, seed) for seed, number in enumerate((4, 2, 3))]

    @cached_property
    def long(self) -> list[Example]:
        """Rows on both sides of the numbers in the configuration beyond which a model may do otherwise."""
        return rows(self.entry, len(LONG), 3, LONG)

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

    @cached_property
    def long_gradients(self) -> list[dict[str, Tensor]]:
        """By plain PEFT, of each of the long rows alone."""
        return [gradients(self.peft, row) for row in self.long]

    def fit(self, clients: Sequence[int], tokens: int | None = None) -> list[dict[str, Tensor]]:
        """One SGD step of these clients in one pass, by fedlora."""
        return self.fit_rows({client: self.clients[client] for client in clients}, tokens)

    def fit_rows(self, held: dict[int, list[Example]], tokens: int | None = None) -> list[dict[str, Tensor]]:
        """One SGD step of clients with these rows in one pass, by fedlora."""
        jobs = [FitJob(Task(self.adapter(client)), [own]) for client, own in held.items()]
        found = fit(self.base, jobs, _sgd, tokens=tokens)
        return [dict(one.adapter.tensors()) for one in found]

    def ours(self, base: Base, adapter: Adapter | None) -> list[Tensor]:
        """fedlora's logits of client 0's rows, without the padding's; of the model alone without adapter."""
        found: dict[int, Tensor] = {}
        with torch.no_grad(), MultiAdapterModel(base, [Task(adapter)]) if adapter else nullcontext():
            for numbers, own in self.together(base, self.clients[0]):
                batch = base.collate(own)
                for number, one, real in zip(
                    numbers, base.logits(batch), batch.inputs["attention_mask"], strict=True
                ):
                    found[number] = one[real.bool()] if self.entry.kind == "instruction" else one
        return [found[number] for number in sorted(found)]

    def together(self, base: Base, held: list[Example]) -> Iterator[tuple[list[int], list[Example]]]:
        """Rows, with their numbers, that fedlora lets share a padded batch."""
        for micro in micro_batches(list(enumerate(held)), ANY, base.traits):
            yield [number for number, _ in micro], [row for _, row in micro]

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
        theirs = [logits(copy.deepcopy(case.peft), row) for row in case.clients[0]]
    case.same(dict(enumerate(ours)), dict(enumerate(theirs)))  # type: ignore[arg-type]


def merged(case: Case) -> None:
    """The model with the adapter merged gives the adapter's logits."""
    base, adapter = case.load(), case.adapter(0)
    want = case.ours(base, adapter)
    merge(base, adapter)
    got = case.ours(base, None)
    case.same(dict(enumerate(got)), dict(enumerate(want)))  # type: ignore[arg-type]


def private(case: Case) -> None:
    """Each row's own gradient, in the batches that fedlora makes, is that of the row alone by plain PEFT."""
    task = Task(case.adapter(0))
    names = [f"{module}.{factor}" for factor in "AB" for module in task.adapter.pairs]
    names += case.base.head_state()
    for held, alone in ((case.clients[0], case.gradients), (case.long, case.long_gradients)):
        for numbers, own in case.together(case.base, held):
            with MultiAdapterModel(case.base, [task], train=True, per_row=True) as bank:
                bank.route([len(own)])
                parameters = [p for found in bank.factors(0).values() for p in found]
                losses, _ = case.base.losses(case.base.collate(own))
                found = torch.autograd.grad(losses.sum(), bank.leaves(parameters))
            for k, number in enumerate(numbers):
                case.same({name: g[k] for name, g in zip(names, found, strict=True)}, alone[number])


def long(case: Case) -> None:
    """Loss and step on rows of very unequal lengths are those of plain PEFT, row by row and unpadded."""
    task, before = Task(case.adapter(0)), dict(case.adapter(0).tensors())
    said, _ = evaluate(case.base, [task], [case.long])[0]
    with torch.no_grad():
        losses = [float(loss(copy.deepcopy(case.peft), row)) for row in case.long]
    assert abs(said - sum(losses) / len(losses)) < 10 * case.tolerance
    after = case.fit_rows({0: case.long}, ANY)[0]
    want = {n: sum(g[n] for g in case.long_gradients) / len(case.long) for n in before}
    case.same({n: (before[n] - after[n]) / RATE for n in before}, want)


def square(case: Case) -> None:
    """Clients in one batch of as many rows as tokens take the steps that each takes alone, or are refused."""
    held = {client: rows(case.entry, 4, client, (8,)) for client in (0, 1)}
    for client, got in enumerate(case.fit_rows(held, ANY)):
        case.same(got, case.fit_rows({client: held[client]}, ANY)[0])


def threads(case: Case) -> None:
    """Two threads take the step that one takes, to the bit."""
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(case.fit_rows({0: case.clients[0] + case.long}, tokens=16)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def answers(case: Case) -> None:
    """A decoder answers prompts of all lengths as plain PEFT does, one by one and unpadded."""
    base, positions = case.base, case.base.positions or 64
    said, most = [34, 5, 12, 2, positions - 2, positions], 6  # tokens of a prompt, and of an answer
    ids = [row.input_ids for row in rows(case.entry, len(said), 4, [n + most for n in said])]
    held = [Example(all, [-100] * n + all[n:]) for n, all in zip(said, ids, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the longest prompt takes all positions
        found = answer(base, Task(case.adapter(0)), held)
    ends = answer_ends(base)
    for n, all, got in zip(said, ids, found, strict=True):
        read = all[:n] if n < positions or base.positions is None else all[n - positions + most : n]
        left = most if base.positions is None else min(most, positions - len(read))
        want = generated(case.peft, read, left, ends, base.pad_id)
        assert got == base.tokenizer.decode(want, skip_special_tokens=True), f"a prompt of {n} tokens"


def self_tested(case: Case) -> None:
    """The test before private training finds that a row's gradient is its own."""
    self_test(case.base, Task(case.adapter(0)))


OF_DECODERS = ("answers",)
CLAIMS: dict[str, Callable[[Case], None]] = {
    "step": step,
    "fused": fused,
    "peft": peft,
    "merged": merged,
    "private": private,
    "long": long,
    "square": square,
    "threads": threads,
    "answers": answers,
    "self-test": self_tested,
}
