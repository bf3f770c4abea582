"""From the state that a strategy has made of a round to the next one, by the step of a server optimizer.

The pseudo-gradient of a round is

    Δ = F(x, u) − F(x, u₀),

F the strategy, u the updates, and u₀ the same updates had no client learned anything, each equal to what its
client was sent. F(x, u₀) is x itself wherever the strategy loses nothing. Where it does, as FlexLoRA loses
the directions that no client has room for, that loss is no progress of the clients and gets no momentum: a
round in which nobody learns has Δ = 0. The next state is F(x, u) + (step − Δ), which for step = Δ is the
strategy's own state, bit for bit.

Extras, such as a head, are stepped in their own coordinates. Factors that no client has sent, whatever else
the strategy remembers, and the base delta that it has are no part of Δ, and are never stepped.

What an optimizer remembers lies in `State.memory` under names that begin with `server/`, so that it is
checkpointed with the state, and in the state's digest. Strategies are shown the state without it.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedlora.core.adapter import Adapter, Pair
from fedlora.core.algebra import beyond, norm, pad_orthonormal, stack, truncate, weighted_sum
from fedlora.core.base_delta import BaseDelta
from fedlora.core.messages import State, Task, Update
from fedlora.core.strategy import Strategy, next_state
from fedlora.seeds import generator
from fedlora.server_optimizers.base import ServerOptimizer

OWN = "server/"  # begins the names of what an optimizer remembers


def without_optimizer(state: State) -> State:
    """The state as strategies are shown it: without what a server optimizer remembers."""
    if not any(name.startswith(OWN) for name in state.memory):
        return state
    return replace(state, memory={n: t for n, t in state.memory.items() if not n.startswith(OWN)})


def next_round(
    strategy: Strategy,
    optimizer: ServerOptimizer | None,
    before: State,
    updates: Sequence[Update],
    tasks: Sequence[Task],
    rng: np.random.Generator,
) -> State:
    """The state after a round: the strategy's, and then the optimizer's step where there is one.

    Args:
        strategy: the algorithm.
        optimizer: None moves by the plain change.
        before: the state before the round, with what the optimizer remembers.
        updates: what the strategy combines.
        tasks: what each update answers to, in the same order.
        rng: the generator for `Strategy.aggregate`.
    """
    after = next_state(strategy, without_optimizer(before), updates, rng)
    if optimizer is None:
        return after
    return advance(strategy, optimizer, before, after, list(zip(updates, tasks, strict=True)), rng)[0]


def advance(
    strategy: Strategy,
    optimizer: ServerOptimizer,
    before: State,
    after: State,
    answered: Sequence[tuple[Update, Task]],
    rng: np.random.Generator,
    idle: State | None = None,
) -> tuple[State, dict[str, float]]:
    """The state after the optimizer's step, and numbers for the round's line of metrics.jsonl.

    Args:
        strategy: the algorithm, whose `server_space` says where the optimizer works.
        optimizer: the optimizer, one that can work there.
        before: the state before the round, with what the optimizer remembers.
        after: what the strategy has made of it.
        answered: the updates that the strategy was shown, and what each answers to.
        rng: a generator for `Strategy.aggregate`.
        idle: F(x, u₀), where the updates are not combined by `Strategy.aggregate`.
    """
    if idle is None:
        unmoved = [replace(update, adapter=task.adapter) for update, task in answered]
        idle = next_state(strategy, without_optimizer(before), unmoved, rng)
    shared = {name for _, task in answered for name in task.shared()}
    memory = {n.removeprefix(OWN): t for n, t in before.memory.items() if n.startswith(OWN)}
    tensors = dict(after.adapter.tensors())
    of_pairs = {f"{m}.{factor}" for m in after.adapter.pairs for factor in "AB"}
    products = strategy.server_space != "factors"
    names = [n for n in tensors if n in shared and not (products and n in of_pairs)]
    adapter, kept = _in_coordinates(optimizer, names, after.adapter, idle.adapter, memory)
    new, numbers = replace(after, adapter=adapter), dict[str, float]()
    if products:
        modules = [m for m in after.adapter.pairs if {f"{m}.A", f"{m}.B"} & shared]
        new, of_products, numbers = _of_products(strategy, optimizer, modules, before, new, idle, memory)
        kept |= of_products
    # What was not stepped this time, such as the factor whose turn it is not, is remembered as it was.
    remembered = {f"{OWN}{name}": tensor for name, tensor in {**memory, **kept}.items()}
    return replace(new, memory={**new.memory, **remembered}), numbers


def _in_coordinates(
    optimizer: ServerOptimizer,
    names: Sequence[str],
    after: Adapter,
    still: Adapter,
    memory: Mapping[str, Tensor],
) -> tuple[Adapter, dict[str, Tensor]]:
    """The adapter with these tensors stepped, each number in its own coordinates, and what is remembered."""
    now, idle = dict(after.tensors()), dict(still.tensors())
    moved, kept = dict[str, Tensor](), dict[str, Tensor]()
    own: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, value in memory.items():
        word, _, name = key.partition("/")
        if name in own:
            own[name][word] = value.double()
    for name in names:
        tensor, dtype = now[name], torch.promote_types(now[name].dtype, torch.float32)
        change = tensor.double() - idle[name].double()
        step, remembered = optimizer.step(change, own[name])
        more = step - change
        moved[name] = torch.where(more == 0, tensor, (tensor.double() + more).to(tensor.dtype))
        kept |= {f"{word}/{name}": t.to(dtype) for word, t in remembered.items()}
    return after.with_tensors(moved), kept


def _of_products(
    strategy: Strategy,
    optimizer: ServerOptimizer,
    modules: Sequence[str],
    before: State,
    after: State,
    still: State,
    memory: Mapping[str, Tensor],
) -> tuple[State, dict[str, Tensor], dict[str, float]]:
    """The state with the ΔW of these modules stepped, what is remembered, and numbers for the log."""
    pairs, gain, kept = dict(after.adapter.pairs), dict[str, Pair](), dict[str, Tensor]()
    held = lost = 0.0
    for m in modules:
        past = Pair(memory[f"M/{m}.A"], memory[f"M/{m}.B"]) if f"M/{m}.A" in memory else None
        made = optimizer.product_step(_change(m, before, after, still), past)
        if made.momentum is not None:
            kept |= {f"M/{m}.{factor}": tensor for factor, tensor in made.momentum.factors()}
            held, lost = held + norm(made.momentum) ** 2, lost + made.lost
        if made.more is None:
            continue
        if strategy.server_space == "base_delta":
            gain[m] = made.more
            continue
        old, whole = pairs[m], weighted_sum([pairs[m], made.more], [1.0, 1.0], pairs[m].scale)
        if strategy.server_space == "product":
            pairs[m] = whole
            continue
        rest = beyond(whole, old.rank)
        rng = generator(after.seed, "server", zlib.crc32(m.encode()), after.round)
        pairs[m] = pad_orthonormal(truncate(whole, old.rank), old.rank, rng)
        if rest.rank:
            gain[m] = rest
    new = replace(after, adapter=replace(after.adapter, pairs=pairs), base_delta=_plus(before, after, gain))
    return new, kept, {"momentum_kept": held / (held + lost)} if held else {}


def _change(module: str, before: State, after: State, still: State) -> Pair:
    """Δ of one ΔW, the pair's part and the base delta's together, in the fewest directions."""
    terms = [(after.adapter.pairs[module], 1.0), (still.adapter.pairs[module], -1.0)]
    for state, sign in ((after, 1.0), (still, -1.0)):
        if module in (gained := _gained(before, state)):
            terms.append((gained[module], sign))
    moving = [(pair, sign) for pair, sign in terms if pair.B.any()] or terms[:1]
    pairs, signs = zip(*moving, strict=True)
    return weighted_sum(pairs, signs, 1.0)


def _gained(before: State, after: State) -> Mapping[str, Pair]:
    """What a round has added to the base delta."""
    if after.base_delta is before.base_delta:
        return {}
    return BaseDelta.of(after.base_delta).increment


def _plus(before: State, after: State, gain: Mapping[str, Pair]) -> Mapping[str, Pair]:
    """The base delta after the round with this added, as one increment since the state before."""
    if not gain:
        return after.base_delta
    gained = dict(_gained(before, after))
    for m, pair in gain.items():
        gained[m] = stack([gained[m], pair], [1.0, 1.0]) if m in gained else pair
    return BaseDelta.of(before.base_delta).plus(gained)
