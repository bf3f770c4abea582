"""Whether an update has the form of what it answers to, and the same in the precision of the state."""

from dataclasses import replace

import torch

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Update
from fedlora.errors import IncompatibleUpdates


def lifted(update: Update, expected: Adapter) -> Update:
    """The update without autograd graphs, and in no lower precision than the state."""
    kinds = {name: tensor.dtype for name, tensor in expected.tensors()}
    tensors = {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, kinds.get(name, tensor.dtype)))
        for name, tensor in update.adapter.tensors()
    }
    return replace(update, adapter=update.adapter.with_tensors(tensors))


def check_fit(expected: Adapter, got: Adapter, who: str) -> None:
    """Raise IncompatibleUpdates unless modules, extras and all shapes but the rank are the expected ones."""
    for kind, want, have in (
        ("modules", expected.pairs.keys(), got.pairs.keys()),
        ("extra tensors", expected.extra.keys(), got.extra.keys()),
    ):
        if want != have:
            raise IncompatibleUpdates(
                f"{who} sent other {kind} than the global adapter has: "
                f"missing {sorted(want - have)[:3]}, unknown {sorted(have - want)[:3]}"
            )
    parts = [(module, tensor) for module, pair in got.pairs.items() for _, tensor in pair.factors()]
    for name, tensor in [*parts, *got.extra.items()]:
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise IncompatibleUpdates(f"{who} sent NaN or infinity for '{name}': its training diverged")
    for module, pair in got.pairs.items():
        if pair.shape != expected.pairs[module].shape:
            raise IncompatibleUpdates(
                f"{who} sent an update of shape {pair.shape} for '{module}', "
                f"expected {expected.pairs[module].shape}"
            )
    shapes = {name: tensor.shape for name, tensor in expected.extra.items()}
    for module, own in expected.own_factors().items():
        if module in got.pairs:  # of the rank that was sent
            resized = expected.parametrization.resize(own, got.pairs[module].rank)
            shapes |= {f"{module}.{word}": tensor.shape for word, tensor in resized.items()}
    for name, tensor in got.extra.items():
        if tensor.shape != shapes[name]:
            raise IncompatibleUpdates(
                f"{who} sent shape {tuple(tensor.shape)} for '{name}', expected {tuple(shapes[name])}"
            )
