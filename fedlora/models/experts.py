"""Experts that a model keeps in one parameter of three dimensions, each of them as a linear layer of its own.

Mixtral, Qwen3-MoE, OLMoE, gpt-oss and others keep the weights of all experts of a layer in one parameter,
`mlp.experts.gate_up_proj`, (experts, d_out, d_in). Here expert 3 of it is the linear layer
`mlp.experts.gate_up_proj[3]`, with a pair A, B as every layer has one, so that whatever combines pairs
combines expert by expert. In PEFT's files the pairs of a parameter are one A and one B.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Pair
from fedlora.core.algebra import pad, rescale
from fedlora.errors import ModelError

NAME = re.compile(r"(.+)\.([^.]+)\[(\d+)\]")


@dataclass(frozen=True)
class Expert:
    """One expert's part of a parameter, as a linear layer.

    Args:
        module: that holds the parameter.
        parameter: the parameter's name there; it is (experts, d_out, d_in), or (experts, d_in, d_out) where
            the module says `is_transposed`.
        index: which expert.
    """

    module: nn.Module
    parameter: str
    index: int

    @property
    def weight(self) -> Tensor:
        """The expert's weight, (d_out, d_in), a view without a gradient."""
        one: Tensor = getattr(self.module, self.parameter).detach()[self.index]
        return one.T if getattr(self.module, "is_transposed", False) else one

    @property
    def bias(self) -> Tensor | None:
        """The expert's bias, (d_out,), or None."""
        found: Tensor | None = getattr(self.module, f"{self.parameter}_bias", None)
        return None if found is None else found.detach()[self.index]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        d_out, d_in = self.weight.shape
        return d_out, d_in


def place(name: str) -> tuple[str, str, int] | None:
    """Module, parameter and expert of a name such as "mlp.experts.gate_up_proj[3]"; None of a module's."""
    found = NAME.fullmatch(name)
    return None if found is None else (found[1], found[2], int(found[3]))


def kind(name: str) -> str:
    """A layer's name as settings have it: of an expert the parameter, as all of its experts are alike."""
    found = place(name)
    return name if found is None else f"{found[0]}.{found[1]}"


def layer_at(model: nn.Module, name: str) -> nn.Module | Expert:
    """The layer of a name: a module, or one expert of a parameter.

    Raises:
        ModelError: the model has no such module, parameter or expert.
    """
    found = place(name)
    try:
        module = model.get_submodule(name if found is None else found[0])
    except AttributeError as error:
        raise ModelError(f"the adapter has factors for '{name}', a module that the model lacks") from error
    if found is None:
        return module
    held = getattr(module, found[1], None)
    if not isinstance(held, nn.Parameter) or held.ndim != 3 or found[2] >= len(held):
        what = tuple(held.shape) if isinstance(held, Tensor) else "nothing"
        raise ModelError(
            f"the adapter has factors for '{name}', expected a parameter with so many experts, got {what}"
        )
    return Expert(module, found[1], found[2])


def lacking(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Which of these layers the model does not have.

    Args:
        model: whose layers.
        names: of modules or experts.
    """
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    return [n for n in names if n not in modules and not (place(n) and kind(n) in parameters)]


def wrapper(model: nn.Module, name: str, adapted: Iterable[str]) -> str:
    """What stands before "lora_A.weight" in PEFT's name for the factors of a parameter.

    It wraps the module once for each of its parameters that have factors, in the module's own order, so that
    the last one is outermost.

    Args:
        model: that has the parameter.
        name: of the parameter.
        adapted: the names of all parameters with factors.
    """
    path, _, parameter = name.rpartition(".")
    module, every = model.get_submodule(path), {*adapted}
    order = [n for n, _ in module.named_parameters(recurse=False) if f"{path}.{n}" in every]
    return f"{path}." + "base_layer." * (len(order) - 1 - order.index(parameter))


@dataclass(frozen=True)
class Joined:
    """The pairs of all experts of a parameter as PEFT has them, in one rank and one scale.

    `B @ A` mixes the experts and is the change of none.

    Args:
        A: (experts · rank, d_in), expert after expert.
        B: (d_out, rank · experts), in which the expert runs fastest.
        rank: of each expert.
        scale: of each expert.
    """

    A: Tensor
    B: Tensor
    rank: int
    scale: float


def join(pairs: Mapping[str, Pair], model: nn.Module) -> dict[str, Joined]:
    """Parameter -> its experts' pairs as PEFT has them; smaller ranks are padded with zeros.

    Args:
        pairs: by name; those of whole modules are left out.
        model: whose experts they are; one without a pair gets zeros.
    """
    found: dict[str, dict[int, Pair]] = {}
    for name, pair in pairs.items():
        if at := place(name):
            found.setdefault(kind(name), {})[at[2]] = pair
    joined = {}
    for name, own in found.items():
        number = len(model.get_parameter(name))
        first, rank = next(iter(own.values())), max(pair.rank for pair in own.values())
        nothing = Pair(first.A[:0], first.B[:, :0], first.scale)
        each = [pad(rescale(own.get(e, nothing), first.scale), rank) for e in range(number)]
        B = torch.stack([pair.B for pair in each], dim=-1).flatten(1)
        joined[name] = Joined(torch.cat([pair.A for pair in each]), B, rank, first.scale)
    return joined


def part(joined: Joined, name: str) -> dict[str, Pair]:
    """Each expert's own pair, by its name.

    Args:
        joined: the pairs of all.
        name: of the parameter.
    """
    number = len(joined.A) // joined.rank
    A = joined.A.reshape(number, joined.rank, -1)
    B = joined.B.reshape(len(joined.B), joined.rank, number).permute(2, 0, 1)
    plain = torch.contiguous_format  # a copy, whatever the strides

    def own(e: int) -> Pair:
        return Pair(A[e].clone(memory_format=plain), B[e].clone(memory_format=plain), joined.scale)

    return {f"{name}[{e}]": own(e) for e in range(number)}


def fitting(model: nn.Module, wanted: Iterable[str]) -> dict[str, list[str]]:
    """Name -> the model's parameters that it means, by PEFT's rule: the whole name, or its end after a dot.

    Args:
        model: whose parameters.
        wanted: names; a `*` stands for anything.
    """
    names = [name for name, _ in model.named_parameters()]
    return {one: [n for n in names if re.fullmatch(_pattern(one), f".{n}")] for one in wanted}


def _pattern(name: str) -> str:
    return r".*\." + re.escape(name).replace(r"\*", ".*")
