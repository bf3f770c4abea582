"""Groups of clients on several devices: here two and three copies of the model on the CPU."""

from pathlib import Path

import pytest

import fedlora as fl
from fedlora.engines.in_process import InProcess
from fedlora.strategies import FlexLoRA

pytestmark = pytest.mark.slow  # whole runs


def run(out: Path, devices: list[str] | None) -> fl.Run:
    return fl.simulate(
        model="tiny", data="tiny", strategy=FlexLoRA(), clients=5, ranks=[2, 4], rounds=2,
        engine=InProcess(fuse=2, devices=devices), out=out,
    )  # fmt: skip


@pytest.mark.parametrize("copies", [2, 3])
def test_the_adapter_is_that_of_one_device_to_the_byte(tmp_path: Path, copies: int) -> None:
    alone, together = run(tmp_path / "one", None), run(tmp_path / "more", ["cpu"] * copies)
    one, more = ((r.path / "adapter" / "adapter_model.safetensors").read_bytes() for r in (alone, together))
    assert one == more
    same = ("loss", "accuracy", "bytes_up", "bytes_down")
    for a, b in zip(alone.metrics, together.metrics, strict=True):
        assert {k: a[k] for k in same if k in a} == {k: b[k] for k in same if k in b}
