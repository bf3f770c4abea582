"""Refused pairings with local rules; `compatibility` lists them all."""

from fedlora.core.strategy import named as strategies
from fedlora.engines.base import fans
from fedlora.errors import ConfigError
from fedlora.privacy import DPSGD, ClientLevel
from fedlora.rounds.scheduling import Synchronous

from .dealt import Dealt
from .spec import RunSpec


def rule_of_client(spec: RunSpec) -> str | None:
    """A local rule that the client does not follow, or that its privacy does not cover."""
    if spec.rule is not None:
        try:
            spec.local_client  # noqa: B018 (it is made to see whether it can be)
        except ConfigError as error:
            return str(error)
    return None


def products_without_pairs(spec: RunSpec) -> str | None:
    """A rule of low-rank terms, which an adapter of this parametrization does not show."""
    form = spec.lora.form
    if spec.rule is not None and spec.rule.of_products and form.has_low_rank and not form.pairs:
        return (
            f"rule: {_name(spec)} holds the low-rank terms of an adapter, and those of "
            f"lora.parametrization={type(form).__name__} follow from the model's layers, too; use "
            "rule.space=factors"
        )
    return None


def steps_of_rule(spec: RunSpec) -> str | None:
    """A rule whose formulas take every step for a plain one."""
    if spec.rule is not None and spec.rule.plain_sgd and (why := spec.client.other_than_sgd):
        return (
            f"rule: {_name(spec)} reads gradients off where plain SGD has gone at one rate, and {why}; "
            "say client.optimizer._target_=torch.optim.SGD client.clip=null client.schedule=constant "
            "client.warmup=0, and no other rules, of client=local"
        )
    return None


def basis_of_rule(spec: RunSpec) -> str | None:
    """A rule that remembers numbers whose meaning changes from round to round or from client to client."""
    strategy = spec.strategy
    if spec.rule is not None and spec.rule.fixed_basis and (strategy.personal or not strategy.fixed_basis):
        why = (
            "leaves each client a part of its own, so that gradients of the rest answer different questions"
            if strategy.personal
            else "gives the trained tensors another meaning from one round to the next"
        )
        return (
            f"rule: {_name(spec)} adds what it remembers in the coordinates of the factors, and strategy "
            f"{spec.strategy_class} {why}; use {strategies(lambda s: s.fixed_basis and not s.personal)}, or "
            "set fixed_basis in a strategy of yours where it is true"
        )
    return None


def weights_of_rule(spec: RunSpec) -> str | None:
    """A rule that counts clients alike, beside a strategy that does not."""
    if spec.rule is not None and spec.rule.uniform and spec.weights != "uniform":
        return (
            f"rule: {_name(spec)} counts clients alike, and with weights={spec.weights} the model would be "
            "drawn to another optimum than the weighted one; say weights=uniform"
        )
    return None


def rule_at_server(spec: RunSpec) -> str | None:
    """What a client sends beside its update, where the server may see no single update."""
    rule = spec.rule
    if rule is None or not rule.at_server:
        return None
    if isinstance(spec.privacy, DPSGD | ClientLevel):
        return (
            f"rule: what {_name(spec)} has clients send beside their updates is another release, which "
            "epsilon does not count; use rule=fedprox, or privacy=none"
        )
    if spec.secure_sum:
        return (
            f"rule: what {_name(spec)} has clients send beside their updates would arrive without masks; use "
            "rule=fedprox, or secure_sum=false"
        )
    if spec.robust is not None:
        return (
            f"rule: robust={type(spec.robust).__name__} judges updates, and not what {_name(spec)} has "
            "clients send beside them, by which one client could move all others; leave one of them out"
        )
    if len(fans(spec.engine.tree)) > 1:
        return (
            f"rule: the edges of engine.tree forward sums of updates, and what "
            f"{_name(spec)} has clients send beside them goes by client; use rule=fedprox, or leave the "
            "tree out"
        )
    if type(spec.scheduler) is not Synchronous:
        return (
            f"scheduler: {_name(spec)} takes all that clients send for answers to the state before the "
            f"round, got {type(spec.scheduler).__name__}; use scheduler=synchronous, or rule=fedprox"
        )
    return None


def scales_of_rule(known: Dealt) -> str | None:
    """One rate is another step of s · B · A at each scale, and so is what is remembered of it."""
    lora, rule = known.spec.lora, known.spec.rule
    by_rank = lora.alpha is not None or lora.alpha_pattern
    if rule is not None and rule.fixed_basis and by_rank and len({*known.ranks}) > 1:
        return (
            f"rule: {_name(known.spec)} needs clients of one scale, and by lora.alpha the ranks "
            f"{sorted({*known.ranks})} have different ones; say lora.scale=2 and leave lora.alpha out"
        )
    return None


def _name(spec: RunSpec) -> str:
    return type(spec.rule).__name__
