"""The state that a run begins with: its initial adapter, and whether every client can begin from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import norm, stack
from fedlora.core.messages import Peer, State
from fedlora.core.strategy import Strategy
from fedlora.errors import ConfigError
from fedlora.models import Base, fresh_adapter, load_adapter, merge, parametrized, take_out_of_base
from fedlora.models.parametrizations import LORA, Parametrization

from .spec_parts import LoRASpec

ROUNDING = 1e-4  # of float32 factors, relative to what they were taken out of


def initial_state(
    spec: LoRASpec,
    strategy: Strategy,
    base: Base,
    modules: Mapping[str, tuple[int, int]],
    ranks: Sequence[int],
    heads: Sequence[str],
    seed: int,
) -> State:
    """The state before round 1, from `lora.adapter`, or else by `lora.init` or the start of the strategy.

    Args:
        spec: the adapter's form.
        strategy: the algorithm.
        base: the model; a head that is given and not trained is put into it.
        modules: what is adapted, module -> (d_out, d_in).
        ranks: the clients' ranks.
        heads: those that are trained.
        seed: of the random factors and of the strategy's own choices.

    Raises:
        FedLoraError: settings that cannot work together, or a rank that the strategy cannot serve.
    """
    init, scaling = spec.init or strategy.start, spec.scaling
    base_delta: dict[str, Pair] = {}
    if spec.adapter is None:
        fresh = fresh_adapter(base, modules, scaling.peer(0, max(ranks), modules), heads, seed)
        adapter, base_delta = take_out_of_base(base, fresh, init, seed)
    else:
        adapter = _given(Path(spec.adapter), base, heads, spec.form)
    if not adapter.pairs and not adapter.extra:
        raise ConfigError("lora.targets is empty and no head is trained: there is nothing to train")
    if spec.form != LORA:
        adapter = parametrized(base, adapter, spec.form, base_delta, seed)
    start = strategy.init(adapter, base_delta, seed)
    peers = [scaling.peer(0, rank, adapter.pairs) for rank in sorted(set(ranks))]
    _check_served(strategy, start, peers, base_delta)
    return start


def _given(folder: Path, base: Base, heads: Sequence[str], form: Parametrization) -> Adapter:
    """An adapter that PEFT wrote, with a head if one is trained."""
    adapter = load_adapter(folder, base)
    if adapter.parametrization not in (LORA, form):  # PEFT's LoRA holds no other than DoRA
        name = type(adapter.parametrization).__name__
        raise ConfigError(f"lora.adapter: '{folder}' is an adapter of {name}; say lora.dora=true")
    head = adapter.heads()
    kept = base.head_state(heads)
    if frozen := {name: value for name, value in head.items() if name not in kept}:
        merge(base, Adapter({}, frozen))  # the base keeps what nobody trains or sends
    kept |= {name: head[name] for name in kept if name in head}
    own = {name: tensor for name, tensor in adapter.extra.items() if name not in head}
    return replace(adapter, extra=kept | own)


def _check_served(
    strategy: Strategy, start: State, peers: Iterable[Peer], base_delta: Mapping[str, Pair]
) -> None:
    """Refuse a rank that cannot be served, and one that gets less than what was taken out of the base."""
    name = type(strategy).__name__
    for peer in peers:
        task = strategy.task(start, peer)
        if base_delta and any(part.replies(task.adapter) for part in task.method):
            raise ConfigError(
                f"lora.init: strategy {name} prunes directions, which here are a part of the base; "
                "use lora.init=lora"
            )
        for m, out in base_delta.items():
            parts = [pair for pair in (task.base_delta.get(m), task.adapter.pairs.get(m)) if pair is not None]
            lost = norm(stack(parts, [1.0] * len(parts))) if parts else 0.0
            if lost > ROUNDING * norm(out):
                raise ConfigError(
                    f"lora.init: strategy {name} gives a client of rank {peer.rank} only a part of what was "
                    f"taken out of the base ('{m}' lacks {lost / norm(out):.0%}); use one rank, or "
                    "lora.init=lora"
                )
