"""Whole runs over a tree of edges."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def test_a_tree_of_one_level_is_the_flat_run_and_one_of_more_comes_to_the_same(run: Any) -> None:
    flat = run("strategy=flexlora", "ranks=[2,4]", "clients=4")
    assert run("strategy=flexlora", "ranks=[2,4]", "clients=4", "engine.tree=[4]").sha == flat.sha
    tree = run("strategy=flexlora", "ranks=[2,4]", "clients=4", "engine.tree=[2,2]")
    for one, two in zip(flat.metrics, tree.metrics, strict=True):
        assert two["delta_norm"] == pytest.approx(one["delta_norm"], rel=1e-5)
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert two["root_bytes_up"] < two["all_bytes_up"]


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(run: Any, tmp_path: Path) -> None:
    import fedlora as fl

    words = ("strategy=fedexlora", "clients=4", "engine.tree=[2,2]")
    whole = run(*words, "rounds=3")
    run(*words, "rounds=2", out=tmp_path / "run")
    fl.open(tmp_path / "run").resume(rounds=3, progress=False)
    assert fl.open(tmp_path / "run").summary["adapter_sha256"] == whole.sha


def test_private_clients_below_edges_keep_their_ledgers(run: Any) -> None:
    private = ("privacy=dp_sgd", "privacy.epsilon=6", "client.batch_size=4")
    found = run("strategy=ffalora", "clients=4", "engine.tree=[2,2]", *private)
    assert 0 < found.metrics[-1]["epsilon"] <= 6
