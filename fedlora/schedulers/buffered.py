"""FedBuff: the server aggregates whenever a buffer of updates is full, and nobody waits for anybody.

Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba. "Federated Learning with Buffered Asynchronous
Aggregation". AISTATS 2022. https://arxiv.org/abs/2106.06639, algorithm 1.

    x ← x + η Σ_k c_k Δ_k,    c_k = s(τ_k) · n_k / Σ_j n_j,    Δ_k = x_k − x_{t − τ_k}

So many clients are always at work; whoever is done is replaced at once by another, who is sent the newest
state. τ_k counts the states that there have been since client k was sent its own.

Differs from the paper: Δ_k is the change of the effective weight against the cut that was sent, see
`fedlora.core.changes`; clients are weighted by their numbers of examples unless weights=uniform, which is the
paper's; no client is twice in a buffer. A buffer that all clients at work have filled, with the newest state,
is a synchronous round, and the strategy averages it by its own rule.
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
class Buffered(Scheduler):
    """Aggregates every so many updates, whichever clients they come from.

    Args:
        buffer: K, the updates of an aggregation, which is a round of the run. None takes half as many as are
            at work, and no more than 10, the paper's K.
        concurrency: how many clients are at work at a time; None takes clients_per_round, or all clients.
        lr: η, the step of the server.
        staleness: s, polynomial, hinge or constant.
        exponent: of the polynomial (τ + 1)^−exponent.
        slope: of the hinge 1 / (slope · (τ − threshold) + 1).
        threshold: up to which the hinge is 1.
        max_staleness: an update of a task from more rounds ago is dropped; None drops none.
        cap: a client's examples count at most so many times the buffer's median; None does not cap.
    """

    buffer: int | None = None
    concurrency: int | None = None
    lr: float = 1.0
    staleness: str = "polynomial"
    exponent: float = 0.5
    slope: float = 10.0
    threshold: int = 4
    max_staleness: int | None = None
    cap: float | None = 4.0

    mixes_versions = True

    def __post_init__(self) -> None:
        check_whole("scheduler.buffer", self.buffer, none=True)
        check_whole("scheduler.concurrency", self.concurrency, none=True)
        check_whole("scheduler.max_staleness", self.max_staleness, 0, none=True)
        check_number("scheduler.lr", self.lr, above=0)
        check_number("scheduler.cap", self.cap, least=1, none=True)
        self._staleness  # noqa: B018 (it checks the rest)

    def rounds(self, server: "ServerLoop", grid: Grid) -> Iterator[dict[str, Any]]:
        """A round is a buffer."""
        size = self.size(server.config.clients_per_round or server.config.clients)
        return buffers(server, grid, size, self.concurrency, self.max_staleness)

    def size(self, clients: int) -> int:
        """K, where so many clients may be at work."""
        return self.buffer or min(10, max(1, (self.concurrency or clients) // 2))

    def aggregation(self, synchronous: Aggregation) -> Aggregation:
        """Changes are added, each by its age."""
        return BufferedAggregation.of(synchronous, self._staleness.factor, self.lr, self.cap)

    @property
    def _staleness(self) -> Staleness:
        return Staleness(self.staleness, self.exponent, self.slope, self.threshold)
