"""How a base model is loaded: from a folder or the hub, frozen, with what the checkpoint lacks made up."""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedlora.errors import ModelError
from fedlora.models.attention import (
    attend_our_way,
    attend_plainly,
    check_attends,
    check_attention,
    takes_our_attention,
)
from fedlora.models.base import Base
from fedlora.models.checkpointing import checkpointed
from fedlora.models.device import check_device, chosen_dtype
from fedlora.models.first_token import only_first_token
from fedlora.models.memory import Memory
from fedlora.models.packing import packing_of
from fedlora.models.products import products_on
from fedlora.models.quantized import quantized
from fedlora.models.state import put_back
from fedlora.models.trial import Trial
from fedlora.seeds import generator
from fedlora.tasks import TASKS, LearningTask, learning_task

NO_TOKENIZER = "model.path: '{}' has no tokenizer files; save its tokenizer there too"


def load(
    path: str | Path,
    task: LearningTask | str,
    labels: Sequence[str] = (),
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
    quantize: str | None = None,
    allow_pickle: bool = False,
    gradient_checkpointing: bool | None = None,
    attention: str | None = None,
    plain: bool = False,
) -> Base:
    """Load a transformers model from a folder or, by name, from the hub or its cache.

    What the checkpoint lacks (a new head) is drawn from the seed, the same on every machine.

    Args:
        path: a folder or a hub name.
        task: what it will be trained for, or the name of one of `fedlora.tasks.TASKS`.
        labels: the names of the model's outputs in their order, where they have some (`Dataset.labels`).
        dtype: of the frozen weights, "float32", "bfloat16" or "float64", or "auto" for the one that suits
            the device; adapters are float32 in any case.
        device: "cpu", "cuda", "cuda:1" or "mps".
        seed: of made-up parameters.
        quantize: "4bit" or "8bit", on a GPU with bitsandbytes; heads and adapters stay as they are.
        allow_pickle: also load weights that are not safetensors; a pickle can hold more than weights.
        gradient_checkpointing: whether layers are computed once more on the way back, which takes a third
            more time and a fraction of the memory; None where a row does not fit a GPU otherwise.
        attention: transformers' `attn_implementation`, such as "eager" or "flash_attention_2"; with another
            than "sdpa" the model attends as transformers makes it, and is fed padded batches. None takes what
            transformers does, and ours in the place of "sdpa".
        plain: leave the model as transformers makes it, its attention too, to compare ours with.

    Raises:
        ConfigError: there is no task of this name.
        ModelError: no such model, or one that cannot do this.
    """
    import transformers
    from transformers import AutoTokenizer
    from transformers.utils import CONFIG_NAME

    task = learning_task(task)
    check_device(device)
    check_attention(attention)
    dtype = chosen_dtype(dtype, device)
    if dtype not in ("float32", "bfloat16", "float64"):
        raise ModelError(f"model.dtype: expected float32, bfloat16, float64 or auto, got '{dtype}'")
    chosen: dict[str, Any] = {"dtype": getattr(torch, dtype), "output_loading_info": True}
    chosen["ignore_mismatched_sizes"] = True  # a head for other labels is made anew, below
    chosen["use_safetensors"] = None if allow_pickle else True
    chosen |= task.options(labels) | ({} if attention is None else {"attn_implementation": attention})
    auto = getattr(transformers, task.auto)
    bits: dict[str, Any] = {}
    os.environ.setdefault(
        "DISABLE_SAFETENSORS_CONVERSION", "1"
    )  # asks a service on the hub to convert pickles
    quiet = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
        bits = quantized(quantize, auto, str(path), dtype, device)
        model, info = auto.from_pretrained(str(path), trust_remote_code=False, **chosen, **bits)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        why = str(error).strip().splitlines()[0]
        if attention is not None and re.search(r"attention|attn", why, re.IGNORECASE):
            raise ModelError(f"model.attention={attention}: {why}") from error
        if not allow_pickle and re.search(r"no file named \S+\.safetensors|and thus cannot be loaded", why):
            raise ModelError(
                f"model.path: expected weights in safetensors, '{path}' has none; if it has pickled ones "
                "(.bin) and you trust who made them, say model.allow_pickle=true"
            ) from error
        if unfit := _unfit(str(path), task):
            raise ModelError(unfit) from error
        if (
            why.startswith("Couldn't instantiate the backend tokenizer")
            and (Path(path) / CONFIG_NAME).is_file()
        ):
            raise ModelError(NO_TOKENIZER.format(path)) from error
        raise ModelError(
            f"model.path: expected a folder with a transformers model, or a hub name, got '{path}': {why}"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(quiet)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers makes an empty one without files
        raise ModelError(NO_TOKENIZER.format(path))
    missing = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    where = None if bits else device
    how = (gradient_checkpointing, attention, plain)
    return finished(model, tokenizer, task, missing, str(path), seed, where, *how)


def finished(
    model: Any,
    tokenizer: Any,
    task: LearningTask,
    missing: Sequence[str],
    path: str,
    seed: int = 0,
    device: str | None = None,
    gradient_checkpointing: bool | None = None,
    attention: str | None = None,
    plain: bool = False,
) -> Base:
    """The base of a model that transformers has made: padded, frozen, tried.

    Args:
        model: from transformers.
        tokenizer: its tokenizer.
        task: what it will be trained for.
        missing: names of parameters that the checkpoint lacked.
        path: where the model came from.
        seed: of the missing parameters.
        device: where it goes; None leaves it where it is.
        gradient_checkpointing: as for `load`.
        attention: the one that was asked for, as for `load`; the model has it.
        plain: leave the model as transformers makes it, its attention too.

    Raises:
        ModelError: no padding token, or a checkpoint that lacks what it needs.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"model.path: the tokenizer of '{path}' has neither a pad nor an end token; set one")
    text = model.config.get_text_config()  # a part of the configuration, in models of images and text
    if getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = tokenizer.pad_token_id
    heads = task.heads(model, missing, path)
    _make_up(model, missing, seed)
    model.requires_grad_(False).eval()
    if device is not None:  # a quantised model is there already, and bitsandbytes does not let it move
        model.to(device)
    base = Base(model, tokenizer, task, heads, path)
    return base if plain else tried(base, gradient_checkpointing, attention)


def tried(base: Base, gradient_checkpointing: bool | None, attention: str | None) -> Base:
    """The base with what is found out about its model, and with our attention where that changes nothing.

    Raises:
        ModelError: its layers are to be checkpointed, or it is to attend in a way, and it cannot.
    """
    model, task = base.model, base.task
    trial = Trial(model, base.tokenizer, task, base.pad_id, base.room, base.path)
    if attention not in (None, "sdpa"):
        check_attends(trial, str(attention), base.path)
    traits = trial.traits()
    for line in traits.notices(base.path):
        warnings.warn(line, stacklevel=3)
    ours = takes_our_attention(model) and _attends_alike(trial)
    after = None
    if (
        not task.per_token and not traits.stateful
    ):  # such a model may do otherwise with rows longer than those tried
        after = only_first_token(model)
    packing = None
    if ours and traits.limit != 0 and traits.side == "right" and (task.generates or after is not None):
        with put_back(model):
            packing = packing_of(model, after)
    wanted = gradient_checkpointing or (gradient_checkpointing is None and base.device.type != "cpu")
    able = bool(wanted) and _checkpoints_alike(trial)
    if gradient_checkpointing and not able:
        raise ModelError(
            f"model.gradient_checkpointing=true: '{base.path}' has no layers that transformers can "
            "checkpoint, or computes something else with them; use null"
        )
    return replace(
        base,
        after=after,
        packing=packing,
        traits=traits,
        products=products_on(base.device, model.dtype),
        memory=Memory(base.device, gradient_checkpointing, able),
    )


def _checkpoints_alike(trial: Trial) -> bool:
    """Whether the model's layers can be checkpointed, its logits and gradients staying what they are."""
    try:
        before = trial.answers()
        with checkpointed(trial.model) as layers:
            return layers > 0 and trial.same(trial.answers(), before)
    except (RuntimeError, ValueError, IndexError, TypeError):  # it lacks an argument, or has no gradient
        return False


def _attends_alike(trial: Trial) -> bool:
    """Let the model attend our way, if its logits and gradients stay what they are; else undo it."""
    try:
        before = trial.answers()
        if attend_our_way(trial.model) and trial.same(trial.answers(), before):
            return True
    except (RuntimeError, ValueError, IndexError, TypeError):  # it lacks an argument, or has no gradient
        pass
    attend_plainly(trial.model)
    return False


def checkpoint_dtype(path: str) -> torch.dtype | None:
    """The precision that a checkpoint's weights are stored in; None where nothing tells.

    Args:
        path: a folder or a hub name.
    """
    from transformers import AutoConfig

    named = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
    if named is not None:
        return getattr(torch, named) if isinstance(named, str) else named  # type: ignore[no-any-return]
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            kinds = [tensors.get_slice(name).get_dtype() for name in tensors.keys()]  # noqa: SIM118
        for name, dtype in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16)):
            if name in kinds:
                return dtype
    return None


def _unfit(path: str, task: LearningTask) -> str | None:
    """Why transformers cannot load a checkpoint for this task; None where the kind of model is not why."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    kinds = type(config), type(config.get_text_config())

    def takes(one: LearningTask) -> bool:
        return any(kind in getattr(transformers, one.auto)._model_mapping for kind in kinds)

    if takes(task):
        return None
    model = f"'{path}' is a model of the kind '{config.model_type}', of which transformers has no"
    if not any(takes(one) for one in TASKS):
        every = " and no ".join(dict.fromkeys(one.model for one in (*TASKS, task)))
        return f"model.path: {model} {every}; choose a model that reads text"
    return f"model: {task.needs}; {model} {task.model}"


def _make_up(model: Any, missing: Sequence[str], seed: int) -> None:
    """Give parameters that the checkpoint lacks their values: zero biases, small normal weights."""
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    parameters = dict(model.named_parameters())
    rng = generator(seed, "head")
    for name in sorted(missing):
        value = parameters[name]
        if value.ndim > 1:
            value.data = torch.from_numpy(rng.normal(0, spread, value.shape)).to(value)
        else:
            value.data = torch.full_like(
                value, 1.0 if name.endswith("weight") else 0.0
            )  # of a norm, or a bias
