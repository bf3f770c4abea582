"""How a federation is run, whatever the algorithm."""

import math
from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError
from fedlora.ranges import check_number, check_whole


@dataclass(frozen=True)
class RoundConfig:
    """How a federation is run, whatever the algorithm.

    Args:
        rounds: the number of rounds in all, including those before a resume.
        seed: of sampling, and of all that clients draw.
        clients_per_round: how many clients are sampled without replacement; None takes all.
        clients: the number of clients; the first round waits for all of them.
        weights: how clients are weighted, "examples" or "uniform".
        min_updates: with fewer good updates a round ends without changing the state.
        evaluate_every: rounds between evaluations on the server's test rows; 0 never.
        evaluate_updates: whether each client's update is also evaluated by itself on those rows, which shows
            what the client would have reached alone.
        evaluate_clients: whether clients evaluate their own models, before they train and at the end.
        secure_sum: whether the server sees only the sum of the updates: clients send them under masks.
        timeout: seconds after which a round goes on without those who have not answered; None waits.
        over_select: the share of clients that are sampled beyond `clients_per_round`; the round waits for
            `clients_per_round` replies.
        min_replies: the share of the clients waited for that must send a good update, so that the round may
            change the state.
        wait: seconds to wait at the beginning of a round until enough nodes are connected.
        tree: how many edges the server has, how many each of them has below it, and so on to the clients;
            empty, or one number, where the server talks to the clients itself.
    """

    rounds: int
    seed: int
    clients_per_round: int | None = None
    weights: Literal["examples", "uniform"] = "examples"
    min_updates: int = 1
    evaluate_every: int = 1
    evaluate_updates: bool = False
    evaluate_clients: bool = False
    secure_sum: bool = False
    timeout: float | None = None
    over_select: float = 0.0
    min_replies: float = 0.0
    wait: float = 0.0
    clients: int = 1
    tree: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        least = {"rounds": 1, "seed": 0, "clients_per_round": 1, "min_updates": 1, "evaluate.every": 0}
        for name, low in least.items():
            check_whole(name, getattr(self, name.replace(".", "_")), low, none=name == "clients_per_round")
        if self.weights not in ("examples", "uniform"):
            raise ConfigError(f"weights: expected examples or uniform, got '{self.weights}'")
        if self.timeout is not None and not self.timeout > 0:
            raise ConfigError(f"engine.timeout: expected seconds above 0, or null, got {self.timeout}")
        for name, most in (("over_select", 10.0), ("min_replies", 1.0), ("wait", math.inf)):
            check_number(f"engine.{name}", getattr(self, name), least=0, most=most)

    def sampled(self, there: int) -> int:
        """How many of the connected clients a round samples."""
        if self.clients_per_round is None:
            return there
        return min(there, math.ceil(self.clients_per_round * (1 + self.over_select)))

    def enough(self, sampled: int) -> int:
        """For how many of the sampled clients a round waits."""
        return min(sampled, self.clients_per_round or sampled)

    def least(self, sampled: int) -> int:
        """How many good updates a round of so many sampled clients needs to change the state."""
        return max(self.min_updates, math.ceil(self.min_replies * self.enough(sampled)))
