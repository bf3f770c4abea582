"""Each row's own gradient: every row of a batch gets a copy of what it is trained by, to differentiate by.

The copies are views, so that they cost nothing; what a layer makes of them is the same number as of the one
parameter. The gradient with respect to a row's copy is the gradient of that row's loss, whatever the head.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call, vmap

_calling = threading.Lock()  # functional_call puts parameters into the one module for a while


class Copies:
    """The rows' copies of parameters, in the batch of each thread.

    Args:
        trained: each slot's trained parameters; empty where rows need no gradient of their own.
    """

    def __init__(self, trained: Sequence[Sequence[nn.Parameter]]) -> None:
        self.on = any(trained)
        self._trained, self._here = trained, threading.local()

    @property
    def batch(self) -> dict[nn.Parameter, Tensor]:
        """The copies of this thread's batch, to be put into another thread that computes the same."""
        return getattr(self._here, "copies", {})

    @batch.setter
    def batch(self, copies: dict[nn.Parameter, Tensor]) -> None:
        self._here.copies = copies

    def make(self, counts: Sequence[int]) -> None:
        """Copies for this thread's next batch, of so many rows a slot."""
        self.batch = {
            parameter: parameter.detach().expand(count, *parameter.shape).requires_grad_()
            for count, trained in zip(counts, self._trained, strict=False)
            for parameter in (trained if count else ())
        }

    def of(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's copies, (rows, *shape); the parameter itself where it has none."""
        return self.batch.get(parameter, parameter)


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
