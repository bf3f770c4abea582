"""What clients have changed of what they were sent: lengths and distances, from factors.

The change of a module is s (B A − B₀ A₀) = s (dB A + B₀ dA), a pair of twice the rank at most, in which
nothing cancels. Inner products of such pairs are sums over (A_j A_kᵀ) ∘ (B_jᵀ B_k), never dense. All in
float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense, pad, rescale
from fedlora.core.messages import Task
from fedlora.core.vectors import factor_change, flat, moved_factors


def change(sent: Pair, got: Pair) -> Pair:
    """The change s (B A − B₀ A₀) as one pair, float64; `got` may have another rank than `sent`."""
    sent, got, dA, dB = _moved(sent, got)
    if not dA.any():
        return Pair(got.A, dB, got.scale)
    if not dB.any():
        return Pair(dA, sent.B, got.scale)
    return Pair(torch.cat([got.A, dA]), torch.cat([dB, sent.B], dim=1), got.scale)


def gram(pairs: Sequence[Pair]) -> Tensor:
    """The inner products ⟨ΔW_j, ΔW_k⟩ of one module's pairs, (n, n), float64; the ranks may differ."""
    ranks = [pair.rank for pair in pairs]
    if sum(ranks) >= 2 * min(pairs[0].shape):  # changes have twice the clients' ranks
        rows = torch.stack([dense(pair).reshape(-1) for pair in pairs])
        return rows @ rows.T
    A, B = torch.cat([pair.A for pair in pairs]), torch.cat([p.B * p.scale for p in pairs], dim=1)
    cross = (A @ A.T) * (B.T @ B)
    owner = torch.arange(len(pairs)).repeat_interleave(torch.tensor(ranks))
    mine = torch.nn.functional.one_hot(owner, len(pairs)).to(cross)
    return mine.T @ cross @ mine


def distances(tasks: Sequence[Task], adapters: Sequence[Adapter]) -> Tensor:
    """‖Δ_j − Δ_k‖² over all ΔW and extras, (n, n), float64.

    Args:
        tasks: what each client was sent.
        adapters: what came back.
    """
    sent = [task.adapter.plain() for task in tasks]
    adapters = [adapter.plain() for adapter in adapters]
    products = torch.zeros(len(sent), len(sent), dtype=torch.float64)
    for name in sent[0].pairs:
        own = [change(s.pairs[name], g.pairs[name]) for s, g in zip(sent, adapters, strict=True)]
        products += gram(own).cpu()
    heads = [_extras(s, g) for s, g in zip(sent, adapters, strict=True)]
    return _apart(products + torch.stack(heads) @ torch.stack(heads).T)


def factor_distances(tasks: Sequence[Task], adapters: Sequence[Adapter], wide: Task) -> Tensor:
    """The same over the changes of the shared tensors themselves, each in the form of the widest task."""
    rows = [flat(factor_change(t.adapter, got, wide)).cpu() for t, got in zip(tasks, adapters, strict=True)]
    return _apart(torch.stack(rows) @ torch.stack(rows).T)


@dataclass(frozen=True)
class Segment:
    """The straight line in the shared tensors from what a client was sent, t = 0, to what it sent, t = 1.

    On it ‖Δ(t)‖² = a t² + 2 b t³ + c t⁴ for all ΔW and extras together, since t moves both factors.

    Args:
        task: what it was sent.
        end: what it sent.
        a: ‖s (dB A₀ + B₀ dA)‖², and that of the extras' change.
        b: ⟨s (dB A₀ + B₀ dA), s dB dA⟩.
        c: ‖s dB dA‖².
        raw: ‖dA‖² + ‖dB‖² and the extras', its root: the length of the line itself.
    """

    task: Task
    end: Adapter
    a: float
    b: float
    c: float
    raw: float

    @classmethod
    def of(cls, task: Task, end: Adapter) -> "Segment":
        """The segment of a client."""
        total, start, last = torch.zeros(2, 2, dtype=torch.float64), task.adapter.plain(), end.plain()
        for name, given in start.pairs.items():
            sent, got, dA, dB = _moved(given, last.pairs[name])
            first = Pair(torch.cat([sent.A, dA]), torch.cat([dB, sent.B], dim=1), got.scale)
            total += gram([first, Pair(dA, dB, got.scale)]).cpu()
        head = float(_extras(start, last).norm()) ** 2
        raw = float(flat(factor_change(task.adapter, end, task)).norm())
        return cls(task, end, float(total[0, 0]) + head, float(total[0, 1]), float(total[1, 1]), raw)

    def length(self, t: float = 1.0) -> float:
        """‖Δ(t)‖ over all ΔW and extras."""
        return math.sqrt(max(0.0, self.a * t**2 + 2 * self.b * t**3 + self.c * t**4))

    def within(self, bound: float, raw: float = math.inf) -> float:
        """A t from 0 to 1 at which the change is no longer than `bound`, nor the line so far than `raw`."""
        low, high = 0.0, min(1.0, raw / self.raw if self.raw else 1.0)
        if self.length(high) <= bound:
            return high
        for _ in range(60):  # halving: as exact as a float gets
            middle = (low + high) / 2
            low, high = (middle, high) if self.length(middle) <= bound else (low, middle)
        return low

    def at(self, t: float) -> Adapter:
        """The adapter there; all that is not shared stays as it was sent, bit for bit."""
        if t == 1:
            return self.end
        moved = factor_change(self.task.adapter, self.end, self.task)
        return moved_factors(self.task, {name: t * tensor for name, tensor in moved.items()})


def _moved(sent: Pair, got: Pair) -> tuple[Pair, Pair, Tensor, Tensor]:
    """Both in float64, in one rank and scale, and dA and dB."""
    rank = max(sent.rank, got.rank)
    sent, got = (pad(Pair(p.A.double(), p.B.double(), p.scale), rank) for p in (sent, got))
    got = rescale(got, sent.scale)
    return sent, got, got.A - sent.A, got.B - sent.B


def _extras(sent: Adapter, got: Adapter) -> Tensor:
    """The change of the extras as one vector, float64."""
    return flat({name: got.extra[name].double() - old.double() for name, old in sent.extra.items()}).double()


def _apart(products: Tensor) -> Tensor:
    """Squared distances from inner products; rounding makes none negative."""
    own = products.diagonal()
    return (own[:, None] + own[None, :] - 2 * products).clamp_min(0).fill_diagonal_(0)
