"""Whole runs with secure sums, and what they refuse."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.errors import ConfigError

pytestmark = pytest.mark.slow  # whole runs


def test_a_private_run_under_masks_is_the_same_run(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("strategy=ffalora", "ranks=[2,4,8]", "privacy=dp_sgd", "privacy.accountant=rdp")
    words += ("client.batch_size=4", "privacy.insecure_test_seed=1")
    plain, secure = run(*words), run(*words, "secure_sum=true")
    one, other = (load_file(r.path / "adapter" / "adapter_model.safetensors") for r in (plain, secure))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=1e-4, rtol=1e-4, msg=name)
    assert not any((r.path / "data.json").exists() for r in (plain, secure))  # rows are nobody's business
    assert secure.summary["epsilon"] == plain.summary["epsilon"]
    assert capsys.readouterr().out.count("the server sees their weighted sum alone") == 1


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["strategy=flexlora"], "more of its clients' updates than the mean of their factors"),
        (["strategy=hetlora"], "more of its clients' updates"),
        (["strategy=fedms"], "more of its clients' updates"),
        (["evaluate.updates=true"], "nobody sees a single update"),
        (["clients_per_round=2"], "at least 3 clients a round, got 2"),
        (["clients=2"], "at least 3 clients a round, got 2"),
    ],
    ids=str,
)
def test_what_a_sum_is_not_enough_for_is_refused(run: Any, overrides: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        run("secure_sum=true", *overrides)


def test_what_each_client_holds_is_written_only_where_nobody_hides_it(run: Any) -> None:
    plain, secure = run("rounds=1"), run("rounds=1", "secure_sum=true")
    assert (plain.path / "data.json").exists()
    assert not (secure.path / "data.json").exists()
