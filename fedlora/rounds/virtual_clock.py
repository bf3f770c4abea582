"""Virtual time: when simulated clients would have finished, without waiting for it."""

import json
from collections.abc import Callable, Iterable, Mapping

from fedlora.errors import CheckpointError
from fedlora.rounds.speeds import Pace, Speeds


class VirtualClock:
    """The time of a simulated federation in virtual seconds, which goes on without anybody waiting.

    Args:
        speeds: of the clients.
        seed: the run's.
        steps: gives the number of local steps of a client.
        enough: from the number of clients that train to how many a synchronous round waits for.
    """

    def __init__(
        self,
        speeds: Speeds,
        seed: int,
        steps: Callable[[int], int] = lambda client: 1,
        enough: Callable[[int], int] = lambda clients: clients,
    ) -> None:
        self._speeds, self._seed, self._steps, self._enough = speeds, seed, steps, enough
        self._paces: dict[int, Pace] = {}
        self._late: dict[int, float] = {}  # client -> when it is done with what nobody waits for
        self.now = 0.0

    def pace(self, client: int) -> Pace:
        """One client's speed and absences."""
        if client not in self._paces:
            self._paces[client] = self._speeds.pace(client, self._seed)
        return self._paces[client]

    def finish(self, client: int) -> float:
        """When the reply of a client arrives that is sent its task now."""
        pace = self.pace(client)
        return pace.back(
            self.now + pace.seconds * (1 if self._speeds.per == "round" else self._steps(client))
        )

    def free(self, client: int) -> float:
        """The first instant, from now on, at which a client is there and does not work on what is late."""
        return self.pace(client).back(max(self.now, self._late.get(client, 0.0)))

    def wait_for(self, clients: Iterable[int], count: int = 1) -> None:
        """Go on to the first instant at which so many of these clients are free, or all of them."""
        when = sorted(map(self.free, clients))
        if when:
            self.now = max(self.now, when[min(count, len(when)) - 1])

    def late(self, clients: Iterable[int]) -> set[int]:
        """Go on to the end of a synchronous round; the clients that it does not wait for.

        Those are away until they are done, since they work on.

        Args:
            clients: all that were sent a task now.
        """
        ends = sorted((self.finish(client), client) for client in clients)
        enough = self._enough(len(ends))
        late = {client: when for when, client in ends[enough:]}
        if ends[:enough]:
            self.now = ends[enough - 1][0]
        self._late = {c: when for c, when in (self._late | late).items() if when > self.now}
        return {*late}

    def dump(self) -> str:
        """All that it has to remember in a checkpoint, as JSON."""
        return json.dumps({"now": self.now, "late": self._late})

    def load(self, text: str) -> None:
        """Take up what `dump` has written.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            found: Mapping[str, dict[str, float]] = json.loads(text)
            self.now = float(found["now"])  # type: ignore[arg-type]
            self._late = {int(client): float(when) for client, when in found["late"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's virtual time is damaged: {error!r}") from error
