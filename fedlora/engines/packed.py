"""Objects in bytes, their tensors beside them as arrays, which Ray's object store lends without a copy.

The base model of a run is packed once, and every actor of a machine builds it over the one copy of its
weights that the object store of the machine holds.
"""

import io
import pickle
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # other kinds, such as quantized weights, know how to pickle themselves


@dataclass(frozen=True)
class Packed:
    """An object without its tensors, and these.

    Args:
        rest: the pickled object, uint8, (bytes,).
        tensors: of each tensor its values in one row of bytes.
        forms: of each tensor what it is made of these bytes.
    """

    rest: np.ndarray
    tensors: Sequence[np.ndarray]
    forms: Sequence["Form"]

    @property
    def nbytes(self) -> int:
        """What it takes in an object store."""
        return int(self.rest.nbytes + sum(tensor.nbytes for tensor in self.tensors))


@dataclass(frozen=True)
class Form:
    """What makes a tensor of bytes.

    Args:
        dtype: its type.
        shape: its shape.
        device: the kind of its device; of several GPUs an actor sees its own as the first.
        parameter: whether it is a parameter of a module.
        trained: whether it asks for a gradient.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: str
    parameter: bool
    trained: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Form":
        """The form of a tensor."""
        parameter = isinstance(tensor, nn.Parameter)
        return cls(tensor.dtype, tuple(tensor.shape), tensor.device.type, parameter, tensor.requires_grad)

    def make(self, data: np.ndarray) -> Tensor:
        """The tensor of these bytes: a frozen parameter on the CPU lies over them, all else is a copy."""
        frozen = self.parameter and not self.trained
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody must write to what is lent
            flat = torch.from_numpy(data)
        found = (flat.view(self.dtype) if len(data) else flat.to(self.dtype)).reshape(self.shape)
        if self.device != "cpu":
            found = found.to(self.device)
        elif not frozen:
            found = found.clone()
        return nn.Parameter(found, self.trained) if self.parameter else found.requires_grad_(self.trained)


def pack(thing: Any) -> Packed:
    """An object of any kind, packed; a tensor that is in it twice is packed once.

    Classes and functions of the main module travel with it, all others by their names.
    """
    from ray import cloudpickle

    found: dict[int, tuple[int, Tensor]] = {}

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc, name-defined, no-any-unimported]
        def persistent_id(self, part: object) -> int | None:
            if type(part) not in PLAIN or part.layout != torch.strided:  # type: ignore[attr-defined]
                return None
            return found.setdefault(id(part), (len(found), part))[0]  # type: ignore[arg-type]

    file = io.BytesIO()
    pickler: Any = Pickler(file, protocol=5)  # type: ignore[no-untyped-call]
    pickler.dump(thing)
    tensors = [tensor for _, tensor in found.values()]
    data = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy() for t in tensors]
    return Packed(np.frombuffer(file.getbuffer(), np.uint8), data, [Form.of(t) for t in tensors])


def unpack(packed: Packed) -> Any:
    """The object again."""
    tensors = [form.make(data) for form, data in zip(packed.forms, packed.tensors, strict=True)]

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Tensor:
            return tensors[number]

    return Unpickler(io.BytesIO(packed.rest.tobytes())).load()
