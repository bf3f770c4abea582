"""FedAsync: every update is mixed into the state as it comes.

Xie, Koyejo, Gupta. "Asynchronous Federated Optimization". OPT2020. https://arxiv.org/abs/1903.03934.

    the paper    x ← (1 − α_t) x + α_t x_k,                α_t = α · s(τ_k)
    here         x ← x + α_t Δ_k,    Δ_k = x_k − x_{t − τ_k}

Differs from the paper: what a client has changed is added, instead of mixing x with what the client holds.
For τ_k = 0 and one full rank both are the same. For a client of a smaller rank the mix would take from x, in
every step, a part α_t of all that the client's cut lacks, and for an old version it would undo what others
have learned since.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.serverapp import Grid

from fedlora.ranges import check_number, check_whole
from fedlora.rounds.aggregation.base import Aggregation
from fedlora.rounds.aggregation.buffered import BufferedAggregation
from fedlora.rounds.scheduling import Scheduler
from fedlora.schedulers.flight import buffers
from fedlora.schedulers.staleness import Staleness

if TYPE_CHECKING:
    from fedlora.rounds.loop import ServerLoop


@dataclass(frozen=True)
class Asynchronous(Scheduler):
    """Aggregates every single update.

    Args:
        alpha: α, what is taken of the change of an update of the newest version, above 0 and up to 1.
        concurrency: how many clients are at work at a time; None takes clients_per_round, or all clients.
        staleness: s, polynomial, hinge or constant.
        exponent: of the polynomial (τ + 1)^−exponent.
        slope: of the hinge 1 / (slope · (τ − threshold) + 1).
        threshold: up to which the hinge is 1.
        max_staleness: an update of a task from more rounds ago is dropped; None drops none.
    """

    alpha: float = 0.6
    concurrency: int | None = None
    staleness: str = "polynomial"
    exponent: float = 0.5
    slope: float = 10.0
    threshold: int = 4
    max_staleness: int | None = None

    mixes_versions = True

    def __post_init__(self) -> None:
        check_number("scheduler.alpha", self.alpha, above=0, most=1)
        check_whole("scheduler.concurrency", self.concurrency, none=True)
        check_whole("scheduler.max_staleness", self.max_staleness, 0, none=True)
        self._staleness  # noqa: B018 (it checks the rest)

    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """A round is one update."""
        return buffers(server, grid, 1, self.concurrency, self.max_staleness)

    def aggregation(self, synchronous: Aggregation) -> Aggregation:
        """The change of one update is added, by its age."""
        return BufferedAggregation.of(synchronous, self._staleness.factor, self.alpha)

    @property
    def _staleness(self) -> Staleness:
        return Staleness(self.staleness, self.exponent, self.slope, self.threshold)
