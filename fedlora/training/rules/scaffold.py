"""SCAFFOLD: every step of a client is corrected by how its gradients differ from those of all clients.

Karimireddy, Kale, Mohri, Reddi, Stich, Suresh. "SCAFFOLD: Stochastic Controlled Averaging for Federated
Learning". ICML 2020. https://arxiv.org/abs/1910.06378, algorithm 1 with option II:

    client k    y ← y − lr (g_k(y) − c_k + c)    K times, from y = x
                c_k⁺ = c_k − c + (x − y) / (K lr)
                sends y and Δc_k = c_k⁺ − c_k
    server      c ← c + |S|/N · mean_{k in S} Δc_k

x is all that clients train and share: factors and head, each at its own rate. The correction is added to the
gradient, ahead of the optimizer. c_k⁺ is then the mean of the gradients that the client has seen, which is
true of plain steps at one rate alone: of others, (x − y) / (K lr) is no gradient.

The server keeps Σ_k c_k of each number and divides by the clients that hold it, N or, for a direction that
not every rank reaches, as many as have it. An update may be lost after the client has moved on. The server
therefore says which of a client's answers it has counted last, and the client goes on from the c_k of that
one, so that c stays the mean of the c_k.

Sends: c down and Δc_k up, each as large as what is trained, so that a round costs twice the bytes.
Differs from the paper: mixed ranks and lost updates, as above; the server's own step has η_g = 1, which is
the strategy's mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedlora.core.messages import Peer, Task, Update
from fedlora.errors import CheckpointError
from fedlora.training.rules.base import (
    Learned,
    LocalRule,
    RoundEnd,
    RoundStart,
    ServerMemory,
    Term,
    corner,
)

SUM, COUNTED = "sum/", "counted"  # the server's: Σ_k c_k; and a row (client, its last answer that is in it)
OWN, NEXT = "own/", "next/"  # a client's: c_k and c_k⁺
ANSWERED = "answered"  # the versions of the states that the two answer to
NEVER = -1


@dataclass(frozen=True)
class Scaffold(LocalRule):
    """For clients whose rows differ, trained by plain SGD; doubles what is sent."""

    plain_sgd = True
    fixed_basis = True
    uniform = True

    def ask(self, known: ServerMemory, task: Task, peer: Peer) -> "Corrected":
        """The mean c of all c_k, as far as the client's ranks reach."""
        tensors, common = dict(task.adapter.tensors()), dict[str, Tensor]()
        for name in task.shared():
            if (total := known.tensors.get(f"{SUM}{name}")) is not None:
                like = tensors[name]
                mean = corner(total, like.shape).double() / known.holders(name, like.shape)
                common[name] = mean.to(like.dtype)
        return Corrected(common, known.version, _counted(known).get(peer.id, NEVER))

    def learn(self, known: ServerMemory, updates: Sequence[Update]) -> dict[str, Tensor]:
        """Σ_k c_k + Σ Δc_k, where a smaller rank counts as padded with zeros, and whose answers are in it."""
        found = dict(known.tensors)
        for name in updates[0].sent if updates else ():
            old = found.get(f"{SUM}{name}", torch.zeros(known.widest(name)))
            total = old.to(torch.float64, copy=True)
            for update in updates:
                corner(total, update.sent[name].shape).add_(update.sent[name].double())
            found[f"{SUM}{name}"] = total.to(updates[0].sent[name].dtype)
        answers = {u.peer.id: u.version for u in updates if u.peer and u.version is not None}
        rows = sorted({**_counted(known), **answers}.items())
        return {**found, COUNTED: torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)}


@dataclass(frozen=True)
class Corrected(LocalRule):
    """The half of `Scaffold` at a client.

    Args:
        common: c; empty stands for zeros.
        version: of the state that the task comes from.
        counted: the same of the client's last answer that is in c; −1 for none.
    """

    common: Mapping[str, Tensor] = field(default_factory=dict)
    version: int = NEVER
    counted: int = NEVER

    def term(self, given: RoundStart) -> Term:
        """The same c − c_k in every step.

        Raises:
            CheckpointError: the server has counted an answer that the client knows nothing of any more.
        """
        own = self._own(given.memory)
        terms = {
            name: (_of(self.common, name, begun) - _of(own, name, begun)).to(begun)
            for name, begun in given.start.items()
            if name in self.common or name in own
        }
        return lambda tensors: terms

    def sends(self, task: Task) -> dict[str, Tensor]:
        """Δc_k, as large as what is shared."""
        tensors = dict(task.adapter.tensors())
        return {name: tensors[name] for name in task.shared()}

    def end(self, given: RoundEnd) -> Learned:
        """Δc_k to send, and c_k⁺ beside c_k to keep, since nobody knows yet whether Δc_k will arrive."""
        own, sent = self._own(given.memory), dict[str, Tensor]()
        memory = {f"{OWN}{name}": tensor for name, tensor in own.items()}
        before, after = dict(given.adapter.tensors()), dict(given.trained.tensors())
        for name, rate in given.rates.items():
            x, y = before[name], after[name]
            change = torch.zeros_like(x)
            if given.steps:
                mean = (x.double() - y.double()) / (given.steps * rate)  # of the gradients, c − c_k added
                change = (mean - _of(self.common, name, x)).to(x.dtype)
            sent[name] = change
            memory[f"{NEXT}{name}"] = (_of(own, name, x) + change.double()).to(x.dtype)
        return Learned({**memory, ANSWERED: torch.tensor([self.counted, self.version])}, sent)

    def _own(self, memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """c_k as the server has counted it; empty stands for zeros."""
        if self.counted == NEVER:
            return {}
        known = dict(zip(memory[ANSWERED].tolist() if ANSWERED in memory else [], (OWN, NEXT), strict=False))
        if self.counted not in known:
            raise CheckpointError(
                f"SCAFFOLD: this client lacks the control variate that it had after round {self.counted + 1} "
                "and that is in the mean of all; put back what the client kept, or begin the run anew"
            )
        part = known[self.counted]
        return {name.removeprefix(part): t for name, t in memory.items() if name.startswith(part)}


def _counted(known: ServerMemory) -> dict[int, int]:
    """Client id -> the version of the state that its last counted answer is to."""
    rows = known.tensors.get(COUNTED, torch.empty(0, 2)).tolist()
    return {int(client): int(version) for client, version in rows}


def _of(variates: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    """A control variate in float64 on the CPU; zeros where there is none."""
    found = variates.get(name)
    return torch.zeros(like.shape, dtype=torch.float64) if found is None else found.double()
