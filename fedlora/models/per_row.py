"""Each row's own gradient: every row of a batch gets a copy of what it is trained by, to differentiate by.

The copies are views, so that they cost nothing; what a layer makes of them is the same number as of the one
parameter. The gradient with respect to a row's copy is the gradient of that row's loss, whatever the head.
"""

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.routing import Segments

# Parameters of a model below which padding costs a CPU less than products of rows of several lengths.
SMALL = 3_000_000

_calling = threading.Lock()  # functional_call puts parameters into the one module for a while


class Copies:
    """The rows' copies of parameters, in the batch of each thread.

    Args:
        trained: each slot's trained parameters; empty where rows need no gradient of their own.
        room: makes room for the gradients of so many rows, of what is differentiated by in another way.
    """

    def __init__(
        self,
        trained: Sequence[Sequence[nn.Parameter]],
        room: Callable[[int], "RowGradients | None"] | None = None,
    ) -> None:
        self.on = any(trained)
        self._trained, self._room, self._here = trained, room, threading.local()

    @property
    def batch(self) -> Any:
        """The copies of this thread's batch, to be put into another thread that computes the same."""
        return getattr(self._here, "batch", ({}, None))

    @batch.setter
    def batch(self, batch: Any) -> None:
        self._here.batch = batch

    @property
    def gradients(self) -> "RowGradients | None":
        """Where the gradients of the rows of this thread's batch go, if there is room for them."""
        found: RowGradients | None = self.batch[1]
        return found

    def make(self, counts: Sequence[int]) -> None:
        """Copies for this thread's next batch, of so many rows a slot."""
        copies = {
            parameter: parameter.detach().expand(count, *parameter.shape).requires_grad_()
            for count, trained in zip(counts, self._trained, strict=False)
            for parameter in (trained if count else ())
        }
        self.batch = copies, None if self._room is None else self._room(sum(counts))

    def of(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's copies, (rows, *shape); the parameter itself where it has none."""
        found: Tensor = self.batch[0].get(parameter, parameter)
        return found


class RowGradients:
    """The gradients of a batch's rows, one below the other: factors in the order of the stacks, then a head.

    Args:
        rows: how many.
        widths: of each tensor of the stacks how many numbers a slot has in it.
        more: numbers of a head.
        device: where the model is.
        dtype: of the factors, at least as precise as float32.
    """

    def __init__(
        self, rows: int, widths: Mapping[str, int], more: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        stops = list(itertools.accumulate((*widths.values(), more)))
        self._spans = dict(zip((*widths, "head"), itertools.pairwise((0, *stops)), strict=True))
        self._form: dict[str, Any] = {"size": (rows, stops[-1]), "device": device, "dtype": dtype}
        self._silent = 0

    @cached_property
    def whole(self) -> Tensor:
        """All of them, (rows, numbers); there from the first on, which is on the way back."""
        return torch.zeros(**self._form)

    def of(self, tensor: str) -> Tensor:
        """Those of a tensor of the stacks, or of the "head", (rows, its numbers)."""
        start, stop = self._spans[tensor]
        return self.whole[:, start:stop]

    def put_head(self, rows: tuple[int, int], gradients: Sequence[Tensor | None]) -> None:
        """Put a slot's head into its rows.

        Args:
            rows: the first and the last of them.
            gradients: of the head's tensors, (rows, *shape) each; None of one that got none.
        """
        there = [grad.reshape(len(grad), -1) for grad in gradients if grad is not None]
        self._silent += len(gradients) - len(there)
        if there and len(there) == len(gradients):
            self.of("head")[slice(*rows)] = torch.cat(there, dim=1)

    def complete(self, silent: int) -> Tensor:
        """All of them, (rows, numbers), once they are there.

        Args:
            silent: tensors besides a head's that got no gradient.

        Raises:
            ModelError: there is such a tensor.
        """
        if silent + self._silent:
            raise ModelError(
                f"private training: {len(self.whole)} records went in, but {silent + self._silent} of the "
                "tensors to train have gradients of 0; this model cannot be trained privately with these "
                "targets"
            )
        return self.whole


def packs_rows(base: Base) -> bool:
    """Whether rows with gradients of their own are fed faster end to end than padded."""
    return base.products is not None or sum(p.numel() for p in base.model.parameters()) >= SMALL


def stand_in(heads: Sequence[nn.Module], copies: Copies, segments: Callable[[Tensor], Segments]) -> Any:
    """The forward of a head that sends each slot's rows through the slot's own.

    Args:
        heads: one a slot.
        copies: of their parameters, for rows that have their own.
        segments: of an input the first and last row of each slot.
    """
    dtype = next(heads[0].parameters()).dtype
    parameters = [dict(head.named_parameters()) for head in heads]  # call_rows lends the module others

    def forward(x: Tensor, *rest: Any, **named: Any) -> Tensor:
        x = x.to(dtype)
        rows = [(k, *ends) for k, ends in enumerate(segments(x)) if ends[1] > ends[0]]
        if copies.on:
            own = {
                key: torch.cat([copies.of(parameters[k][key]) for k, _, _ in rows]) for key in parameters[0]
            }
            return call_rows(heads[0], own, x, rest, named)
        return torch.cat([heads[k](x[start:stop], *rest, **named) for k, start, stop in rows])

    return forward


def call_rows(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    rest: Sequence[Any],
    named: Mapping[str, Any],
) -> Tensor:
    """What a module makes of each row with the row's own parameters; no row meets another.

    Args:
        module: whose form is used, not its values.
        parameters: name -> (rows, *shape).
        x: (rows, ...).
        rest: further arguments, the same for all rows.
        named: and named ones.
    """

    def call(own: dict[str, Tensor], row: Tensor) -> Tensor:
        found: Tensor = functional_call(module, own, (row[None], *rest), dict(named))
        return found[0]

    with _calling:
        made: Tensor = vmap(call)(dict(parameters), x)
    return made
