"""What clients keep, and the base delta, survive a kill: the run ends as if there was none."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedlora.cli.main import main
from fedlora.storage.client_state import ClientStore
from fedlora.storage.run_folder import RunFolder

pytestmark = pytest.mark.slow  # whole runs

ROUNDS = ("rounds=4", "clients_per_round=2", "evaluate.clients=true")
JOBS = {"own parts": "strategy=fedsalora", "a base delta": "strategy=flora"}


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


@pytest.fixture(scope="module")
def wholes(run: Callable[..., Any]) -> Mapping[str, Any]:
    """The runs that nothing interrupted."""
    return {name: run(job, *ROUNDS) for name, job in JOBS.items()}


def same(got: Any, want: Any) -> None:
    if want.summary["adapter_sha256"] is not None:
        assert got.sha == want.sha
    for key in ("accuracy", "loss", "local_accuracy", "local_loss", "own", "rounds", "bytes_up"):
        assert got.summary.get(key) == want.summary.get(key), key
    assert [m.get("local_loss") for m in got.metrics] == [m.get("local_loss") for m in want.metrics]
    states = [RunFolder(one.path).read_state()[1].digest() for one in (got, want)]
    assert states[0] == states[1]
    memories = [ClientStore(one.path / "checkpoint" / "clients") for one in (got, want)]
    for client in range(3):
        mine, theirs = (memory.read(client, 5) for memory in memories)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("name", "damaged"), [("own parts", False), ("own parts", True), ("a base delta", False)]
)
def test_a_run_killed_after_its_clients_have_kept_their_parts(
    name: str, damaged: bool, wholes: Any, run: Callable[..., Any], result: Any, tmp_path: Path
) -> None:
    """In round 4, before its checkpoint; if the one before is bad too, the run goes back to round 2."""
    out, real, calls = tmp_path / "run", RunFolder.finish_round, [0]

    def dying(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise Killed
        real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "finish_round", dying)
        with pytest.raises(Killed):
            run(JOBS[name], *ROUNDS, out=out)
    if damaged:
        newest = max((out / "checkpoint").glob("*.safetensors"))
        assert newest.name == "round-000003.safetensors"
        newest.write_bytes(newest.read_bytes()[:-9])
        with pytest.warns(UserWarning, match="damaged"):
            main(["run", f"resume={out}"])
    else:
        main(["run", f"resume={out}"])
    same(result(out), wholes[name])


def test_the_result_of_a_personal_run_is_the_mean_of_the_clients_own(wholes: Any) -> None:
    summary = wholes["own parts"].summary
    own = summary["own"]
    assert own.keys() == {"0", "1", "2"}
    for key, name in (("accuracy", "local_accuracy"), ("loss", "local_loss")):
        assert summary[key] == pytest.approx(sum(metrics[name] for metrics in own.values()) / 3)
    assert all("aggregation_error" not in m for m in wholes["own parts"].metrics)


def test_the_adapter_of_a_run_has_its_base_delta(wholes: Any) -> None:
    run = wholes["a base delta"]
    _, state = RunFolder(run.path).read_state()
    tensors = load_file(run.path / "adapter" / "adapter_model.safetensors")
    for module in state.adapter.pairs:
        [A] = [t for name, t in tensors.items() if f".{module}.lora_A" in f".{name}"]
        [B] = [t for name, t in tensors.items() if f".{module}.lora_B" in f".{name}"]
        want = state.delta(module).norm()
        assert want > 0
        assert len(A) > 4  # of more directions than the rank
        pair = state.whole().pairs[module]
        torch.testing.assert_close(B @ A / (B @ A).norm(), pair.B @ pair.A / (pair.B @ pair.A).norm())
