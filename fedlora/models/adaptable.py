"""Which linear layers of a model LoRA can adapt: tried on a row and on PEFT before a run begins.

A layer that the loss does not reach would never learn, and an adapter that PEFT does not load whole is of no
use to anyone. Neither can be told from a layer's name or class, so both are tried.
"""

import copy
import fnmatch
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.experts import kind, place
from fedlora.models.lora import layer_shape
from fedlora.models.peft_files import PREFIX, as_peft

SENTENCE = "a row of words on which every layer of the model is tried once before the first round"
NO_LINEAR = "no linear layers"
TOKENS = 16  # of the row, at most


def targets(
    base: Base, wanted: Sequence[str] | str, besides: Iterable[str] = ()
) -> dict[str, tuple[int, int]]:
    """The modules that LoRA adapts: name -> (d_out, d_in).

    Args:
        base: the model.
        wanted: names as PEFT takes them ("query" is every module whose path ends in it), patterns with `*`,
            or "all-linear": every linear layer but the heads, the output layer, and those that cannot be
            adapted. One warning says which layers are left out, and why.
        besides: experts that are adapted too, from `expert_targets`; they count as not left out.

    Raises:
        ModelError: a name that fits no linear layer (the message lists those that exist), or one that takes
            in a layer that cannot be adapted.
    """
    linear = _linear(base)
    if wanted == "all-linear":
        bad = unusable(base, linear)
        others = set(no_linear(base)) - {kind(name).rpartition(".")[0] for name in besides}
        others = {name for name in others if not any(f"{m}.".startswith(f"{name}.") for m in bad)}
        if told := left_out(bad | dict.fromkeys(others, NO_LINEAR), linear):
            if linear and not linear.keys() - bad.keys():
                raise ModelError(
                    f"lora.targets: expected a layer of '{base.path}' that LoRA can adapt, got none: {told}"
                )
            warnings.warn(f"lora.targets=all-linear leaves out {told}", stacklevel=2)
        return {name: shape for name, shape in linear.items() if name not in bad}
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
    if bad := unusable(base, found):
        raise ModelError(
            f"lora.targets: expected layers of '{base.path}' that LoRA can adapt, got "
            f"{left_out(bad, linear)}; name others, or use all-linear, which leaves these out"
        )
    return dict(sorted(found.items()))


def _linear(base: Base) -> dict[str, tuple[int, int]]:
    """Every linear layer but the heads and the output layer."""
    output = base.model.get_output_embeddings()
    return {
        name: layer_shape(module, name)
        for name, module in base.model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and not name.startswith(_inside(base.heads))
        and name not in base.heads
        and module is not output
    }


