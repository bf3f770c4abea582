"""Local training by a torch optimizer: the ordinary client of federated averaging.

McMahan, Moore, Ramage, Hampson, Agüera y Arcas. "Communication-Efficient Learning of Deep Networks from
Decentralized Data". AISTATS 2017. https://arxiv.org/abs/1602.05629

A client goes through its own rows in seeded order, `epochs` times or for so many `steps`, with an optimizer
that starts anew each round: after the server has combined factors, old moments point nowhere.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fedlora.core.adapter import Adapter
from fedlora.core.messages import Task
from fedlora.data import Example
from fedlora.errors import ConfigError
from fedlora.models import Base
from fedlora.privacy import DPSGD, Plan, self_test
from fedlora.ranges import check_number, check_whole
from fedlora.seeds import generator
from fedlora.training.batches import steps_of_pass
from fedlora.training.client import Client, TrainRequest, TrainResult
from fedlora.training.round_schedule import RoundSchedule
from fedlora.training.rules.base import LocalRule, RoundEnd, check_private, part_of, rules_of
from fedlora.training.steps import FitJob, Parameters
from fedlora.training.trainer import FitResult, descend, fit

ADAMW = partial(torch.optim.AdamW, weight_decay=0.0)  # the default of `optimizer`


@dataclass(frozen=True)
class LocalTraining(Client):
    """E epochs, or so many steps, of minibatch training of the factors and the head.

    Args:
        lr: learning rate of A and B.
        lr_ratio: B's learning rate over A's (LoRA+, Hayou et al., ICML 2024, arXiv:2402.12354).
        head_lr: learning rate of the head; None takes `lr`.
        batch_size: rows a batch.
        accumulate: batches a step, by the mean over all their rows (gradient accumulation). The last step of
            a pass may have fewer. What is in memory at once is `micro_tokens`, whatever a step holds.
        max_tokens: tokens that a batch holds at most, instead of `batch_size` rows; a longer row is alone.
        epochs: passes over the client's rows a round.
        steps: so many steps a round instead, going round the rows as often as needed.
        optimizer: from parameter groups to an optimizer, such as a partial of `torch.optim.AdamW`.
        clip: largest gradient norm over all that a client trains; None does not clip.
        schedule: "constant", "linear" or "cosine" decay to zero over the client's own steps of a round.
        warmup: share of the steps in which the rate rises from zero.
        over_rounds: the rate over the rounds of the federation, which multiplies with `schedule`, and the
            number of steps of each round.
        micro_tokens: tokens a micro-batch holds at most, in training and evaluation, and a step of clients
            that train together. It changes speed and memory, and of the result no more than its rounding.
            None chooses by the rows.
        privacy: differential privacy of each row; a step's rows are then drawn at random, `batch_size` times
            `accumulate` on the average, `clip` is off beside the privacy's own, and no loss is reported
            unless it may be.
        rules: what bends the training, such as `FedProx`; beside the rules that a strategy's task brings.
    """

    lr: float
    lr_ratio: float = 1.0
    head_lr: float | None = 1e-2
    batch_size: int = 8
    accumulate: int = 1
    max_tokens: int | None = None
    epochs: int = 1
    steps: int | None = None
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW
    clip: float | None = 1.0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    micro_tokens: int | None = None
    privacy: DPSGD | None = None
    rules: Sequence[LocalRule] = ()
    over_rounds: RoundSchedule = field(default_factory=RoundSchedule)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        for name in ("batch_size", "accumulate", "max_tokens", "epochs", "steps", "micro_tokens"):
            optional = name in ("max_tokens", "steps", "micro_tokens")
            check_whole(f"client.{name}", getattr(self, name), none=optional)
        for name in ("lr", "lr_ratio", "head_lr", "clip"):
            check_number(f"client.{name}", getattr(self, name), above=0, none=name in ("head_lr", "clip"))
        if self.schedule not in ("constant", "linear", "cosine"):
            raise ConfigError(f"client.schedule: expected constant, linear or cosine, got '{self.schedule}'")
        check_number("client.warmup", self.warmup, least=0, most=1, what="share")
        for rule in self.rules:
            if not isinstance(rule, LocalRule):
                raise ConfigError(f"client.rules: expected local rules, got a {type(rule).__name__}")
            if rule.replies(Adapter({})):
                raise ConfigError(
                    f"client.rules: {type(rule).__name__} changes ranks, which the server has to expect; use "
                    "a strategy that brings it, such as hetlora"
                )
            if rule.at_server:
                raise ConfigError(
                    f"client.rules: {type(rule).__name__} has a half at the server, which has to know of it; "
                    "say rule=... of the run"
                )
        if self.privacy is not None:
            check_private(self.rules)
            if self.max_tokens is not None:
                raise ConfigError(
                    "client.max_tokens: under privacy=dp_sgd how many rows a step has must not depend on how "
                    "long they are; leave it out, and say client.batch_size"
                )
            if self.over_rounds.steps is not None:
                raise ConfigError(
                    "client.over_rounds.steps: under privacy=dp_sgd the noise is planned, and accounted for, "
                    "by one number of steps in every round; leave it out, and say client.steps"
                )

    def train(self, base: Base, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """Train all assignments in one pass; what is a client's own goes on from its memory and into it."""
        if self.privacy is not None:
            return self._train_privately(base, assignments, self.privacy)
        jobs = [
            FitJob(self._task(a), self.batches(a), rate=self.round_rate(a), memory=a.memory)
            for a in assignments
        ]
        fitted = fit(base, jobs, self.make_optimizer, self.rate_factor, self.clip, self.micro_tokens)
        return [
            replace(
                self._outcome(a, job, f),
                metrics={"loss": f.loss, "steps": float(f.steps), **self._told(a)},
            )
            for a, job, f in zip(assignments, jobs, fitted, strict=True)
        ]

    def with_rules(self, rules: Sequence[LocalRule]) -> "LocalTraining":
        """The same training with more rules, after those that it has."""
        return replace(self, rules=(*self.rules, *rules))

    def privately(self, privacy: DPSGD) -> "LocalTraining":
        """The same training by DP-SGD."""
        return replace(self, privacy=privacy)

    @property
    def private(self) -> bool:
        """Whether there is a privacy."""
        return self.privacy is not None

    def plan(self, rows: int) -> Plan | None:
        """The noise, for steps of `step_rows` rows on the average."""
        privacy = self.privacy
        return None if privacy is None else privacy.plan(rows, self.step_rows, self.count_steps(rows))

    def _train_privately(
        self, base: Base, assignments: Sequence[TrainRequest], privacy: DPSGD
    ) -> list[TrainResult]:
        sizes = [len(a.rows) for a in assignments]
        plans = [privacy.plan(size, self.step_rows, self.count_steps(size)) for size in sizes]
        jobs = []
        for a, plan in zip(assignments, plans, strict=True):
            if why := plan.refusal(a.ledger):
                raise ConfigError(why)
            task = self._task(a)
            check_private(rules_of(task))
            self_test(base, task)
            mechanism = plan.mechanism(a.client, a.round)
            drawn = [mechanism.source.chosen(len(a.rows), plan.q) for _ in range(plan.steps)]
            batches = [[a.rows[i] for i in batch] for batch in drawn]
            jobs.append(FitJob(task, batches, mechanism, self.round_rate(a), a.memory))
        fitted = fit(base, jobs, self.make_optimizer, self.rate_factor, None, self.micro_tokens)
        outcomes = []
        for a, job, f, plan in zip(assignments, jobs, fitted, plans, strict=True):
            ledger, examples = plan.after(a.ledger), None if privacy.public_counts else 1
            metrics = privacy.report(plan, ledger) | self._told(a)
            if privacy.public_metrics and f.clipped is not None:
                metrics |= {"loss": f.loss, "clipped": f.clipped}
            made = self._outcome(a, job, f)
            outcomes.append(replace(made, metrics=metrics, ledger=ledger, examples=examples))
        return outcomes

    def descend(
        self,
        base: Base,
        parameters: Parameters,
        losses: Callable[[list[Example]], Tensor],
        batches: Sequence[Sequence[Example]],
        rate: float = 1.0,
    ) -> tuple[float, int]:
        """The same kind of steps for one client, on a loss of the caller's; see `trainer.descend`.

        Raises:
            ConfigError: there are rules, which such steps do not follow.
        """
        if self.rules:
            names = ", ".join(type(rule).__name__ for rule in self.rules)
            raise ConfigError(f"client: steps on a loss of its own follow no local rule, got {names}")
        made, tokens = self.make_optimizer, self.micro_tokens
        return descend(base, parameters, losses, batches, made, self.rate_factor, self.clip, tokens, rate)

    def round_rate(self, assignment: TrainRequest) -> float:
        """What all rates are multiplied with in the assignment's round."""
        return self.over_rounds.factor(assignment.round, assignment.rounds)

    def _told(self, assignment: TrainRequest) -> dict[str, float]:
        """The rate of A of the round, for the client's line, where rounds have rates of their own."""
        return {"lr": self.lr * self.round_rate(assignment)} if self.over_rounds.rates else {}

    def _task(self, assignment: TrainRequest) -> Task:
        """The task of a round from where the client starts, with the user's rules after the strategy's."""
        task = assignment.task
        return replace(task, adapter=assignment.start, method=(*task.method, *self.rules))

    def step_tokens(self, rows: Sequence[Example]) -> int:
        """Rows of a step times the mean length of a row; with `max_tokens` as many as a step may hold."""
        if not rows:
            return 0
        tokens = sum(row.size for row in rows)
        if self.max_tokens is not None:
            return min(self.accumulate * self.max_tokens, tokens)
        return math.ceil(min(self.step_rows, len(rows)) * tokens / len(rows))

    def batches(self, assignment: TrainRequest) -> list[list[Example]]:
        """The rows of each of the round's steps, a new order each pass; the last of a pass may have fewer."""
        rng = generator(assignment.seed, "batches", assignment.client, assignment.round)
        rows, found, passes = assignment.rows, list[list[Example]](), 0
        steps = self.over_rounds.steps_of(assignment.round) or self.steps
        while rows and (passes < self.epochs if steps is None else len(found) < steps):
            order = [rows[i] for i in rng.permutation(len(rows))]
            found += steps_of_pass(order, self.step_rows, self.max_tokens, self.accumulate)
            passes += 1
        return found[:steps]

    @property
    def step_rows(self) -> int:
        """Rows of a step, where no `max_tokens` says otherwise."""
        return self.batch_size * self.accumulate

    def count_steps(self, rows: int) -> int:
        """The steps of a round of a client of so many rows; not for `max_tokens`, which asks the rows."""
        return self.steps if self.steps is not None else math.ceil(rows / self.step_rows) * self.epochs

    def make_optimizer(self, parameters: Parameters) -> torch.optim.Optimizer:
        """The optimizer of a client's parameters, grouped as "A", "B" and "head", at their rates."""
        groups: list[dict[str, Any]] = [
            {"params": found, "lr": self._rate(name)} for name, found in parameters.items()
        ]
        return self.optimizer(groups)

    @property
    def other_than_sgd(self) -> str | None:
        """What of the optimizer, the clip or the schedule makes a step another one than x ← x − lr · g."""
        made = self.optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}])
        if type(made) is not torch.optim.SGD:
            return f"client.optimizer is {type(made).__name__}"
        if momentum := made.defaults["momentum"]:
            return f"client.optimizer.momentum is {momentum:g}"
        if self.clip is not None:
            return f"client.clip is {self.clip:g}"
        if self.schedule != "constant" or self.warmup:
            return f"the rate changes with client.schedule={self.schedule} client.warmup={self.warmup:g}"
        if self.rules:
            return f"client.rules adds {', '.join(type(rule).__name__ for rule in self.rules)} to it"
        return None

    def rate_factor(self, step: int, steps: int) -> float:
        """What the rates are multiplied with in a step, from 0, of so many."""
        rising = self.warmup * steps
        if step < rising:
            return (step + 1) / (rising + 1)
        done = (step - rising) / max(1.0, steps - rising)
        shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        return shapes[self.schedule]

    def _rate(self, group: str) -> float:
        """The rate of a group of parameters, which a schedule starts from."""
        return {"B": self.lr * self.lr_ratio, "head": self.head_lr or self.lr}.get(group, self.lr)

    def _outcome(self, assignment: TrainRequest, job: FitJob, fitted: FitResult) -> TrainResult:
        """What was trained, after the last word of the rules, and what the client and its rules keep."""
        task, adapter = job.task, fitted.adapter
        for rule in rules_of(task):
            adapter = rule.finish(adapter, task.adapter)
        tensors = dict(adapter.tensors())
        memory, sent = {name: tensors[name] for name in assignment.task.own()}, dict[str, Tensor]()
        words = {f"{m}.{word}": word for m, factors in task.adapter.factors().items() for word in factors}
        rates = {name: job.rate * self._rate(words.get(name, "head")) for name in task.trained()}
        for at, part in enumerate(task.method):
            if isinstance(part, LocalRule):
                own = part_of(job.memory, at)
                left = part.end(RoundEnd(task.adapter, fitted.adapter, fitted.steps, rates, own))
                memory |= {f"{at}/{name}": tensor for name, tensor in left.memory.items()}
                sent |= {f"{at}/{name}": tensor for name, tensor in left.sent.items()}
        if odd := sorted(sent.keys() ^ assignment.task.sent().keys()):
            raise ConfigError(
                f"rule: expected what the rules of a task announce in `sends`, and no more, got {odd[:3]} "
                "announced or sent alone; a rule that sends needs an `ask`"
            )
        return TrainResult(adapter, {}, memory, sent=sent)
