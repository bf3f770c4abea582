"""Which experts LoRA can adapt, of those that a model keeps in one parameter; tried before a run begins."""

from collections.abc import Sequence

import torch
from torch import nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.messages import Task
from fedlora.errors import ModelError
from fedlora.models.adaptable import left_out, unusable
from fedlora.models.base import Base
from fedlora.models.experts import Expert, fitting
from fedlora.models.multi_adapter import MultiAdapterModel
from fedlora.models.routed_experts import DOWN, UP, known
from fedlora.models.trial import lengths, made_up, near

SETTING = "lora.target_parameters"


def expert_targets(base: Base, wanted: Sequence[str] | str) -> dict[str, tuple[int, int]]:
    """The experts of parameters that LoRA adapts: a name such as "mlp.experts.down_proj[3]" -> (d_out, d_in).

    Args:
        base: the model; it is as before afterwards.
        wanted: names of parameters as PEFT's `target_parameters` takes them, or patterns with `*`.

    Raises:
        ModelError: a name that fits no parameter (the message lists those that hold experts), one of another
            kind, or experts that cannot be adapted here.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    found: dict[str, tuple[int, int]] = {}
    for name, fits in fitting(base.model, names).items():
        if not fits:
            raise ModelError(f"{SETTING}: '{name}' fits no parameter of '{base.path}'; {_there_are(base)}")
        for parameter in fits:
            found |= _experts(base, name, parameter)
    if not found:
        return {}
    if bad := unusable(base, found):
        raise ModelError(
            f"{SETTING}: expected experts of '{base.path}' that LoRA can adapt, got {left_out(bad, found)}"
        )
    _try(base, found)
    return dict(sorted(found.items()))


def _experts(base: Base, name: str, parameter: str) -> dict[str, tuple[int, int]]:
    """The experts of one parameter, which a name fits."""
    path, _, own = parameter.rpartition(".")
    module, held = base.model.get_submodule(path), base.model.get_parameter(parameter)
    expected = f"{SETTING}: expected parameters of three dimensions that hold experts, got '{name}' for "
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        raise ModelError(f"{expected}the linear layer '{path}'; name it in lora.targets")
    if held.ndim != 3:
        raise ModelError(f"{expected}'{parameter}' {tuple(held.shape)}; {_there_are(base)}")
    if held.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise ModelError(
            f"{SETTING}: '{parameter}' is quantised ({str(held.dtype).removeprefix('torch.')}), and a "
            "quantised expert cannot be adapted; leave it out, or load weights that are not"
        )
    if not known(module) or own not in (*UP, DOWN):
        raise ModelError(
            f"{SETTING}: '{path}' ({type(module).__name__}) computes its experts in a way of its own, "
            f"expected {UP[0]} or {DOWN} of a model that takes transformers' experts_implementation"
        )
    return {f"{parameter}[{e}]": Expert(module, own, e).shape for e in range(len(held))}


def _there_are(base: Base) -> str:
    ends = sorted({".".join(n.split(".")[-3:]) for n, p in base.model.named_parameters() if p.ndim == 3})
    return f"those that hold experts end in {', '.join(ends)}" if ends else "it has none that holds experts"


@torch.no_grad()
def _try(base: Base, found: dict[str, tuple[int, int]]) -> None:
    """Compare the model's logits with those of experts that fedlora computes, with adapters that add nothing.

    Raises:
        ModelError: they differ.
    """
    rows = made_up(base.model, base.tokenizer, base.pad_id, lengths(base.model, base.room))
    batch = base.collate([base.task.probe(ids, number) for number, ids in enumerate(rows[-1:])])
    plain = base.logits(batch)
    pairs = {name: Pair(torch.zeros(1, d_in), torch.zeros(d_out, 1)) for name, (d_out, d_in) in found.items()}
    why = "their logits differ"
    try:
        with MultiAdapterModel(base, [Task(Adapter(pairs))]):
            if near(base.logits(batch), plain):
                return
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise ModelError(
        f"{SETTING}: '{base.path}' computes its experts in another way than fedlora can ({why}); leave it out"
    )
