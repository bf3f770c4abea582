"""What a site spends at most over all runs, and what it has promised to each so far."""

import json
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import CheckpointError, ConfigError
from fedlora.privacy import DPSGD, Plan, Privacy
from fedlora.storage.atomic import locked, write_whole

PROMISED = "promised.json"
LOCK = "promised.lock"
ROUNDING = 1 + 1e-9


@dataclass(frozen=True)
class Promise:
    """The most that one run may spend at a site; over several runs both numbers add up.

    Args:
        epsilon: of the run.
        delta: at which its epsilon is read.
        client: the number under which the site takes part in the run; None where an older file does not say.
    """

    epsilon: float
    delta: float
    client: int | None = None


@dataclass(frozen=True)
class Limits:
    """A site's limits of privacy, which hold whatever a run asks for.

    Args:
        home: the folder in which promises are kept.
        epsilon: the most that all runs together may spend.
        delta: the largest of a run; None takes min(1e-5, a tenth of 1 / rows), as a run does that says none.
            Whatever it is, the deltas of all runs together stay below 1 / rows.
        client: the site's number. A ledger is kept under it, so that one run must not be met under two
            numbers: it would then spend its epsilon twice.
    """

    home: Path
    epsilon: float
    delta: float | None = None
    client: int = 0

    def accept(self, privacy: Privacy | None) -> None:
        """Refuse a privacy for which this site's epsilon would mean nothing.

        Raises:
            ConfigError: it is not that of records, its noise is not random, or losses would be told.
        """
        if not isinstance(privacy, DPSGD):
            raise ConfigError("this site takes part in private runs alone (epsilon); say privacy=dp_sgd")
        if not privacy.valid:
            raise ConfigError("this site's epsilon would not hold: leave privacy.insecure_test_seed out")
        if privacy.public_metrics:
            raise ConfigError("this site's epsilon would not hold: leave privacy.public_metrics out")

    def check(self, experiment: str, plan: Plan | None, rows: int) -> None:
        """Refuse a run that could spend more than is left.

        Args:
            experiment: the run's name.
            plan: how the client that is to train will spend; None where it trains without privacy.
            rows: of the site.

        Raises:
            ConfigError: no privacy, too large a delta, the run is known under another client's number, or too
                little epsilon or delta is left.
        """
        self.accept(None if plan is None else plan.privacy)
        assert plan is not None
        most = min(1e-5, 1 / (10 * rows)) if self.delta is None else self.delta
        if plan.delta > most * ROUNDING:
            # A limit or a delta that follows from the rows would tell how many there are.
            own = f"at most {self.delta:g}" if self.delta is not None else "at most min(1e-5, 0.1 / rows)"
            asked = "more" if plan.privacy.delta is None else f"{plan.privacy.delta:g}"
            raise ConfigError(f"this site takes part at a delta of {own} (delta), the run asks {asked}")
        promised = self.promised()
        own_client = promised[experiment].client if experiment in promised else None
        if own_client not in (None, self.client):
            raise ConfigError(
                f"this site is client {self.client} (client), and what is promised to this run in its state "
                f"folder is of client {own_client}; give every site a state folder of its own, and let it "
                "keep its number"
            )
        others = [promise for name, promise in promised.items() if name != experiment]
        spent = sum(promise.epsilon for promise in others)
        if spent + plan.privacy.epsilon > self.epsilon * ROUNDING:
            raise ConfigError(
                f"this site spends epsilon {self.epsilon:g} at most over all runs; {spent:g} are promised "
                f"to others, this one asks {plan.privacy.epsilon:g}"
            )
        if (sum(promise.delta for promise in others) + plan.delta) * rows >= 1:
            raise ConfigError(
                "this site has promised so much delta to other runs that with this one a whole record could "
                "be given away; say a smaller privacy.delta"
            )

    def promise(self, experiment: str, plan: Plan | None, rows: int) -> None:
        """Write down what a run may spend here, before it spends any of it; on disk when this returns.

        Raises:
            ConfigError: as `check` does; other runs may have come between.
        """
        with locked(self.home / LOCK):
            self.check(experiment, plan, rows)
            assert plan is not None
            known = self.promised()
            old = known.get(experiment, Promise(0.0, 0.0))
            new = Promise(
                max(old.epsilon, plan.privacy.epsilon), max(old.delta, plan.delta), client=self.client
            )
            if new != old:
                found = {name: vars(promise) for name, promise in (known | {experiment: new}).items()}
                text = json.dumps(found, indent=2) + "\n"
                write_whole(self.home / PROMISED, lambda file: file.write_text(text, "utf-8"))

    def promised(self) -> dict[str, Promise]:
        """What this site has promised, by experiment.

        Raises:
            CheckpointError: the file is damaged, so that nobody knows what is left.
        """
        path = self.home / PROMISED
        try:
            found = json.loads(path.read_text("utf-8"))
            return {str(name): _promise(value) for name, value in found.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"'{path}', what this site has promised, is damaged: {error}") from error


def _promise(value: object) -> Promise:
    """One entry of the file; where only an epsilon was kept, the delta was that of a run that says none."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = {"epsilon": value, "delta": 1e-5}
    if not isinstance(value, dict) or {*value} - {"client"} != {"epsilon", "delta"}:
        raise ValueError(f"expected an epsilon and a delta, got {value!r:.60}")
    client = value.get("client")
    if not (client is None or type(client) is int):
        raise ValueError(f"expected the number of a client, got {client!r:.60}")
    promise = Promise(float(value["epsilon"]), float(value["delta"]), client)
    if not (promise.epsilon >= 0 and promise.delta >= 0):
        raise ValueError(f"expected numbers of at least 0, got {value!r:.60}")
    return promise
