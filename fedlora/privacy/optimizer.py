"""Opacus' DP-SGD step, with random numbers of our own and the guards that the stock one lacks."""

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.privacy.plan import Mechanism

MARGIN = 1e-5  # relative; more than the rounding of `_norms`, so that no row is over the clip
BLOCK = 1024  # numbers that are squared and added in float32; of more, rounding would reach the margin


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """From per-row gradients to one noised gradient, for the optimizer inside to step with.

    A parameter's `grad_sample` is a list of (rows, *shape), one a micro-batch of the step; all parameters
    have the same rows in the same order. Different from Opacus' own: rows are counted against those that went
    in; a row that is not finite counts as zero, instead of making all NaN; noise is drawn by a cryptographic
    generator and added in float64; the clip has a margin for rounding; no row at all makes a step of noise.

    Args:
        optimizer: what moves the parameters.
        mechanism: clip, noise, batch size.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, mechanism: Mechanism) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=mechanism.sigma,
            max_grad_norm=mechanism.clip,
            expected_batch_size=mechanism.batch_size,
        )
        self._source = mechanism.source
        for p in self.params:
            p.grad_sample = None
        self.steps = 0  # released so far
        self._total = torch.zeros(0)  # of the clipped rows, all parameters in one vector
        self.clipped = self.seen = 0  # rows; how many were clipped is the client's own business, never sent

    def release(self, rows: int) -> None:
        """Put the noised mean of `rows` rows' gradients into `grad`, and forget the rows.

        Raises:
            ModelError: a parameter has gradients of other rows; nothing is released then.
        """
        self._check(rows)
        self.clip_and_accumulate()
        self.add_noise()
        self.scale_grad()
        self.steps += 1
        for p in self.params:
            p.grad_sample = None

    @property
    def accumulated_iterations(self) -> int:
        """One: the micro-batches of a step are one Poisson batch."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Sum the rows' gradients, each with its joint norm over all parameters at most the clip.

        All parameters side by side in one matrix a micro-batch: few large operations, where many small ones
        of several clients' threads would wait for each other.
        """
        self._total = torch.zeros(sum(p.numel() for p in self.params), dtype=torch.float64)
        for chunk in zip(*(p.grad_sample or [] for p in self.params), strict=True):
            rows = torch.cat([g.reshape(len(g), -1) for g in chunk], dim=1)
            norms = _norms(rows)
            finite = norms.isfinite()
            if not finite.all():
                rows = torch.where(finite[:, None], rows, torch.zeros_like(rows))
                norms = torch.where(finite, norms, torch.zeros_like(norms))
            factor = (self.max_grad_norm / (norms * (1 + MARGIN)).clamp_min(1e-300)).clamp_max(1.0)
            self._total += (factor.to(rows) @ rows).to(self._total)
            self.seen += len(norms)
            self.clipped += int((factor < 1).sum())

    def add_noise(self) -> None:
        """Add one draw of noise over all parameters, of σ times the clip in every coordinate."""
        noise = self._source.normals(len(self._total)).mul_(self.noise_multiplier * self.max_grad_norm)
        noised = torch.split(noise.add_(self._total), [p.numel() for p in self.params])
        for p, own in zip(self.params, noised, strict=True):
            p.grad = own.view(p.shape).to(p)

    def _check(self, rows: int) -> None:
        """Every parameter has one gradient for each row that went in, micro-batch by micro-batch."""
        forms = [[tuple(g.shape) for g in p.grad_sample or []] for p in self.params]
        for p, found in zip(self.params, forms, strict=True):
            counts = [shape[0] for shape in found]
            if sum(counts) != rows or counts != [shape[0] for shape in forms[0]]:
                raise ModelError(
                    f"private training: {rows} records went in, a tensor of shape {tuple(p.shape)} has "
                    f"gradients of {sum(counts)}; this model cannot be trained privately with these targets"
                )
            if any(shape[1:] != tuple(p.shape) for shape in found):
                raise ModelError(f"private training: expected rows of {tuple(p.shape)}, got {found}")


def _norms(rows: Tensor) -> Tensor:
    """The norm of each row, (rows,), float64: blocks in the rows' own type, then their sum in float64.

    In float32 alone, the norm of millions of like numbers comes out a thousandth too small.
    """
    count = rows.shape[1] // BLOCK
    whole = rows[:, : count * BLOCK].reshape(len(rows), count, BLOCK)
    blocks = torch.linalg.vector_norm(whole, dim=2)
    rest = torch.linalg.vector_norm(rows[:, count * BLOCK :], dim=1, keepdim=True)
    norms: Tensor = torch.linalg.vector_norm(torch.cat([blocks, rest], dim=1).double(), dim=1)
    return norms
