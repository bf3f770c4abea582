"""One optimizer for all clients whose factors lie in stacks, on a GPU.

An optimizer that moves every number by itself gives a client in the stacks what an optimizer of its own would
give it, and its work does not grow with the number of clients. Others are made once a client, as on a CPU.
"""

from collections.abc import Sequence

import torch

from fedlora.core.adapter import Adapter
from fedlora.models import MultiAdapterModel
from fedlora.training.gradients import Gathering
from fedlora.training.steps import Apart, FitJob, How, Learner, check_called
from fedlora.training.workers import Workers

# They move each number by what they know of it alone, and in proportion to the rate.
ELEMENTWISE = frozenset(
    {
        torch.optim.SGD,
        torch.optim.Adam,
        torch.optim.AdamW,
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
    }
)


class Together:
    """One optimizer moves the stacks of all clients, which take each step together.

    A client that has fewer steps than others is as it was after its last one: what an optimizer does to it
    afterwards, by its momentum, is not looked at.

    Args:
        jobs: one a slot.
        bank: with stacks.
        how: the steps.
        optimizer: of the stacks and of the clients' heads, one that moves every number by itself.
        gathering: how the gradients come to the stacks and the heads.
    """

    lockstep = True

    def __init__(
        self,
        jobs: Sequence[FitJob],
        bank: MultiAdapterModel,
        how: How,
        optimizer: torch.optim.Optimizer,
        gathering: Gathering,
    ) -> None:
        assert bank.stacks is not None
        self._bank, self._how, self._stacks, self._optimizer = bank, how, bank.stacks, optimizer
        self._gathering = gathering
        self._learners = [Learner(job, bank, slot) for slot, job in enumerate(jobs)]
        self._heads = [bank.factors(slot).get("head", []) for slot in range(len(jobs))]
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._last = max(learner.steps for learner in self._learners)
        idle = [slot for slot, learner in enumerate(self._learners) if not learner.steps]
        self._done = {slot: bank.adapter(slot) for slot in idle}

    def begin(self, slots: Sequence[int]) -> None:
        """Nothing: there is one optimizer from the start."""

    def step(self, slots: Sequence[int], step: int, workers: Workers) -> None:
        """Move these clients by the gradients that are there; the same as `Apart.step`, up to rounding."""
        batches = {slot: self._learners[slot].job.batches[step] for slot in slots}
        self._gathering.release({slot: len(batch) for slot, batch in batches.items()}, workers)
        if step == 0:
            silent = 0 if self._gathering.by_row else self._stacks.silent
            check_called([p for slot in slots for p in self._heads[slot]], silent)
        for slot in slots:
            self._learners[slot].add_rules()
        if self._how.clip is not None:
            self._clip(self._how.clip)
        factors = [self._how.factor(step, own.steps, own.job.rate) for own in self._learners]
        self._move(factors, slots)
        self._stacks.moved()
        for slot in slots:
            if step + 1 == self._learners[slot].steps < self._last:
                self._done[slot] = self._bank.adapter(slot)

    def adapter(self, slot: int) -> Adapter:
        """What a client has trained."""
        return self._done[slot] if slot in self._done else self._bank.adapter(slot)

    @torch.no_grad()
    def _clip(self, longest: float) -> None:
        """Shorten each client's gradient over all that it trains, as torch's `clip_grad_norm_` does."""
        stacks = [p.grad for p in self._stacks.values.values() if p.grad is not None]
        heads = [[p.grad for p in own if p.grad is not None] for own in self._heads]
        squares = sum((g.square().sum(1) for g in stacks), torch.zeros((), device=stacks[0].device))
        if any(heads):
            of_head = [torch.stack([g.norm() for g in own]).square().sum() if own else None for own in heads]
            zero = squares.new_zeros(())
            squares = squares + torch.stack([zero if found is None else found for found in of_head])
        factors = (longest / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        for grad in stacks:
            grad.mul_(factors[:, None])
        for slot, own in enumerate(heads):
            for grad in own:
                grad.mul_(factors[slot])

    @torch.no_grad()
    def _move(self, factors: Sequence[float], slots: Sequence[int]) -> None:
        """One step of the optimizer, in which each client moves by its own factor of the rate."""
        live = {factors[slot] for slot in slots}
        one = live.pop() if len(live) == 1 else None
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate if one is None else rate * one
        if one is not None:
            self._optimizer.step()
        else:
            stacks = list(self._stacks.values.values())
            heads = [(p, factors[slot]) for slot in slots for p in self._heads[slot]]
            before = [p.detach().clone() for p in stacks], [p.detach().clone() for p, _ in heads]
            self._optimizer.step()
            each = torch.tensor(factors, dtype=stacks[0].dtype).to(stacks[0].device)[:, None]
            for p, old in zip(stacks, before[0], strict=True):
                p.copy_(torch.lerp(old, p.detach(), each))
            for (p, factor), old in zip(heads, before[1], strict=True):
                p.copy_(torch.lerp(old, p.detach(), factor))
        for own in self._heads:
            for p in own:
                p.grad = None


def steps_of(
    jobs: Sequence[FitJob], bank: MultiAdapterModel, how: How, gathering: Gathering
) -> Apart | Together:
    """The steps of these clients: by one optimizer where the bank has stacks and the optimizer allows it.

    Args:
        jobs: one a slot.
        bank: holds what they train.
        how: the steps.
        gathering: how the gradients come to the parameters.
    """
    if bank.stacks:
        groups = {name: [p] for name, p in bank.stacks.values.items()}
        heads = [p for slot in range(len(jobs)) for p in bank.factors(slot).get("head", [])]
        optimizer = how.make_optimizer({**groups, "head": heads} if heads else groups)
        if type(optimizer) in ELEMENTWISE:
            return Together(jobs, bank, how, optimizer, gathering)
    return Apart(jobs, bank, how, gathering)
