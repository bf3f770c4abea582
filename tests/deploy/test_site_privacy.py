"""What no configuration of a server's can take from a site that has a limit of privacy."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
from flwr.app import Message
from omegaconf import DictConfig, OmegaConf
from site_lab import Asked, rows

from fedlora.privacy import Ledger

pytestmark = pytest.mark.slow  # whole runs

DP = ("privacy=dp_sgd", "privacy.epsilon=2", "privacy.accountant=rdp")


@pytest.fixture
def words(site: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A site's node.toml, with a budget, and 200 rows."""
    return site | {"epsilon": 2.0, "data": str(rows(tmp_path / "many.jsonl", 200))}


def ledger(words: dict[str, Any], experiment: str = "trial") -> Ledger | None:
    found = Path(words["state"]) / experiment / "clients" / "client-0" / "ledger.json"
    return Ledger.load(found.read_text()) if found.exists() else None


def test_a_private_round_is_paid_for_before_its_reply(ask: Any, composed: Any, words: Any) -> None:
    asked = ask(composed(*DP), words)
    assert not asked().has_error()
    reply = asked.train()
    assert not reply.has_error(), reply.error
    metrics = dict(reply.content["metrics"])
    paid = ledger(words)
    assert paid is not None
    assert paid.valid
    assert metrics["epsilon"] == paid.epsilon <= 2
    assert not {"loss", "clipped"} & metrics.keys()
    promised = json.loads((Path(words["state"]) / "promised.json").read_text())
    assert promised == {"trial": {"epsilon": 2.0, "delta": 1e-5, "client": 0}}


def changed(change: Callable[[DictConfig], None]) -> Callable[[DictConfig], DictConfig]:
    def go(config: DictConfig) -> DictConfig:
        OmegaConf.set_struct(config, False)
        change(config)
        return config

    return go


def merged(more: dict[str, Any]) -> Callable[[DictConfig], DictConfig]:
    return changed(lambda config: config.merge_with(more))


def partly(key: str, value: Any) -> Callable[[DictConfig], DictConfig]:
    """The configuration with one more key somewhere."""
    return changed(lambda config: OmegaConf.update(config, key, value, force_add=True))


