"""The DP-SGD step of Opacus with a cryptographic source of noise and additional checks."""

from collections.abc import Mapping

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from fedlora.errors import ModelError
from fedlora.privacy.clipping import Clipped, clipped
from fedlora.privacy.plan import Mechanism


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Turns per-row gradients into one clipped and noised gradient, with which the inner optimizer steps.

    The rows of a micro-batch are clipped and summed by `clip`, which threads may call side by side, and the
    sums are added up by `add`, in the order of micro-batches. So no more rows' gradients are kept than those
    of a micro-batch. It differs from Opacus' optimizer in five points: the number of rows is checked; a row
    that is not finite counts as zero, instead of making the sum NaN; the noise comes from a cryptographic
    generator and is added in float64; the clip has a margin for rounding; and an empty batch gives a step of
    noise alone.

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
        self.steps = 0  # steps released so far
        self.seen = 0  # number of rows
        where = self.params[0].device
        self._device = where if where.type != "mps" else torch.device("cpu")  # which has no float64
        self._total: Tensor | None = None  # the sum of the clipped rows, all parameters in one vector
        self._rows = 0  # that are in it
        self._shortened = torch.zeros((), dtype=torch.long, device=self._device)

    @property
    def clipped(self) -> int:
        """How many rows were longer than the clip; sent only with privacy.public_metrics."""
        return int(self._shortened)

    @property
    def accumulated_iterations(self) -> int:
        """Always 1: the micro-batches of a step are one Poisson batch."""
        return 1

    def clip(self, gradients: Mapping[nn.Parameter, Tensor | None], rows: int) -> Clipped:
        """The sum of a micro-batch's rows, each scaled to a norm over all parameters of at most the clip.

        The parameters lie side by side in one matrix. A few large operations are faster than many small ones,
        for which the threads of several clients would wait for each other.

        Args:
            gradients: of all that is trained, and maybe of others, (rows, *shape).
            rows: how many went in.

        Raises:
            ModelError: a parameter has gradients of another number of rows.
        """
        found = []
        for p in self.params:
            grad = gradients.get(p)
            got = 0 if grad is None else len(grad)
            if grad is None or got != rows:
                raise ModelError(
                    f"private training: {rows} records went in, but a tensor of shape {tuple(p.shape)} has "
                    f"gradients of {got}; this model cannot be trained privately with these targets"
                )
            if grad.shape[1:] != p.shape:
                got_shape = tuple(grad.shape)
                raise ModelError(f"private training: expected rows of {tuple(p.shape)}, got {got_shape}")
            found.append(grad.reshape(rows, -1))
        return clipped(torch.cat(found, dim=1), self.max_grad_norm)

    def add(self, found: Clipped) -> None:
        """Add what `clip` has made to the sum of the step."""
        if self._total is None:
            self._total = self._zeros()
        self._total += found.total.to(self._total)
        self._shortened += found.shortened.to(self._device)
        self._rows += found.rows

    def release(self, rows: int) -> None:
        """Write the noised mean of the gradients of `rows` rows into `grad`, and forget the rows.

        Raises:
            ModelError: the gradients of another number of rows were added; nothing is released then.
        """
        if self._rows != rows:
            raise ModelError(
                f"private training: {rows} records went in, but there are gradients of {self._rows}"
            )
        self.add_noise()
        self.scale_grad()
        self.steps += 1
        self.seen += rows
        self._total, self._rows = None, 0

    def add_noise(self) -> None:
        """Add Gaussian noise of standard deviation σ · clip to every number of the sum."""
        total = self._zeros() if self._total is None else self._total
        noise = self._source.normals(len(total), self._device)
        noise = noise.mul_(self.noise_multiplier * self.max_grad_norm).add_(total)
        noised = torch.split(noise, [p.numel() for p in self.params])
        for p, own in zip(self.params, noised, strict=True):
            p.grad = own.view(p.shape).to(p)

    def _zeros(self) -> Tensor:
        count = sum(p.numel() for p in self.params)
        return torch.zeros(count, dtype=torch.float64, device=self._device)
