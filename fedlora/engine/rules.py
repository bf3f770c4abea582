"""How a federation is run, whatever the algorithm."""

from dataclasses import dataclass
from typing import Literal

from fedlora.errors import ConfigError


@dataclass(frozen=True)
class Rules:
    """How a federation is run, whatever the algorithm.

    Args:
        rounds: in all, those before a resume included.
        seed: of sampling, and of all that clients draw.
        clients_per_round: how many are sampled without replacement; None takes all.
        weights: what a client counts, "examples" or "uniform".
        min_updates: with fewer good updates a round ends without changing the state.
        evaluate_every: rounds between evaluations on the server's test rows; 0 never.
        evaluate_updates: whether each client's update is also evaluated by itself on those rows, which shows
            what the client would have reached alone.
        evaluate_clients: whether clients evaluate their own models, before they train and at the end.
        secure_sum: whether clients send under masks that cancel in the sum, so that the server sees no more.
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

    def __post_init__(self) -> None:
        least = {"rounds": 1, "seed": 0, "clients_per_round": 1, "min_updates": 1, "evaluate_every": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: expected a whole number of at least {low}, got {value}")
        if self.weights not in ("examples", "uniform"):
            raise ConfigError(f"weights: expected examples or uniform, got '{self.weights}'")
