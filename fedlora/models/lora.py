"""The rule from ranks to scales, the adapter that a run starts from, and the layers it can be put on."""

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import dense
from fedlora.core.messages import Peer
from fedlora.core.parametrization import Layer, Parametrization
from fedlora.errors import ConfigError, ModelError
from fedlora.models.base import Base
from fedlora.models.experts import Expert, kind, layer_at
from fedlora.ranges import check_number
from fedlora.seeds import generator


@dataclass(frozen=True)
class LoRA:
    """How ranks and scales follow from the settings, in PEFT's terms, for every client alike.

    Args:
        scale: s in ΔW = s·B·A at every rank (alpha grows with the rank). Then a step moves ΔW alike whatever
            the rank; with one alpha for all, a client of rank 200 learns 25 times slower than one of rank 8.
        alpha: if given, s = alpha / rank instead, or alpha / √rank.
        use_rslora: the √ (Kalajdzievski, 2023, arXiv:2312.03732).
        rank_pattern: module, or the end of its path -> rank, for every client.
        alpha_pattern: module, or the end of its path -> alpha.
    """

    scale: float = 2.0
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.alpha is None and (self.use_rslora or self.alpha_pattern):
            raise ConfigError("lora: use_rslora and alpha_pattern need lora.alpha; without it s = lora.scale")
        check_number("lora.scale", self.scale, above=0)
        check_number("lora.alpha", self.alpha, above=0, none=True)
        for name, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern, value in patterns.items():
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ConfigError(
                        f"lora.{name}: '{pattern}' is no regular expression: {error}"
                    ) from error
                if not value > 0 or (name == "rank_pattern" and value != int(value)):
                    raise ConfigError(
                        f"lora.{name}: expected numbers above 0, whole ones for ranks; got {value}"
                    )

    def peer(self, client: int, rank: int, modules: Iterable[str]) -> Peer:
        """What the server knows of a client of this rank."""
        modules = list(modules)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            if not any(re.fullmatch(rf"(.*\.)?({pattern})", kind(m)) for m in modules):
                raise ConfigError(f"lora: the pattern '{pattern}' fits no target module")
        ranks = {m: int(by_pattern(self.rank_pattern, m, rank)) for m in modules}
        scales = {m: self._scale(m, r) for m, r in ranks.items()}
        return Peer(client, rank, {m: r for m, r in ranks.items() if r != rank}, scales)

    def _scale(self, module: str, rank: int) -> float:
        if self.alpha is None:
            return self.scale
        alpha = by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def by_pattern(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The value of the first pattern that fits the end of a module's path, by PEFT's rule.

    All experts of a parameter have the value of the parameter's path, as in PEFT.
    """
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", kind(module)):
            return value
    return default


def fresh_adapter(
    base: Base, modules: Mapping[str, tuple[int, int]], peer: Peer, heads: Sequence[str], seed: int = 0
) -> Adapter:
    """LoRA's initial adapter: A uniform in ±1/√d_in (PEFT's Kaiming with a = √5), B zero; the head as loaded.

    Args:
        base: the model.
        modules: module -> (d_out, d_in), from `targets`.
        peer: whose ranks and scales to take; a run starts with those of its largest client.
        heads: those that are part of the adapter.
        seed: of A.
    """
    rng = generator(seed, "adapter")
    pairs = {}
    for name, (d_out, d_in) in sorted(modules.items()):
        rank, bound = peer.ranks.get(name, peer.rank), d_in**-0.5
        A = torch.from_numpy(rng.uniform(-bound, bound, (rank, d_in))).float()
        pairs[name] = Pair(A, torch.zeros(d_out, rank), peer.scales[name])
    extra = {name: value.cpu() for name, value in base.head_state(heads).items()}
    return Adapter(pairs, extra)


def layer_of(base: Base, name: str, base_delta: Mapping[str, Pair] | None = None) -> Layer:
    """A linear layer of the model as a parametrization sees it.

    Raises:
        ModelError: the model has no such layer.
    """
    module = layer_at(base.model, name)
    added = dense(base_delta[name]) if base_delta and name in base_delta else 0.0
    weight = partial(layer_weight, module, name)
    return Layer(name, layer_shape(module, name), weight, getattr(module, "bias", None), added)


def parametrized(
    base: Base,
    adapter: Adapter,
    form: Parametrization,
    base_delta: Mapping[str, Pair] | None = None,
    seed: int = 0,
) -> Adapter:
    """An adapter of LoRA in another parametrization, at its start; factors that it has already stay.

    Args:
        base: the model.
        adapter: its pairs say which layers, ranks and scales; its heads are kept.
        form: the parametrization.
        base_delta: what is added to the base besides.
        seed: of its random choices.

    Raises:
        ModelError: a quantised weight, where the parametrization looks at it.
        ConfigError: the parametrization starts without one of its factors.
    """
    pairs, own = {}, dict[str, Tensor]()
    for name, pair in adapter.pairs.items():
        rng = generator(seed, "parametrization", zlib.crc32(name.encode()))
        found = dict(form.start(layer_of(base, name, base_delta), pair, rng))
        if found.keys() != {*("AB" if form.pairs else ""), *form.factors}:
            raise ConfigError(
                f"{type(form).__name__}.start: expected the factors of '{name}', got {sorted(found)}"
            )
        if form.pairs:
            pairs[name] = Pair(found["A"], found["B"], pair.scale)
        own |= {f"{name}.{word}": found[word].cpu() for word in form.factors}
    return Adapter(pairs, {**own, **adapter.extra}, form)


def layer_shape(module: nn.Module | Expert, name: str) -> tuple[int, int]:
    """(d_out, d_in) of a linear layer, GPT-2's transposed `Conv1D` included, or of an expert.

    Raises:
        ModelError: it is no linear layer.
    """
    if isinstance(module, Expert):
        return module.shape
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if type(module).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return weight.shape[1], weight.shape[0]
    raise ModelError(f"LoRA needs a linear layer, '{name}' is a {type(module).__name__}")


def layer_weight(module: nn.Module | Expert, name: str) -> Tensor:
    """A linear layer's weight as (d_out, d_in), in float32 at least; a view where that is possible.

    Raises:
        ModelError: it is no linear layer, or its weight is quantised.
    """
    layer_shape(module, name)
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    if not weight.is_floating_point():
        raise ModelError(
            f"'{name}' has a quantised weight, which cannot be taken apart; use model.quantize=null"
        )
    weight = weight.T if type(module).__name__ == "Conv1D" else weight
    return weight if weight.dtype == torch.float64 else weight.float()
