"""The DP-SGD step of Opacus with a cryptographic source of noise and additional checks."""

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.privacy.plan import Mechanism

MARGIN = 1e-5  # relative; larger than the rounding of `_norms`, so that no row exceeds the clip
BLOCK = 1024  # numbers whose squares are added in float32; with more, rounding would exceed the margin


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Turns per-row gradients into one clipped and noised gradient, with which the inner optimizer steps.

    A parameter's `grad_sample` is a list of tensors (rows, *shape), one for each micro-batch of the step. All
    parameters have the same rows in the same order. It differs from Opacus' optimizer in five points: the
    number of rows is checked; a row that is not finite counts as zero, instead of making the sum NaN; the
    noise comes from a cryptographic generator and is added in float64; the clip has a margin for rounding;
    and an empty batch gives a step of noise alone.

    Args:
        optimizer: the inner optimizer.
        mechanism: clip, noise and batch size.
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
        self.steps = 0  # steps released so far
        self._total = torch.zeros(0)  # the sum of the clipped rows, all parameters in one vector
        self.clipped = self.seen = 0  # numbers of rows; sent only with privacy.public_metrics

    def release(self, rows: int) -> None:
        """Write the noised mean of the gradients of `rows` rows into `grad`, and delete the rows' gradients.

        Raises:
            ModelError: a parameter has gradients of another number of rows; nothing is released then.
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
        """Always 1: the micro-batches of a step are one Poisson batch."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Sum the rows' gradients, each scaled such that its norm over all parameters is at most the clip.

        The parameters of a micro-batch lie side by side in one matrix. A few large operations are faster than
        many small ones, for which the threads of several clients would wait for each other.
        """
        where = self.params[0].device
        where = where if where.type == "cuda" else torch.device("cpu")  # others may have no float64
        self._total = torch.zeros(sum(p.numel() for p in self.params), dtype=torch.float64, device=where)
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
        """Add Gaussian noise of standard deviation σ · clip to every number of the sum."""
        noise = self._source.normals(len(self._total)).mul_(self.noise_multiplier * self.max_grad_norm)
        noise = noise.to(self._total.device).add_(self._total)
        noised = torch.split(noise, [p.numel() for p in self.params])
        for p, own in zip(self.params, noised, strict=True):
            p.grad = own.view(p.shape).to(p)

    def _check(self, rows: int) -> None:
        """Check that every parameter has one gradient for each row, in every micro-batch."""
        forms = [[tuple(g.shape) for g in p.grad_sample or []] for p in self.params]
        for p, found in zip(self.params, forms, strict=True):
            counts = [shape[0] for shape in found]
            if sum(counts) != rows or counts != [shape[0] for shape in forms[0]]:
                raise ModelError(
                    f"private training: {rows} records went in, but a tensor of shape {tuple(p.shape)} has "
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
