"""The DP-SGD step of K clients whose factors lie in stacks: each row is clipped by its own client's clip.

A client's sum, noise and batch size are its own, and its noise comes from its own source, in the order in
which a `PrivateOptimizer` would draw it for the client alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedlora.models.pack import upload
from fedlora.models.stacks import Stacks
from fedlora.privacy.clipping import shares
from fedlora.privacy.plan import Mechanism


class PrivateStacks:
    """Turns the rows' gradients of all slots into clipped and noised gradients of stacks and heads.

    Nothing of it waits for the device.

    Args:
        mechanisms: one a slot, each with a source of its own.
        stacks: the factors.
        heads: of each slot the parameters of its head that are trained.

    Attributes:
        numbers: of a row's gradient, padding included.
    """

    def __init__(
        self, mechanisms: Sequence[Mechanism], stacks: Stacks, heads: Sequence[Sequence[nn.Parameter]]
    ) -> None:
        self._mechanisms, self._stacks, self._heads = mechanisms, stacks, heads
        self._width = sum(value.shape[1] for value in stacks.values.values())
        self.numbers = self._width + sum(p.numel() for p in heads[0])
        device = stacks.anchor.device
        self._total = torch.zeros(len(mechanisms), self.numbers, dtype=torch.float64, device=device)
        # How many rows were longer than the clip, and how many there were: of the step, and before it.
        self._shortened = torch.zeros(2, len(mechanisms), dtype=torch.long, device=device)
        self._seen = [[0] * len(mechanisms), [0] * len(mechanisms)]
        self._indices = stacks.indices()
        self._dtype = next(p.dtype for p in (*stacks.values.values(), *heads[0]))

    def add(self, rows: Tensor, counts: Sequence[int]) -> None:
        """Add the rows of a micro-batch, each clipped, to their slots' sums of the step.

        Added up in float64 and not as a matrix product, which on a GPU may round the factors to where a row
        is longer than the clip.

        Args:
            rows: (rows, numbers), the slots one after the other; they are used up.
            counts: how many rows each slot has.
        """
        clips = torch.tensor([own.clip for own in self._mechanisms], dtype=torch.float64)
        each = upload(clips.repeat_interleave(torch.tensor(counts)), rows.device)
        factor, shortened = shares(rows, each)
        rows.mul_(factor.to(rows)[:, None])
        start = 0
        for slot, count in enumerate(counts):
            if count:
                own = slice(start, start + count)
                self._total[slot] += rows[own].sum(0, dtype=torch.float64)
                self._shortened[0, slot] += shortened[own].sum()
                self._seen[0][slot] += count
                start += count

    def forget(self) -> None:
        """Forget the sums of the step."""
        self._total.zero_()
        self._shortened[0] = 0
        self._seen[0] = [0] * len(self._mechanisms)

    def release(self, slots: Sequence[int]) -> None:
        """Write these slots' noised means into the gradients of their factors and heads.

        The sums of the step are forgotten.
        """
        self._shortened[1] += self._shortened[0]
        self._seen[1] = [sum(pair) for pair in zip(*self._seen, strict=True)]
        for slot in slots:
            self._noise(slot)
            mean = self._total[slot].to(self._dtype).div_(self._mechanisms[slot].batch_size)
            at = 0
            for value in self._stacks.values.values():
                assert value.grad is not None
                value.grad[slot].copy_(mean[at : at + value.shape[1]])
                at += value.shape[1]
            for p in self._heads[slot]:
                p.grad = mean[at : at + p.numel()].view(p.shape).to(p, copy=True)
                at += p.numel()
        self.forget()

    def clipped(self, slot: int) -> float:
        """The share of a slot's rows that were longer than its clip; waits for the device."""
        return int(self._shortened[1, slot]) / max(1, self._seen[1][slot])

    def _noise(self, slot: int) -> None:
        """Add Gaussian noise of standard deviation σ · clip to every trained number of a slot's sum."""
        own, indices = self._mechanisms[slot], self._indices[slot]
        factors = self._total[slot, : self._width]
        head = self._total[slot, self._width :]
        count = self._width if indices is None else len(indices)
        noise = own.source.normals(count + len(head), self._total.device).mul_(own.sigma * own.clip)
        if indices is None:
            factors += noise[:count]
        else:
            factors.index_add_(0, indices, noise[:count])
        head += noise[count:]
