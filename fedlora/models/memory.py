"""What a device's memory holds beside a model: how large a micro-batch may be, found by trying."""

import warnings
from collections.abc import Callable

import torch

from fedlora.errors import ModelError

UNTRIED = 4096  # tokens of a micro-batch on a GPU where none was measured yet
MOST = 8192  # tokens of a micro-batch from which on a GPU is busy whatever the model
LEAST = 256
TRIED = 1024  # tokens of the micro-batch that is measured, at most
SHARE = 0.8  # of the free memory that a micro-batch may take
ROWS_SHARE = 0.125  # of the free memory of a GPU that the gradients of a micro-batch's rows may take
ROWS_ROOM = 2**28  # bytes that they may take on a CPU, in each thread


class Memory:
    """What fits beside a model on its device. One object goes with a model and learns by what it sees.

    Args:
        device: where the model is.
        checkpointing: whether layers are checkpointed; None where only a row does not fit otherwise.
        checkpoints: whether the model's layers can be.

    Attributes:
        tokens: of a micro-batch, at most; None where that is not known, or not limited by memory.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        checkpointing: bool | None = None,
        checkpoints: bool = False,
    ) -> None:
        self._device = torch.device(device)
        self.checkpointing = bool(checkpointing)
        self._may_checkpoint = checkpoints and checkpointing is None
        self.tokens: int | None = None
        self._rows_room: float | None = None if self._device.type == "cuda" else ROWS_ROOM

    @property
    def unknown(self) -> bool:
        """Whether a micro-batch is to be measured before the first one."""
        return self._device.type == "cuda" and self.tokens is None

    def limit(self, tokens: int | None) -> int | None:
        """The tokens that a micro-batch may hold; None on a CPU where nobody says so: the rows decide.

        Args:
            tokens: what the user says, if anything.
        """
        known = [limit for limit in (tokens, self.tokens) if limit is not None]
        return min(known, default=None if self._device.type == "cpu" else UNTRIED)

    def rows(self, numbers: int) -> int | None:
        """How many rows a micro-batch may hold; None where rows have no gradients of their own.

        A power of two, for the reason that `measure` has.

        Args:
            numbers: of a row's own gradient, in float32; 0 where it has none.
        """
        if not numbers:
            return None
        if self._rows_room is None:
            free = torch.cuda.mem_get_info(self._device)[0] + torch.cuda.memory_reserved(self._device)
            self._rows_room = ROWS_SHARE * (free - torch.cuda.memory_allocated(self._device))
        found = int(self._rows_room / (4 * numbers))
        return 1 << (max(1, found).bit_length() - 1)

    def measure(self, trial: Callable[[], int]) -> None:
        """Learn from one micro-batch on the way there and back how many tokens fit, and say so.

        A power of two is taken, so that GPUs of one kind compute the same whatever else is on them.

        Args:
            trial: computes a micro-batch, forgets it and returns its tokens.
        """
        device = self._device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        tokens = trial()
        torch.cuda.synchronize(device)
        taken = torch.cuda.max_memory_allocated(device) - before
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
        self.tokens = fitting(tokens, taken, free)
        warnings.warn(
            f"client.micro_tokens: {self.tokens} tokens a micro-batch, since one of {tokens} took "
            f"{taken / 2**30:.2f} GB of {free / 2**30:.1f} GB that are free on {device}",
            stacklevel=2,
        )

    def shrink(self, tokens: int, longest: int) -> None:
        """Learn that a micro-batch of so many tokens does not fit: half as many, or checkpointed layers.

        Args:
            tokens: of the largest micro-batch.
            longest: of its longest row.

        Raises:
            ModelError: a single row does not fit, and the layers cannot be checkpointed or are already.
        """
        if longest < tokens:
            self.tokens = max(1, tokens // 2)
            told = f"micro-batches of {tokens} tokens do not fit the memory of {self._device}; {self.tokens}"
            warnings.warn(f"{told} from now on, which changes no more than rounding", stacklevel=2)
        elif self._may_checkpoint and not self.checkpointing:
            self.checkpointing = True
            warnings.warn(
                f"a row of {longest} tokens does not fit the memory of {self._device}; layers are computed "
                "once more on the way back from now on (model.gradient_checkpointing), a third slower",
                stacklevel=2,
            )
        else:
            raise ModelError(
                f"a row of {longest} tokens does not fit the memory of {self._device}: say a smaller "
                "data.max_length, fewer clients at once (engine.fuse), or model.quantize=4bit"
            )


def fitting(tokens: int, taken: int, free: int) -> int:
    """The largest power of two of tokens that fits, from `LEAST` to `MOST`.

    Args:
        tokens: of the micro-batch that was measured.
        taken: bytes that it took.
        free: bytes that there are.
    """
    room = int(SHARE * free * tokens / max(1, taken))
    return min(MOST, max(LEAST, 1 << (max(1, room).bit_length() - 1)))
