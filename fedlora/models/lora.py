"""Which layers of a model LoRA adapts, and the adapter it starts from."""

import fnmatch
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fedlora.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.seeds import generator


def targets(base: Base, wanted: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """The modules that LoRA adapts: name -> (d_out, d_in).

    Args:
        base: the model.
        wanted: names as PEFT takes them ("query" is every module whose path ends in it), patterns with `*`,
            or "all-linear": every linear layer but the heads and the output layer.

    Raises:
        ModelError: a name that fits no linear layer; lists those that exist.
    """
    output = base.model.get_output_embeddings()
    linear = {
        name: layer_shape(module, name)
        for name, module in base.model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not name.startswith(tuple(f"{head}." for head in base.heads))
        and name not in base.heads
        and module is not output
    }
    if wanted == "all-linear":
        return linear
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, tuple[int, int]] = {}
    for name in names:
        fits = {m: s for m, s in linear.items() if fnmatch.fnmatchcase("." + m, "*." + name)}
        if not fits:
            endings = sorted({m.rsplit(".", 1)[-1] for m in linear})
            raise ModelError(
                f"lora.targets: '{name}' fits no linear layer of '{base.path}'; "
                f"they end in {', '.join(endings)}; or use all-linear"
            )
        found |= fits
    return dict(sorted(found.items()))


def fresh_adapter(
    base: Base,
    modules: Mapping[str, tuple[int, int]],
    ranks: Mapping[str, int],
    scales: Mapping[str, float],
    train_head: bool,
    seed: int = 0,
) -> Adapter:
    """LoRA's initial adapter: A uniform in ±1/√d_in (PEFT's Kaiming with a = √5), B zero; the head as loaded.

    Args:
        base: the model.
        modules: module -> (d_out, d_in), from `targets`.
        ranks: module -> rank.
        scales: module -> scale.
        train_head: whether the heads are part of the adapter.
        seed: of A.
    """
    rng = generator(seed, "adapter")
    pairs = {}
    for name, (d_out, d_in) in sorted(modules.items()):
        bound = d_in**-0.5
        A = torch.from_numpy(rng.uniform(-bound, bound, (ranks[name], d_in))).float()
        pairs[name] = Pair(A, torch.zeros(d_out, ranks[name]), scales[name])
    extra = {k: v.cpu() for k, v in base.head_state().items()} if train_head else {}
    return Adapter(pairs, extra)


def layer_shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, GPT-2's transposed `Conv1D` included.

    Raises:
        ModelError: it is no linear layer.
    """
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    raise ModelError(f"LoRA needs a linear layer, '{name}' is a {type(module).__name__}")
