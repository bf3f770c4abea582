"""Refused pairings with differential privacy and with secure sums; `compatibility` lists them all."""

from fedlora.core.strategy import named as strategies
from fedlora.errors import ConfigError
from fedlora.privacy import DPSGD, ClientLevel
from fedlora.rounds.scheduling import Synchronous
from fedlora.secure_aggregation.protocol import LEAST

from .dealt import Dealt
from .spec import RunSpec

LARGEST_SUM = 2.0**31  # what the fixed-point numbers of fedlora.secure_aggregation.crypto hold


def privacy_of_personal(spec: RunSpec) -> str | None:
    """Personal models are measured on private rows without noise."""
    if spec.privacy is not None and spec.strategy.personal:
        return (
            f"privacy: strategy {spec.strategy_class} leaves clients a part of their own, and is measured "
            "on their own rows, without noise; use a strategy with one global model, or privacy=none"
        )
    return None


def privacy_of_client_evaluation(spec: RunSpec) -> str | None:
    """So are the clients' own evaluations."""
    if spec.privacy is not None and spec.evaluate.clients:
        return (
            "evaluate.clients: what clients measure on their own rows is not covered by epsilon; leave it "
            "out, or use privacy=none"
        )
    return None


def record_level_dora(spec: RunSpec) -> str | None:
    """DoRA, and whatever changes more than a low-rank term, has no gradient for each record."""
    if isinstance(spec.privacy, DPSGD) and not spec.lora.form.by_row:
        what = "dora" if spec.lora.dora else f"parametrization={type(spec.lora.form).__name__}"
        return f"lora.{what}: has no gradient for each record here; leave it out, or use privacy=none"
    return None


def client_level_strategy(spec: RunSpec) -> str | None:
    """The server's noise covers a mean of updates, and nothing else that a strategy may look at."""
    able = spec.strategy.linear or spec.strategy.products
    if isinstance(spec.privacy, ClientLevel) and not able:
        return (
            f"privacy: strategy {spec.strategy_class} needs more of its clients' updates than their "
            "mean, such as norms or which directions each has, and one client could change that without "
            f"bound; use {strategies(lambda s: (s.linear or s.products) and not s.personal)}, "
            "or privacy=dp_sgd, for which one global model is enough"
        )
    return None


def client_level_updates(spec: RunSpec) -> str | None:
    """A single update's result is not covered."""
    if isinstance(spec.privacy, ClientLevel) and spec.evaluate.updates:
        return (
            "evaluate.updates: what a client would have reached alone is not covered by epsilon; leave it "
            "out, or use privacy=none"
        )
    return None


def client_level_least(spec: RunSpec) -> str | None:
    """Whether a round is released must not depend on who took part."""
    if isinstance(spec.privacy, ClientLevel) and spec.min_updates > 1:
        return (
            "min_updates: under client-level privacy every round is released, however few took part, got "
            f"{spec.min_updates}; leave it out"
        )
    return None


def client_level_rounds(spec: RunSpec) -> str | None:
    """Noise for fewer rounds than the run has."""
    if isinstance(spec.privacy, ClientLevel) and spec.rounds > spec.privacy.planned:
        return (
            f"privacy.rounds: expected at least the run's {spec.rounds}, for which noise has to be enough, "
            f"got {spec.privacy.planned}; leave it out"
        )
    return None


def client_level_scheduler(spec: RunSpec) -> str | None:
    """Each client counts at most once in a release, and who is in it must not depend on who came first."""
    if isinstance(spec.privacy, ClientLevel) and type(spec.scheduler) is not Synchronous:
        return (
            f"scheduler: under client-level privacy a client's change may be in a release once, and no "
            f"client may push another out, which nothing shows of {type(spec.scheduler).__name__}; use "
            "scheduler=synchronous, or privacy=dp_sgd"
        )
    return None


def privacy_of_client(spec: RunSpec) -> str | None:
    """Privacy that the client alone knows of, so that none of these rules would hold."""
    if spec.client.private:
        return (
            f"client.privacy: {type(spec.client).__name__} brings differential privacy that the run would "
            "know nothing of, and would account for nowhere; leave it out and say privacy=... of the run"
        )
    return None


def private_training(spec: RunSpec) -> str | None:
    """A client that cannot train by DP-SGD, or has a setting that does not go with it."""
    if isinstance(spec.privacy, DPSGD):
        try:
            spec.local_client  # noqa: B018 (it is made to see whether it can be)
        except ConfigError as error:
            return str(error)
    return None


def cut_private_rows(known: Dealt) -> str | None:
    """Test rows are measured exactly in every round, so they must not be cut from private rows."""
    if private_rows(known) and known.dataset.cut:
        return (
            "privacy: the rows to evaluate on are cut from the private training rows, and every round tells "
            "the accuracy on them without noise; say evaluate.rows=test, and name rows that may be seen: "
            "data.test=FILE, or data.test_split of data=hub"
        )
    return None


def undeclared_labels(known: Dealt) -> str | None:
    """One record more could add a label, and so a row to the classifier, unless all labels are named."""
    dataset = known.dataset
    if (
        private_rows(known)
        and not dataset.declared
        and {*dataset.labels} > {row.target for row in dataset.test}
    ):
        return (
            "privacy: the training rows have labels that no test row has, and a private record must not "
            "decide which labels there are; name all of them with data.labels=[...]"
        )
    return None


def secure_strategy(known: Dealt) -> str | None:
    """A sum under masks shows the mean of factors, and no more."""
    spec = known.spec
    if spec.secure_sum and (spec.strategy.personal or not spec.strategy.linear):
        return (
            f"secure_sum: strategy {spec.strategy_class} needs more of its clients' updates than the "
            "mean of their factors, which is all that such a sum shows; use "
            f"{strategies(lambda s: s.linear and not s.personal)}"
        )
    return None


def secure_updates(known: Dealt) -> str | None:
    """Nor is there a single update to evaluate."""
    if known.spec.secure_sum and known.spec.evaluate.updates:
        return "evaluate.updates: under secure_sum nobody sees a single update; leave it out"
    return None


def secure_few(known: Dealt) -> str | None:
    """Of two clients each knows the other's update from the sum."""
    sampled = min(known.spec.clients_per_round or known.clients, known.clients)
    if known.spec.secure_sum and sampled < LEAST:
        return (
            f"secure_sum: expected at least {LEAST} clients a round, got {sampled}: of two clients each "
            "knows the other's update from the sum; raise clients and clients_per_round"
        )
    return None


def secure_clip(known: Dealt) -> str | None:
    """A clip whose sum does not fit into the masked numbers."""
    privacy, clients = known.spec.privacy, known.clients
    if known.spec.secure_sum and isinstance(privacy, ClientLevel) and privacy.clip * clients >= LARGEST_SUM:
        return (
            f"privacy.clip: under secure_sum expected less than {LARGEST_SUM / clients:g}, so that a sum of "
            f"{clients} clients fits into the masked numbers, got {privacy.clip:g}"
        )
    return None


def private_rows(known: Dealt) -> bool:
    """Whether there are training rows here that privacy protects; published rows have nothing to hide."""
    dataset = known.dataset
    return known.spec.privacy is not None and bool(dataset.train) and not dataset.published
