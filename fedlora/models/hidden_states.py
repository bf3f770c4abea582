"""What flows past one place of a model, for a client that builds on a frozen model's own features."""

import threading
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fedlora.errors import ModelError
from fedlora.models.base import Base


class HiddenStateHook:
    """The hidden states at one place, as of this thread's last pass; for use in a `with` block.

    Args:
        base: the model.
        module: the module whose input is wanted; empty takes the output of the encoder under the head.
    """

    def __init__(self, base: Base, module: str = "") -> None:
        self._model, self._module, self._by_row = base.model, module, base.traits.by_row
        self._seen = threading.local()  # passes may be on their way in several threads
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    def __enter__(self) -> Self:
        if self._module:
            if self._by_row is not None and self._module not in self._by_row:
                raise ModelError(
                    f"'{self._module}' is not fed one row for each row of the batch, so that its input "
                    "cannot be told apart by row; choose other lora.targets"
                )
            place = self._model.get_submodule(self._module)
            self._handle = place.register_forward_pre_hook(self._enter, with_kwargs=True)
        else:
            self._handle = self._model.base_model.register_forward_hook(self._leave)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._handle.remove()

    def states(self) -> Tensor:
        """The states themselves, (rows, tokens, width) or (rows, width).

        Raises:
            ModelError: nothing has flowed past.
        """
        if (found := getattr(self._seen, "states", None)) is None:
            raise ModelError(f"'{self._module}' is never called by this model; choose other lora.targets")
        states: Tensor = found
        return states

    def pooled(self, mask: Tensor) -> Tensor:
        """Their mean over a row's real tokens, (rows, width); the states where they are one a row already.

        Args:
            mask: 1 for real tokens, (rows, tokens).

        Raises:
            ModelError: not every token's states have come past, since the bank leaves them out.
        """
        states = self.states()
        if states.ndim == 2:
            return states
        if states.shape[1] != mask.shape[1]:
            raise ModelError(
                f"expected the states of {mask.shape[1]} tokens, got {states.shape[1]}: open the bank with "
                "every_token=True"
            )
        real = mask.to(states)[:, :, None]
        return (states * real).sum(1) / real.sum(1)

    def _enter(self, module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._seen.states = args[0] if args else next(iter(named.values()))

    def _leave(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        self._seen.states = output[0]
