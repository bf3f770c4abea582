"""A tree of edges on the command line and from Python, and the pairings that are refused."""

import pytest

import fedlora as fl
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.errors import ConfigError
from fedlora.runner.compatibility import BEFORE_LOADING, WITH_DATA, check
from fedlora.runner.dealt import Dealt
from fedlora.runner.load_data import load_dataset

BASE = ["model=tiny", "data=tiny"]
TREE = "engine.tree=[2,4]"


def test_a_tree_is_a_list_of_the_engine() -> None:
    assert run_spec(compose([*BASE, TREE])).round_config(8).tree == (2, 4)
    assert run_spec(compose(BASE)).round_config(8).tree == ()
    assert run_spec(compose([*BASE, "engine=ray", TREE])).round_config(8).tree == (2, 4)


@pytest.mark.parametrize("given", ["4", "[2,0]", "[2.5]", "two"])
def test_what_is_no_tree_is_refused_in_one_line(given: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.tree: expected a"):
        run_spec(compose([*BASE, f"engine.tree={given}"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["strategy=hetlora"], "HetLoRA makes of its clients is no weighted mean .* use federa, fedexlora,"),
        (["strategy=fedms"], "FedMS"),
        (["robust=krum"], "robust: Krum: the server needs each client's update"),
        (["robust=median"], "robust"),
        (["record_updates=true"], "record_updates"),
        (["evaluate.updates=true"], r"evaluate\.updates"),
        (["strategy=ffalora", "privacy=client_level"], "say secure_sum=true, where clients clip"),
    ],
)
def test_what_needs_more_than_sums_is_refused(words: list[str], said: str) -> None:
    check(BEFORE_LOADING, run_spec(compose([*BASE, *words])))
    check(BEFORE_LOADING, run_spec(compose([*BASE, *words, "engine.tree=[8]"])))
    with pytest.raises(ConfigError, match=said):
        check(BEFORE_LOADING, run_spec(compose([*BASE, *words, TREE])))


@pytest.mark.parametrize(
    "words",
    [
        ["strategy=flexlora", "ranks=[2,4]"],
        ["strategy=slora", "strategy.second=flexlora"],
        ["strategy=ffalora", "privacy=dp_sgd"],
        ["strategy=ffalora", "privacy=client_level", "secure_sum=true"],
        ["steps=[{_target_: fedlora.robust.Clip, bound: 1}]"],
    ],
)
def test_what_a_sum_is_enough_for_runs(words: list[str]) -> None:
    check(BEFORE_LOADING, run_spec(compose([*BASE, *words, TREE])))


def test_only_rounds_that_wait_run_over_a_tree() -> None:
    class Other(fl.Scheduler):
        def rounds(self, server, grid):  # type: ignore[no-untyped-def]
            yield

    spec = run_spec(compose([*BASE, TREE]), {"scheduler": Other()})
    with pytest.raises(ConfigError, match=r"scheduler: an edge .* under Other"):
        check(BEFORE_LOADING, spec)


def test_a_tree_has_a_place_for_every_client() -> None:
    spec = run_spec(compose([*BASE, "engine.tree=[2,3]"]))
    dealt = Dealt(spec, load_dataset(spec), 8, [4] * 8)
    with pytest.raises(ConfigError, match=r"\[2, 3\] has places for 6 clients, the run has 8; say \[2, 4\]"):
        check(WITH_DATA, dealt)