INNER = {"_target_": "fedlora.privacy.DPSGD", "epsilon": 999.0}
HOSTILE: dict[str, tuple[Callable[[DictConfig], DictConfig], str]] = {
    "a privacy that is never made": (partly("privacy._partial_", True), "privacy._partial_"),
    "a privacy made elsewhere": (partly("privacy._recursive_", False), "privacy._recursive_"),
    "other arguments": (partly("privacy._args_", [1000.0]), "privacy._args_"),
    "a client that is never made": (partly("client._partial_", True), "client._partial_"),
    "a word in the depth": (
        partly("client.x", {"y": [{"_partial_": True}]}),
        "client.x.y.0._partial_",
    ),
    "no privacy": (changed(lambda c: c.update(privacy={"name": "none"})), "private runs alone"),
    "a privacy without a target": (
        changed(lambda c: c.update(privacy={"_target_": None})),
        "expected a dotted name",
    ),
    "a privacy that is a word": (changed(lambda c: c.update(privacy="dp_sgd")), "expected keys and values"),
    "a list of privacies": (changed(lambda c: c.update(privacy=[INNER])), "expected keys and values"),
    "another object by the same name": (
        changed(lambda c: c.update(privacy={"_target_": "fedlora.privacy.Source"})),
        "expected a _target_ that makes a Privacy, got a Source",
    ),
    "the privacy of clients": (
        changed(lambda c: c.update(privacy={"_target_": "fedlora.privacy.ClientLevel", "epsilon": 1.0})),
        "private runs alone",
    ),
    "seed 0": (partly("privacy.insecure_test_seed", 0), "insecure_test_seed"),
    "seed 1": (partly("privacy.insecure_test_seed", 1), "insecure_test_seed"),
    "a seed that is false": (partly("privacy.insecure_test_seed", False), "insecure_test_seed"),
    "losses": (partly("privacy.public_metrics", True), "public_metrics"),
    "losses by another word": (partly("privacy.public_metrics", 1), "public_metrics"),
    "a client that does not train privately": (
        partly("client._target_", "fedlora.clients.GatedExperts.of"),
        "cannot train under differential privacy",
    ),
    "a client around the private one": (
        changed(
            lambda c: (
                c.client.update(_target_="fedlora.clients.PoisonedTraining.of", kind="sign", share=1.0)
                or c.client.update(clients=2)
            )
        ),
        "cannot train under differential privacy",
    ),
    "a second privacy in the client": (partly("client.privacy", INNER), "outside of what"),
    "a strategy's own privacy": (partly("strategy.privacy", INNER), "outside of what"),
    "a strategy that is none": (
        partly("strategy._target_", "torch.nn.Identity"),
        "expected a _target_ that makes a Strategy",
    ),
    "a personal strategy": (
        partly("strategy._target_", "fedlora.strategies.FedSALoRA"),
        "not covered by epsilon",
    ),
    "losses of its own rows": (partly("evaluate.clients", True), "not covered by epsilon"),
    "a delta that gives a record away": (partly("privacy.delta", 4.9e-3), "a delta of at most"),
    "a clip that float32 cannot hold": (partly("privacy.clip", 5e-45), "privacy.clip"),
    "an epsilon that is no number": (partly("privacy.epsilon", float("nan")), "privacy.epsilon"),
    "an epsilon in letters": (partly("privacy.epsilon", "2"), "privacy.epsilon"),
    "a file of the site's": (
        partly("client.optimizer", {"_target_": "fedlora.data.files.load", "train": "/etc/passwd"}),
        "outside of what",
    ),
    "its environment": (
        partly("data.file", "${oc.env:SECRET_OF_THE_SITE}"),
        "got a reference at 'data.file'",
    ),
    "its environment in the run's name": (
        partly("engine.experiment", "${oc.env:SECRET_OF_THE_SITE}"),
        "got a reference at 'engine.experiment'",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_no_configuration_switches_a_sites_privacy_off(
    what: str, ask: Any, composed: Any, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_SITE", "of-the-site")
    honest = ask(composed(*DP), words)
    assert not honest().has_error()
    work = honest.work()
    change, said = HOSTILE[what]
    plain = OmegaConf.create(OmegaConf.to_container(composed(*DP)))  # a server's need not fit our schema
    asked: Asked = ask(change(plain), words)
    for reply in (asked(), asked("train", work), asked("evaluate", work)):
        assert said in asked.why(reply)
        assert "of-the-site" not in reply.error.reason
    assert ledger(words) is None
    assert not (Path(words["state"]) / "promised.json").exists()


def test_an_allowed_client_that_only_says_it_is_private_is_not_believed(
    ask: Any, composed: Any, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_client.py").write_text(
        "from dataclasses import dataclass\n"
        "from fedlora.clients import LocalTraining\n"
        "@dataclass(frozen=True)\n"
        "class Deaf(LocalTraining):\n"
        "    def privately(self, privacy):\n"
        "        return self\n"
        "@dataclass(frozen=True)\n"
        "class Broke(LocalTraining):\n"
        "    def train(self, base, assignments):\n"
        "        return LocalTraining(lr=0.1).train(base, assignments)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = words | {"allow": "own_client"}
    deaf = ask(composed(*DP, "client._target_=own_client.Deaf", "allow=[own_client]"), own)
    assert "does not train by the privacy of the run" in deaf.why()
    broke = ask(composed(*DP, "client._target_=own_client.Broke", "allow=[own_client]"), own)
    assert not broke().has_error()
    assert "no entry of its own in the ledger" in broke.why(broke.train())
    assert ledger(own) is None


def test_a_site_of_another_number_does_not_begin_a_ledger_of_its_own(
    ask: Any, composed: Any, words: Any
) -> None:
    config = composed(*DP, "rounds=1")
    asked = ask(config, words)
    assert not asked().has_error()
    assert not asked.train().has_error()
    again = ask(config, words | {"client": 1})  # the same rows and the same state
    for reply in (again(), again.train()):
        assert "is of client 0" in again.why(reply)
    assert not (Path(words["state"]) / "trial" / "clients" / "client-1").exists()


def test_messages_that_come_at_once_are_each_paid_for(ask: Any, composed: Any, words: Any) -> None:
    config = composed(*DP, "rounds=2")
    workers = [ask(config, words) for _ in range(4)]  # as with warm = false: nothing is shared but the disk
    assert not any(asked().has_error() for asked in workers)
    work, barrier = workers[0].work(), Barrier(len(workers))

    def train(asked: Asked) -> Message:
        barrier.wait()
        return asked("train", work)

    with ThreadPoolExecutor(len(workers)) as pool:
        replies = list(pool.map(train, workers))
    refused = [reply.error.reason for reply in replies if reply.has_error()]
    assert len(refused) == 2  # the budget is for two rounds
    assert all("the privacy budget is spent" in why for why in refused)
    paid = ledger(words)
    assert paid is not None
    sent = [dict(reply.content["metrics"]) for reply in replies if not reply.has_error()]
    assert sum(entry.steps for entry in paid.entries) == sum(metrics["steps"] for metrics in sent) == 50
    assert paid.epsilon == max(metrics["epsilon"] for metrics in sent) <= 2


def test_how_long_its_rows_are_stays_at_the_site(ask: Any, composed: Any, site: Any, tmp_path: Path) -> None:
    whys = []
    for number, longest in enumerate((7, 127, 129, 777)):  # the model has positions for 128
        file = tmp_path / f"{number}.jsonl"
        lines = [{"text": "w1 " * n, "label": "ab"[n % 2]} for n in (50, longest)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert not ask(composed(), site | {"data": str(file)})().has_error()  # cut at 128
        whys.append(ask(composed("data.max_length=100000"), site | {"data": str(file)}).why())
    assert len({*whys}) == 1  # the same, whatever the rows
    assert "data.max_length=128 at most" in whys[0]


def test_a_refusal_tells_how_many_rows_only_where_that_may_be_known(
    ask: Any, composed: Any, site: Any, tmp_path: Path
) -> None:
    def said(count: int, *more: str) -> str:
        words = site | {"data": str(rows(tmp_path / f"{count}.jsonl", count))}
        return ask(composed(*DP, "client.batch_size=500", *more), words).why()

    assert said(137, "privacy.public_counts=false") == said(213, "privacy.public_counts=false")
    assert "137" not in said(137, "privacy.public_counts=false")
    assert "137 records" in said(137)


@pytest.mark.parametrize("public", ["true", "false"])
def test_a_site_says_how_many_rows_it_has_only_where_that_may_be_known(
    public: str, ask: Any, composed: Any, words: Any
) -> None:
    reply = ask(composed(*DP, f"privacy.public_counts={public}"), words)()
    assert ("rows" in reply.content["profile"]) == (public == "true")


def test_trainings_are_counted_and_not_rounds_by_name(ask: Any, composed: Any, site: Any) -> None:
    words = site | {"max-rounds": 2}
    replies: list[Message] = []
    for again in range(3):  # each time a new process
        asked = ask(composed("rounds=2"), words)
        assert not asked().has_error()
        replies += [asked.train(round=1), *([asked.train(round=1)] if again == 2 else [])]
    assert [reply.has_error() for reply in replies] == [False, False, True, True]
    assert "has answered the 2 trainings" in replies[-1].error.reason
    other = composed("rounds=2")
    other.engine.experiment = "other"
    asked = ask(other, words, experiment="other")  # the limit is of one run
    assert not asked().has_error()
    assert not asked.train().has_error()


def test_a_site_that_insists_on_masks_answers_no_message_without(ask: Any, composed: Any, site: Any) -> None:
    sums = composed("secure_sum=true", "strategy=fedit", "ranks=2", "clients=3")
    asked = ask(sums, site | {"secure": True})
    assert not asked().has_error()
    assert "under the masks of a secure sum alone" in asked.why(asked.train())
    in_the_clear = ask(sums, site)  # a site that says nothing sends what it is asked for
    assert not in_the_clear.train().has_error()


@pytest.mark.parametrize("name", ["worker", "worker.log", "promised.json", "promised.lock"])
def test_no_run_takes_the_place_of_what_a_site_keeps(name: str, ask: Any, composed: Any, site: Any) -> None:
    config = composed()
    config.engine.experiment = name
    assert "take another name" in ask(config, site, experiment=name).why()


def test_a_site_that_names_its_labels_tells_no_run_which_of_them_its_rows_have(
    ask: Any, composed: Any, site: Any, tmp_path: Path
) -> None:
    heard: dict[tuple[str, ...], list[tuple[bool, str]]] = {}
    for number, extra in enumerate((None, "c")):  # the second site has a row with a rare label
        own = rows(tmp_path / str(number) / "rows.jsonl", extra=extra)
        words = site | {"data": str(own), "labels": "a, b, c", "state": str(tmp_path / f"state-{number}")}
        for labels in (("a",), ("a", "b"), ("a", "b", "c"), ("a", "b", "d")):
            asked = ask(composed("data.labels=[a,b,c]"), words, labels=labels, model="")
            reply = asked()
            said = (reply.has_error(), reply.error.reason if reply.has_error() else "")
            heard.setdefault(labels, []).append(said)
    assert all(one == two for one, two in heard.values())
    assert [refused for (refused, _), _ in heard.values()] == [True, True, False, True]
    assert "data.labels=[a,b,c]" in heard["a", "b"][0][1]
