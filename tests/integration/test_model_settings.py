"""model.dtype=auto is decided once in a run, which keeps what came out; model.attention is the model's."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

import fedlora as fl
from fedlora.cli.main import main
from fedlora.models.packaged import tiny

pytestmark = pytest.mark.slow  # whole runs


def processor(patch: pytest.MonkeyPatch, amx: bool) -> None:
    told = {"architecture": "x86_64", "amx_bf16": amx, "avx512_bf16": True}
    patch.setattr(torch.cpu, "get_capabilities", lambda: told, raising=False)


@pytest.mark.parametrize(("amx", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_a_run_goes_on_with_the_dtype_that_it_began_with(
    amx: bool, expected: str, run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    processor(monkeypatch, amx)
    with pytest.warns(UserWarning, match=f"model.dtype=auto: {expected}, since"):
        found = run("model.dtype=auto", "rounds=1")
    assert found.summary["dtype"] == expected
    assert yaml.safe_load((found.path / "config.yaml").read_text())["model"]["dtype"] == expected
    processor(monkeypatch, not amx)
    main(["verify", str(found.path)])
    main(["run", f"resume={found.path}", "rounds=2"])
    assert "dtype=auto" not in capsys.readouterr().err
    assert found.summary["dtype"] == expected
    assert fl.open(found.path).spec.model.dtype == expected


def test_a_run_from_python_keeps_what_came_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor(monkeypatch, True)
    with pytest.warns(UserWarning, match="model.dtype=auto: bfloat16, since"):
        model = fl.ModelSpec(path=str(tiny()), dtype="auto")
    assert model.dtype == "bfloat16"
    made = fl.simulate(model, "tiny", clients=2, rounds=1, out=tmp_path / "run", progress=False)
    processor(monkeypatch, False)
    assert made.config["model"]["dtype"] == made.summary["dtype"] == "bfloat16"
    assert next(fl.open(tmp_path / "run").model().parameters()).dtype == torch.bfloat16


def test_a_run_with_another_attention_learns_the_same(run: Any, capsys: Any) -> None:
    with pytest.warns(UserWarning, match=r"model\.attention=eager: .* not packed"):
        found = run("model.attention=eager", "strategy=flexlora")
    plain = run("strategy=flexlora")
    assert fl.open(found.path).spec.model.attention == "eager"
    for one, other in zip(found.metrics, plain.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    with pytest.warns(UserWarning, match=r"model\.attention=eager"):
        main(["verify", str(found.path)])
