"""The client halves of update steps: what they are given, their order, and what they may return."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict

from fedlora import Adapter, ClientUpdate, RoundUpdates, UpdateStep
from fedlora.core.messages import Task
from fedlora.errors import ConfigError, PrivacyError
from fedlora.privacy import ClientLevel, Plan
from fedlora.privacy.client_level import ClientLevelMechanism
from fedlora.robust.krum import Krum
from fedlora.rounds.aggregation.plain import PlainAggregation
from fedlora.rounds.codec import write_task
from fedlora.seeds import generator
from fedlora.storage.client_state import ClientStore
from fedlora.strategies import FedIT, FedSALoRA, FFALoRA


@dataclass(frozen=True)
class Coded(UpdateStep):
    """Sends times · w + plus in the place of every shared w, which the server undoes."""

    times: float
    plus: float

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        now = dict(given.adapter.tensors())
        coded = {name: now[name] * self.times + self.plus for name in given.task.shared()}
        return given.become(given.adapter.with_tensors(coded))

    def on_server(self, given: RoundUpdates) -> RoundUpdates:
        made = []
        for update, task in zip(given.updates, given.tasks, strict=True):
            sent = dict(update.adapter.tensors())
            plain = {name: (sent[name] - self.plus) / self.times for name in task.shared()}
            made.append(replace(update, adapter=update.adapter.with_tensors(plain)))
        return given.become(made)


@dataclass(frozen=True)
class Shorter(UpdateStep):
    """Sends a share of every change."""

    share: float

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        return given.moved({name: self.share * by for name, by in given.change.items()})


@dataclass(frozen=True)
class Watch(UpdateStep):
    """Changes nothing, and remembers what it was given, outside."""

    seen: list[ClientUpdate]

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        self.seen.append(given)
        return given


@dataclass(frozen=True)
class Counts(UpdateStep):
    """Keeps the sum of `by` over the rounds in which it was asked, and the last of them."""

    by: float
    seen: list[tuple[int, float, float]]

    def on_client(self, given: ClientUpdate) -> ClientUpdate:
        total = given.memory.get("total", torch.zeros(()))
        last = given.memory.get("last", torch.zeros(()))
        self.seen.append((given.round, float(total), float(last)))
        return given.become(
            given.adapter, {"total": total + self.by, "last": torch.tensor(float(given.round))}
        )


def adapters(ran: Any) -> dict[str, torch.Tensor]:
    return dict(ran.federation.state.adapter.tensors())


def close(one: Any, other: Any, within: float = 1e-5) -> bool:
    others = adapters(other)
    return all(torch.allclose(t, others[n], atol=within, rtol=within) for n, t in adapters(one).items())


def test_the_server_undoes_what_clients_did_in_the_reverse_order(lab: Any) -> None:
    steps = [Coded(2.0, 0.0), Coded(1.0, 3.0)]
    plain = lab.run(FedIT())
    coded = lab.run(FedIT(), site={"steps": steps}, aggregation=PlainAggregation(steps))
    assert close(coded, plain)
    assert not coded.text.count("wrong")
    wrong = lab.run(FedIT(), site={"steps": steps}, aggregation=PlainAggregation(steps[::-1]))
    assert not close(wrong, plain, 0.1)  # the two do not commute, so that this would show


def test_a_robust_rule_judges_the_updates_and_not_their_code(lab: Any) -> None:
    steps, ranks = [Coded(1e-3, 5.0)], (4,) * 5
    plain = lab.run(FFALoRA(), ranks, rounds=1, aggregation=PlainAggregation([Krum(1)]))
    coded = lab.run(
        FFALoRA(), ranks, rounds=1, site={"steps": steps}, aggregation=PlainAggregation([Krum(1), *steps])
    )
    scores = [[line["krum_score"] for line in ran.lines("clients.jsonl")] for ran in (plain, coded)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-2)


def test_a_warning_is_about_the_update_and_not_about_its_code(lab: Any, noise: Any) -> None:
    class Still(noise):  # type: ignore[misc]
        def _moved(self, a: Any) -> Any:
            return a.start if a.client == 1 else super()._moved(a)

    steps = [Coded(2.0, 0.0)]
    ran = lab.run(
        FedIT(), rounds=1, client=Still(), site={"steps": steps}, aggregation=PlainAggregation(steps)
    )
    assert "client 1 sent back what was sent to it" in ran.text


def test_a_step_is_told_who_sends_what_and_where_it_began(lab: Any) -> None:
    seen: list[ClientUpdate] = []
    ran = lab.run(FedIT(), site={"steps": [Shorter(0.5), Watch(seen)]}, rounds=2, seed=3)
    assert [(u.client, u.round, u.seed, u.weight) for u in seen] == [
        (client, round, 3, 10.0 * (client + 1)) for round in (1, 2) for client in range(3)
    ]
    one = seen[4]
    assert one.start.digest() == one.task.adapter.digest()
    want = generator(3, "own", 1, 2).standard_normal(3)
    assert one.generator("own").standard_normal(3).tolist() == want.tolist()
    mean = {n: sum(u.weight / 60 * dict(u.adapter.tensors())[n] for u in seen[3:]) for n in adapters(ran)}
    for name, tensor in adapters(ran).items():  # the last step's update is what was combined
        torch.testing.assert_close(mean[name], tensor, atol=1e-6, rtol=1e-6)


def test_what_is_shared_alone_counts_as_change(lab: Any) -> None:
    seen: list[ClientUpdate] = []
    lab.run(FFALoRA(), rounds=1, site={"steps": [Watch(seen)]})
    assert {name for name in seen[0].change if name.endswith(".A")} == set()
    assert seen[0].change.keys() == {*seen[0].task.shared()}
    halved = seen[0].moved({name: by / 2 for name, by in seen[0].change.items()})
    for name, by in halved.change.items():
        torch.testing.assert_close(by, seen[0].change[name] / 2, atol=1e-6, rtol=1e-6)


def test_masks_come_after_the_client_halves(lab: Any) -> None:
    site = {"steps": [Shorter(0.5)]}
    plain, masked = (lab.run(FedIT(), (4,) * 4, secure_sum=on, site=site) for on in (False, True))
    assert close(plain, masked, 2e-6)
    assert not close(masked, lab.run(FedIT(), (4,) * 4, secure_sum=True), 0.1)


@pytest.mark.parametrize("secure", [False, True])
def test_the_clip_of_client_level_privacy_comes_after_the_client_halves(
    lab: Any, tmp_path: Path, secure: bool
) -> None:
    def moved(name: str, *steps: UpdateStep) -> float:
        plan = Plan(ClientLevel(clip=0.5, accountant="rdp", epsilon=900.0), 4, 1, 1e-5, 1e-12, 1.0)
        central = ClientLevelMechanism(ClientLevel(clip=0.5), plan, tmp_path / f"{name}.json")
        central.refusal = lambda: None  # type: ignore[method-assign]  # such a σ has no budget
        ran = lab.run(
            FFALoRA(), (4,) * 4, rounds=1, secure_sum=secure, central=central, site={"steps": steps}
        )
        start = dict(lab.adapter().tensors())
        return float(sum((t - start[n]).double().square().sum() for n, t in adapters(ran).items()) ** 0.5)

    whole = moved("none")
    assert moved("longer", Shorter(100.0)) == pytest.approx(whole, rel=1e-4)  # no step gets past the clip
    assert moved("shorter", Shorter(1e-4)) < whole / 10  # and a short change is not stretched to it


def test_each_step_remembers_by_itself_and_a_repeated_round_starts_from_the_same(
    lab: Any, tmp_path: Path
) -> None:
    one: list[tuple[int, float, float]] = []
    other: list[tuple[int, float, float]] = []
    store = ClientStore(tmp_path / "clients")
    steps = [Counts(1.0, one), Counts(10.0, other)]
    lab.run(FedSALoRA(), (4,), rounds=3, site={"steps": steps, "memory": store})
    assert one == [(1, 0, 0), (2, 1, 1), (3, 2, 2)]
    assert other == [(1, 0, 0), (2, 10, 1), (3, 20, 2)]
    assert not [name for name in store.read(0, 4) if "/" in name]  # the client's own part is apart
    assert store.steps.read(0, 4).keys() == {"0/total", "0/last", "1/total", "1/last"}
    again = lab.site(lab.run(FedIT(), rounds=1).client, memory=ClientStore(tmp_path / "clients"), steps=steps)
    again.train(*asked(lab, 2))  # in a process of its own, after a crash in round 3
    assert one[-1] == (2, 1, 1)


def test_a_step_that_would_remember_says_so_where_there_is_nowhere_to(lab: Any, noise: Any) -> None:
    with pytest.raises(ConfigError, match="nowhere to keep it"):
        lab.site(noise(), steps=[Counts(1.0, [])]).train(*asked(lab, 1))


def asked(lab: Any, round: int) -> tuple[list[Message], list[Context]]:
    """A message that asks client 0 for a round, and the client's context."""
    message = Message(write_task(Task(lab.adapter()), round, 0)[0], 1000, "train", group_id=str(round))
    message.metadata.__dict__["_message_id"] = "m"
    return [message], [Context(1, 1000, {"client": 0, "rank": 4}, RecordDict(), {})]


