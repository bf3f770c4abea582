"""Schedulers, codes, optimizers and trees beside one another: neutral settings of all change no bit."""

from typing import Any

import pytest

from fedlora.errors import ConfigError

VIRTUAL = ("scheduler=buffered", "scheduler.buffer=2", "engine.speeds={lognormal: 1}")
STRATEGIES = ["ffalora", "flexlora"]
SCAFFOLD = (
    "rule=scaffold",
    "weights=uniform",
    "client.optimizer._target_=torch.optim.SGD",
    "client.clip=null",
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_buffer_of_all_in_a_code_of_all_with_an_optimizer_of_no_memory_is_the_plain_run(
    run: Any, strategy: str
) -> None:
    plain = run(f"strategy={strategy}", "ranks=[2,4]")
    neutral = run(
        f"strategy={strategy}",
        "ranks=[2,4]",
        "scheduler=buffered",
        "scheduler.buffer=3",
        "compression=topk",
        "compression.density=1",
        "server=fedavgm",
        "server.momentum=0",
        "engine.tree=[3]",
    )
    assert neutral.sha == plain.sha


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_optimizer_steps_by_what_a_buffer_of_mixed_versions_has_changed(run: Any, strategy: str) -> None:
    words = (f"strategy={strategy}", "ranks=[2,4]", "rounds=3", *VIRTUAL)
    plain = run(*words)
    assert run(*words, "server=fedavgm", "server.momentum=0").sha == plain.sha
    assert any(line["staleness"] for line in plain.metrics)
    moved = run(*words, "server=fedavgm", "server.momentum=0.9")
    assert moved.sha != plain.sha
    assert all(line["clients"] == 2 for line in moved.metrics)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("server=fedavgm", "engine.tree=[2,2]"), "server: FedAvgM steps by what clients have learned"),
        ((*SCAFFOLD, "engine.tree=[2,2]"), "rule: the edges of engine.tree forward sums"),
        (("server=fedavgm", *VIRTUAL), "server: under Buffered FedIT cuts what a buffer makes"),
        (
            ("strategy=fedexlora", "compression=topk", "compression.error_feedback=true", *VIRTUAL),
            "compression.error_feedback: under Buffered FedExLoRA cuts",
        ),
        (
            ("strategy=ffalora", "privacy=client_level", "engine.speeds={absent: 0.2}"),
            "engine.speeds: a slow client makes a round longer",
        ),
        (("compression=topk", "robust=median"), "robust: Median compares the same numbers of all clients"),
        (("compression=segments", "robust=krum"), "robust: Krum compares the same numbers of all clients"),
    ],
)
def test_what_does_not_compose_is_refused_in_one_line(run: Any, words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run("clients=4", *words)
    assert str(caught.value).startswith(reason)
    assert len(str(caught.value).splitlines()) == 1


def test_what_a_rule_sends_travels_beside_a_code_as_it_is(run: Any) -> None:
    words = ("strategy=ffalora", "ranks=[2,4]", *SCAFFOLD)
    plain = run(*words)
    assert run(*words, "compression=topk", "compression.density=1").sha == plain.sha
    coded = run(*words, "compression=int8")
    assert all(line["status"] == "ok" for line in coded.clients)
    assert coded.summary["bytes_up"] < 0.8 * plain.summary["bytes_up"]


def test_rules_that_look_at_each_update_by_itself_may_stand_beside_codes(run: Any) -> None:
    found = run("robust=norm", "compression=topk", "compression.density=0.5")
    assert all(line["clients"] == 3 for line in found.metrics)
