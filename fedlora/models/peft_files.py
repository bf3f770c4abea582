"""Adapters as PEFT writes and reads them: `adapter_config.json` and `adapter_model.safetensors`."""

import copy
import json
import re
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.errors import ModelError
from fedlora.models.base import Base
from fedlora.models.experts import Expert, Joined, fitting, join, layer_at, part, place, wrapper
from fedlora.models.lora import by_pattern, layer_of, layer_shape, layer_weight, parametrized
from fedlora.models.parametrizations import LORA, DoRA, Parametrization

PREFIX = "base_model.model."
# PEFT's name of a tensor -> the parametrization that has it, and its word there.
KNOWN: dict[str, tuple[Parametrization, str]] = {
    name: (form, word) for form in (DoRA(),) for word, name in form.peft_names.items()
}


def save_adapter(adapter: Adapter, base: Base, folder: Path) -> None:
    """Write an adapter that `peft.PeftModel.from_pretrained(model, folder)` loads, with our logits.

    The model there is the plain transformers model of the same checkpoint and number of labels. Heads are
    always saved, trained or not, since a plain model would make up its own. The tokenizer lies beside the
    adapter. The configuration of a model with a new head, which names its outputs, lies in `base/`, a folder
    of its own because transformers takes an adapter's folder with a config.json for a whole model.

    Args:
        adapter: of any ranks and scales, mixed over modules, in a parametrization that PEFT's LoRA can hold.
        base: the model it belongs to.
        folder: made if missing.
    """
    config, tensors = as_peft(adapter, base)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    file = folder / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod((folder / "adapter_config.json").stat().st_mode)  # safetensors' own is for one user
    base.tokenizer.save_pretrained(str(folder))
    if base.task.new_head:
        labelled = copy.deepcopy(base.model.config)
        if hasattr(labelled, "quantization_config"):  # how this run loaded the base, not what the base is
            del labelled.quantization_config
        labelled.save_pretrained(str(folder / "base"))


def as_peft(adapter: Adapter, base: Base) -> tuple[Any, dict[str, Tensor]]:
    """An adapter as PEFT has it: its `LoraConfig`, and the tensors of its file.

    Raises:
        ModelError: the adapter has no pair.
    """
    from peft import LoraConfig, TaskType

    adapter, form = adapter.plain(partial(layer_of, base)), adapter.parametrization
    own = adapter.own_factors()
    if own and not form.peft_names:
        raise ModelError(
            f"{type(form).__name__} has no form that PEFT's LoRA could hold; export the model with it merged"
        )
    if not adapter.pairs:
        raise ModelError("this run trained the head alone: it has no LoRA pair, so there is no PEFT adapter")
    if own and adapter.pairs.keys() - own.keys():  # PEFT knows one kind of layer in an adapter
        adapter = parametrized(base, adapter, form)
    if own and any(place(name) for name in adapter.pairs):
        raise ModelError(f"PEFT has no {type(form).__name__} of experts; export the model with it merged")
    linear = {name: pair for name, pair in adapter.pairs.items() if not place(name)}
    joined = join(adapter.pairs, base.model)
    held: dict[str, Pair | Joined] = {**linear, **joined}
    # PEFT warns of a pattern that names a parameter, though it follows it.
    common = joined or held
    rank = Counter(pair.rank for pair in common.values()).most_common(1)[0][0]
    scale = next(pair.scale for pair in common.values())
    transposed = any(type(base.model.get_submodule(name)).__name__ == "Conv1D" for name in linear)
    config = LoraConfig(
        task_type=TaskType[base.task.peft_type],
        base_model_name_or_path=str(Path(base.path).absolute()) if Path(base.path).is_dir() else base.path,
        r=rank,
        lora_alpha=scale * rank,
        target_modules=list(linear),
        target_parameters=list(joined) or None,
        modules_to_save=list(base.heads) or None,
        rank_pattern={n: p.rank for n, p in held.items() if p.rank != rank},
        # PEFT divides a module's alpha by its own rank, so every module that differs in either needs its own.
        alpha_pattern={n: p.scale * p.rank for n, p in held.items() if (p.rank, p.scale) != (rank, scale)},
        fan_in_fan_out=transposed,
        inference_mode=True,
        **(form.peft_options if own else {}),
    )
    tensors: dict[str, Tensor] = {}
    for name, pair in held.items():
        where = f"{name}." if name in linear else wrapper(base.model, name, joined)
        tensors[f"{PREFIX}{where}lora_A.weight"] = pair.A.contiguous()
        tensors[f"{PREFIX}{where}lora_B.weight"] = pair.B.contiguous()
    for name, factors in adapter.own_factors().items():
        tensors |= {f"{PREFIX}{name}.{form.peft_names[word]}": t.contiguous() for word, t in factors.items()}
    for name, value in (base.head_state() | adapter.heads()).items():
        tensors[PREFIX + name] = value.contiguous()
    return config, tensors