def unusable(base: Base, modules: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The modules that LoRA cannot adapt, and why: name -> a few words such as "never called".

    Args:
        base: the model; it is as before afterwards.
        modules: linear layers, or experts, name -> (d_out, d_in).

    Raises:
        ModelError: the model fails on a row of a few tokens.
    """
    # An expert counts as called where its module is: another row's tokens go to others.
    within = _modules(modules)
    silent = _silent(base, dict.fromkeys(within.values()))
    found = {name: silent[module] for name, module in within.items() if module in silent}
    live = {name: shape for name, shape in modules.items() if name not in found}
    return found | _refused_by_peft(base, live)


def left_out(names: Mapping[str, str], linear: Iterable[str]) -> str:
    """Modules and why they are left out, on one line.

    Layers of one kind count once, as `layers.*`; a part of the model whose linear layers are all left out for
    one reason is named in their place.

    Args:
        names: modules and why.
        linear: all linear layers that were in question.
    """
    reasons: dict[str, list[str]] = {}
    held: dict[str, str] = {name: names.get(name, "") for name in linear}
    held.update(names)
    for name, why in sorted(names.items()):
        parts = name.split(".")
        ends = (".".join(parts[:k]) for k in range(1, len(parts) + 1))
        whole = name
        if why != NO_LINEAR:
            whole = next(
                e for e in ends if {w for n, w in held.items() if f"{n}.".startswith(f"{e}.")} == {why}
            )
        kind = re.sub(r"\.\d+(?=\.|$)", ".*", whole)
        if kind not in reasons.setdefault(why, []):
            reasons[why].append(kind)
    return "; ".join(f"{', '.join(kinds)} ({why})" for why, kinds in reasons.items())


def no_linear(base: Base) -> list[str]:
    """Modules with matrices of their own and no linear layers inside, such as experts and routers."""
    found = []
    for name, module in base.model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D":
            continue
        if type(module).__module__.startswith("torch.nn.") or name.startswith(_inside(base.heads)):
            continue
        if any(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in module.modules()):
            continue  # such as XLNet's encoder, which keeps the embedding of the mask
        if any(p.ndim == 3 or (key == "weight" and p.ndim == 2) for key, p in own.items()):
            found.append(name)
    return found


def _inside(heads: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{head}." for head in heads)


def _silent(base: Base, modules: Iterable[str]) -> dict[str, str]:
    """The modules whose output no gradient of a row's loss reaches, and why."""
    ids = [] if base.tokenizer is None else base.tokenizer(SENTENCE)["input_ids"]
    ids = [*ids[: TOKENS - 1], *ids[-1:]]  # some models look for the end token
    if len(ids) < 2:  # a tokenizer that knows no word of it
        ids = list(range(TOKENS // 2))
    row = base.task.probe(ids, 0)
    probes: dict[str, Tensor] = {}
    # A module to which a router sends no token of this row is reached by others.
    found = dict.fromkeys((name for name in modules if name not in base.traits.chosen), "never called")

    def hook(name: str) -> Any:
        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, Tensor):
                found[name] = f"a {type(output).__name__} as output"
                return output
            found.pop(name, None)
            probe = probes.setdefault(name, output.new_zeros(()).requires_grad_())
            return output + probe

        return add

    handles = [base.model.get_submodule(name).register_forward_hook(hook(name)) for name in modules]
    try:
        loss = base.losses(base.collate([row]))[0].sum()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"model.path: expected a model that takes a row of {len(ids)} tokens, '{base.path}' fails on it: "
            f"{(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not probes:
        return found
    reached: tuple[Tensor | None, ...] = (None,) * len(probes)
    try:
        if loss.requires_grad:
            reached = torch.autograd.grad(loss, list(probes.values()), allow_unused=True)
    except RuntimeError as error:
        raise ModelError(
            f"model.path: expected a model that can be trained, '{base.path}' has no gradient: "
            f"{str(error).splitlines()[0].split(';')[0]:.160}"
        ) from error
    quiet = [name for name, grad in zip(probes, reached, strict=True) if grad is None]
    return found | dict.fromkeys(quiet, "no part in the loss")


def _refused_by_peft(base: Base, modules: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """The modules of which PEFT would not load a saved adapter, and why."""
    if not modules:
        return {}
    error, lost = _try_peft(base, modules)
    found = dict.fromkeys(lost, "PEFT drops their factors when it loads the adapter")
    if error is not None:
        groups: dict[str, dict[str, tuple[int, int]]] = {}
        for name, shape in modules.items():
            groups.setdefault(kind(name).rsplit(".", 1)[-1], {})[name] = shape
        if len(groups) > 1:  # PEFT refuses layers by the ends of their names
            for group in groups.values():
                found |= _refused_by_peft(base, group)
        if not found:
            return dict.fromkeys(modules, f"PEFT refuses it: {error}")
    rest = {name: shape for name, shape in modules.items() if name not in found}
    return found | (_refused_by_peft(base, rest) if found else {})


def _try_peft(base: Base, modules: Mapping[str, tuple[int, int]]) -> tuple[str | None, set[str]]:
    """Load an adapter of these modules by PEFT: what it says if it refuses, and the modules that it drops.

    It is tried on a twin of the model without weights, which takes milliseconds and no memory.
    """
    from peft import get_peft_model
    from peft.utils import set_peft_model_state_dict

    twin = Base(_hollow(base.model), base.tokenizer, base.task, base.heads, base.path)
    with torch.device("meta"):
        pairs = {n: Pair(torch.empty(1, i), torch.empty(o, 1), 1.0) for n, (o, i) in modules.items()}
    config, tensors = as_peft(Adapter(pairs), twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = get_peft_model(twin.model, config)
            told = set_peft_model_state_dict(model, tensors)
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            return re.sub(r"^\[.*?\] ", "", str(error).strip().splitlines()[0]).split(". ")[0], set()
    keys = [re.sub(r"\.(base_layer\.)+", ".", key) for key in (*told.missing_keys, *told.unexpected_keys)]
    lost = {n for n, m in _modules(modules).items() if any(f"{PREFIX}{m}.lora_" in key for key in keys)}
    adapted = {*model.base_model.targeted_module_names, *model.base_model.targeted_parameter_names}
    return None, lost | {name for name in modules if kind(name) not in adapted}


def _modules(names: Iterable[str]) -> dict[str, str]:
    """Layers and the modules that compute them, which of an expert is that of all experts."""
    return {name: at[0] if (at := place(name)) else name for name in names}


def _hollow(model: Any) -> Any:
    """A model of the same class and configuration whose tensors have shapes and no values."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # whoever uses the adapter need not quantise
    with torch.device("meta"):
        twin = type(model)(config)
    if {name for name, _ in twin.named_modules()} == {name for name, _ in model.named_modules()}:
        return twin
    # The model was changed after its class made it. A copy keeps that, with tensors that have shapes alone.
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): _shape_of(tensor) for tensor in tensors})


def _shape_of(tensor: Tensor) -> Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