@dataclass(frozen=True)
class Bad(UpdateStep):
    """What no step may return, at client 1."""

    what: str

    def on_client(self, given: ClientUpdate) -> Any:
        pairs, extra = given.adapter.pairs, given.adapter.extra
        made = {
            "nothing": None,
            "an adapter": given.adapter,
            "a smaller rank": Adapter(
                {m: replace(p, A=p.A[:2], B=p.B[:, :2]) for m, p in pairs.items()}, extra
            ),
            "another scale": Adapter({m: replace(p, scale=1.0) for m, p in pairs.items()}, extra),
            "another precision": Adapter(
                {m: replace(p, A=p.A.double(), B=p.B.double()) for m, p in pairs.items()}, extra
            ),
            "a tensor less": Adapter(pairs),
        }[self.what]
        if given.client != 1:
            return given
        return given.become(made) if isinstance(made, Adapter) and self.what != "an adapter" else made


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "got NoneType"),
        ("an adapter", "got Adapter"),
        ("a smaller rank", "expected 'a.q.A' as it was given"),
        ("another scale", "expected 'a.q.scale' as it was given, 2.0, got 1.0"),
        ("another precision", "torch.float64"),
        ("a tensor less", "expected 'head.bias' as it was given"),
    ],
)
@pytest.mark.parametrize("secure", [False, True])
def test_a_step_changes_numbers_alone_and_its_client_is_dropped_by_name(
    lab: Any, what: str, said: str, secure: bool
) -> None:
    ran = lab.run(FedIT(), (4,) * 4, rounds=1, site={"steps": [Bad(what)]}, secure_sum=secure)
    lines = ran.lines("clients.jsonl")
    assert [line["status"] for line in lines] == ["ok", "dropped", "ok", "ok"]
    assert "steps: Bad.on_client" in lines[1]["reason"]
    assert said in lines[1]["reason"]


def test_under_privacy_the_words_of_a_step_stay_at_the_client_and_nothing_is_spent(
    lab: Any, noise: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Private(noise):  # type: ignore[misc]
        private = True

    class Talks(UpdateStep):
        def on_client(self, given: ClientUpdate) -> ClientUpdate:
            raise ValueError("of-the-rows")

    store = ClientStore(tmp_path / "clients")
    with pytest.raises(PrivacyError, match="a step on a private update failed; the reason is in") as raised:
        lab.site(Private(), memory=store, steps=[Talks()]).train(*asked(lab, 1))
    assert "of-the-rows" not in str(raised.value)
    assert "of-the-rows" in caplog.text
    assert store.ledgers() == {}


def test_clients_evaluate_their_models_and_not_what_they_send(lab: Any) -> None:
    site, coded = {"held_out": True}, Coded(1.0, 50.0)
    losses = []
    for steps in ((), (coded,)):
        ran = lab.run(
            FedSALoRA(),
            rounds=1,
            site={**site, "steps": steps, "memory": ClientStore(lab.folder / f"clients-{len(steps)}")},
            aggregation=PlainAggregation(steps),
        )
        losses.append([line["local_loss"] for line in ran.lines("clients.jsonl")])
    assert losses[0] == losses[1]