def load_adapter(folder: Path, base: Base) -> Adapter:
    """Read an adapter that PEFT wrote, per-module ranks and alphas included.

    Raises:
        ModelError: the folder holds no LoRA adapter, or one that is more than B·A, DoRA's magnitudes and
            whole heads (trained biases, adapted embeddings).
    """
    from peft import LoraConfig, PeftConfig
    from peft.utils import load_peft_weights

    if not (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"lora.adapter: expected a folder that PEFT wrote, no adapter_config.json in '{folder}'"
        )
    if not (folder / "adapter_model.safetensors").is_file():  # PEFT would take a pickled adapter_model.bin
        raise ModelError(
            f"lora.adapter: expected adapter_model.safetensors in '{folder}', found none; load it with PEFT "
            "and save it again"
        )
    config = PeftConfig.from_pretrained(str(folder))
    changed = [
        name
        for name in ("lora_bias", "alora_invocation_tokens", "use_qalora", "layer_replication")
        if getattr(config, name, None)
    ]
    start = getattr(config, "init_lora_weights", True)
    # These starts are taken out of the base's weights, which PEFT does again when it loads the adapter.
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        changed.append(f"init_lora_weights={start}")
    if not isinstance(config, LoraConfig) or config.bias != "none" or changed:
        raise ModelError(
            f"lora.adapter: '{folder}' is no plain LoRA (ΔW = s·B·A): "
            f"{config.peft_type.value}, bias={getattr(config, 'bias', None)}, {', '.join(changed)}"
        )
    pairs: dict[str, dict[str, Tensor]] = {}
    extra: dict[str, Tensor] = {}
    own: dict[str, Tensor] = {}
    form = LORA
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"lora.adapter: cannot read '{folder}': {str(error).splitlines()[0]}") from error
    for key, value in weights.items():
        name = key.removeprefix(PREFIX)
        value = value if value.dtype == torch.float64 else value.float()
        if match := re.fullmatch(r"(.+)\.lora_([AB])\.weight", name):
            pairs.setdefault(match[1], {})[match[2]] = value
        elif name.rpartition(".")[2] in KNOWN:
            module, _, end = name.rpartition(".")
            form, word = KNOWN[end]
            own[f"{module}.{word}"] = value
        elif name.startswith(tuple(f"{head}." for head in base.heads)):
            extra[name] = value
        else:
            raise ModelError(
                f"'{folder}' holds '{key}', which belongs neither to LoRA nor to a head of the model"
            )
    wrapped = _wrapped(base, config)
    made, modules = dict[str, Pair](), dict(base.model.named_modules())
    for name, factors in pairs.items():
        if (name not in wrapped and name not in modules) or factors.keys() != {"A", "B"}:
            raise ModelError(
                f"lora.adapter: '{folder}' has lora_{' and lora_'.join(sorted(factors))} of '{name}'; "
                f"expected both of a module of '{base.path}'"
            )
        at = wrapped.get(name, name)
        rank = factors["A"].shape[0] // (len(base.model.get_parameter(at)) if name in wrapped else 1)
        alpha = by_pattern(config.alpha_pattern, at, config.lora_alpha)
        scale = alpha / (rank**0.5 if config.use_rslora else rank)
        if name in wrapped:
            made |= part(Joined(factors["A"], factors["B"], rank, scale), at)
        else:
            layer_shape(modules[name], name)
            made[name] = Pair(factors["A"], factors["B"], scale)
    # PEFT saves the heads that it knows of; what else was made up here starts as it is.
    return Adapter(made, own | ((base.head_state() | extra) if extra else {}), form)


def adapts_experts(folder: Path) -> bool:
    """Whether the adapter of a folder adapts experts that are kept in one parameter; False of no adapter."""
    file = folder / "adapter_config.json"
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("target_parameters"))
    except (OSError, ValueError, AttributeError):
        return False  # what it lacks is said when it is loaded


def _wrapped(base: Base, config: Any) -> dict[str, str]:
    """What stands before "lora_A.weight" of an adapter's parameters -> the parameter.

    Raises:
        ModelError: one of the parameters is not of three dimensions, (experts, ...).
    """
    found = fitting(base.model, config.target_parameters or ())
    names = dict.fromkeys(name for own in found.values() for name in own)
    for name in names:
        if (held := base.model.get_parameter(name)).ndim != 3:
            raise ModelError(
                f"lora.adapter: expected target_parameters of three dimensions, one expert after the other; "
                f"'{name}' of '{base.path}' is {tuple(held.shape)}"
            )
    return {wrapper(base.model, name, names).removesuffix("."): name for name in names}


def by_peft(base: Base, folder: Path) -> Base:
    """The base with an adapter put in by PEFT itself, as a user of the adapter does; takes the base over."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of peft about transformers
        warnings.filterwarnings("ignore", ".*_pattern keys did not match", RuntimeWarning)  # of parameters
        model = PeftModel.from_pretrained(base.model, str(folder)).eval()
    return Base(model, base.tokenizer, base.task, (), base.path)


def merge(base: Base, adapter: Adapter) -> None:
    """Make every layer's weight what the adapter's parametrization makes of it, and put the heads in.

    The base becomes a plain fine-tuned model.

    Only for export; it changes the base for good. `Conv1D` stores its weight transposed.

    Raises:
        ModelError: a quantised weight.
    """
    form, parameters = adapter.parametrization, dict(base.model.named_parameters())
    for name, factors in adapter.factors().items():
        layer, at = layer_at(base.model, name), layer_of(base, name)
        merged = layer_weight(layer, name).double()
        wide = {
            factor: tensor.to(merged if tensor.is_floating_point() else merged.device)
            for factor, tensor in form.with_constants(at, factors).items()
        }
        change = form.change(at, wide, adapter.pairs[name].scale if name in adapter.pairs else 1.0)
        merged = form.weight(at, merged if change is None else merged + change, wide)
        if isinstance(layer, Expert):
            layer.weight.copy_(merged)
            continue
        if type(layer).__name__ == "Conv1D":
            merged = merged.T
        weight = base.model.get_parameter(f"{name}.weight")
        weight.data = merged.to(weight.dtype).contiguous()
    for name, value in adapter.heads().items():
        parameters[name].data = value.to(parameters[name])
