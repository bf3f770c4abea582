import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.cli.main import main

Refused = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["data=files"], ["data.train: needs a value"]),
        (["data=hub"], ["data.path: needs a value"]),
        (["cliens=3"], ["cliens", "did you mean 'clients'"]),
        (["client.lrr=3"], ["lrr", "did you mean 'lr'"]),
        (["evaluate.evry=3"], ["evry", "every"]),
        (["rounds=abc"], ["rounds", "abc"]),
        (["seed=1.5"], ["seed"]),
        (["strategy=fedavgg"], ["fedavgg", "flexlora"]),
        (["model=nope"], ["nope", "minilm"]),
        (["strategy=fedit", "ranks=[2,4]"], ["FedIT", "rank"]),
        (["ranks=0"], ["ranks", "0"]),
        (["ranks=[]"], ["ranks"]),
        (["ranks=abc"], ["ranks", "abc"]),
        (["ranks=2.5"], ["ranks", "2.5"]),
        (["ranks=inf"], ["ranks", "inf"]),
        (["ranks=null"], ["ranks"]),
        (["ranks={8: abc}"], ["ranks", "abc"]),
        (["ranks={8: nan}"], ["ranks", "nan"]),
        (["rounds=0"], ["rounds"]),
        (["clients=0"], ["clients"]),
        (["clients=null"], ["clients"]),
        (["clients=999"], ["clients"]),
        (["seed=-1"], ["seed"]),
        (["weights=size"], ["weights", "uniform"]),
        (["client.lr=abc"], ["client.lr", "abc"]),
        (["client.lr=-1"], ["client.lr", "-1"]),
        (["client.batch_size=2.5"], ["client.batch_size", "2.5"]),
        (["client.epochs=0.5"], ["client.epochs", "0.5"]),
        (["client.steps=1.5"], ["client.steps", "1.5"]),
        (["lora.targets=[nope]"], ["lora.targets", "nope", "query"]),
        (["lora.targets=[]", "lora.head=freeze"], ["nothing to train"]),
        (["lora.head=both"], ["lora.head", "both"]),
        (["lora.scale=0"], ["lora.scale"]),
        (["lora.adapter=/no/such"], ["lora.adapter", "/no/such"]),
        (["model.path=/no/such"], ["model.path", "/no/such"]),
        (["model.dtype=float99"], ["float99"]),
        (["model=hub"], ["model.path"]),
        (["data.partition=odd"], ["odd", "dirichlet"]),
        (["engine.fuse=0"], ["engine.fuse"]),
        (["engine.fuse=many"], ["engine.fuse", "many"]),
        (["nonsense"], ["nonsense"]),
        (["rounds=1,2"], ["rounds"]),
    ],
    ids=lambda v: ",".join(v) if isinstance(v, list) else None,
)
def test_a_wrong_setting_is_one_line(no_run: Refused, overrides: list[str], named: list[str]) -> None:
    said = no_run(*overrides)
    assert all(word in said for word in named), said


JSONL = '{"text": "a b", "label": "x"}\n{"text": "c d", "label": "y"}\n'


@pytest.mark.parametrize(
    ("content", "more", "named"),
    [
        (None, [], ["rows.jsonl"]),
        ("", [], ["rows.jsonl", "empty"]),
        (JSONL * 9, ["data.label=lable"], ["lable", "label"]),
        (JSONL * 9 + "{broken\n", [], ["rows.jsonl:19"]),
        (JSONL[:30], [], ["rows"]),
        (JSONL * 9, ["test"], ["ZZZ"]),
        (JSONL * 9, ["data.partition=natural"], ["client"]),
    ],
    ids=["missing", "empty", "column", "broken", "one-row", "test-label", "no-client"],
)
def test_a_wrong_file_is_one_line(
    refused: Refused, tmp_path: Path, content: str | None, more: list[str], named: list[str]
) -> None:
    path = tmp_path / "my rows.jsonl"
    if content is not None:
        path.write_text(content)
    if more == ["test"]:
        (tmp_path / "test.jsonl").write_text('{"text": "a", "label": "ZZZ"}\n')
        more = [f"data.test={tmp_path / 'test.jsonl'}"]
    words = [
        "model=tiny",
        "data=files",
        f"data.train={path}",
        "data.text=text",
        "data.label=label",
        "clients=2",
    ]
    said = refused("run", *words, *more, f"out={tmp_path / 'out'}")
    assert all(word in said for word in named), said
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_there_is_refused_before_anything_is_loaded(
    refused: Refused, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedlora.runner.session as job

    monkeypatch.setattr(job, "assemble", lambda config: pytest.fail("it was loaded"))
    assert "resume=" in refused("run", "model=tiny", "data=tiny", f"out={finished}")


def test_an_out_that_cannot_be_is_refused(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", ""):  # the latter would be the folder one is in
        assert "out" in refused("run", "model=tiny", "data=tiny", "clients=2", f"out={out}")


def test_a_rank_above_a_given_adapters_is_refused_before_the_run_is_made(
    no_run: Refused, finished: Path
) -> None:
    said = no_run("strategy=fedit", f"lora.adapter={finished / 'adapter'}", "ranks=16")
    assert "16" in said


def test_other_verbs_errors(refused: Refused, tmp_path: Path, finished: Path) -> None:
    assert "frobnicate" in refused("frobnicate")
    assert "nothing there" in refused("report", str(tmp_path / "none"))
    (tmp_path / "config.yaml").write_text("a: 1\n")
    assert "unfinished" in refused("report", str(tmp_path))
    assert "config.yaml" in refused("export", str(tmp_path / "none"), "--to", str(tmp_path / "to"))
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("")
    assert "not empty" in refused("export", str(finished), "--to", str(full))
    assert str(full / "x") in refused("export", str(finished), "--to", str(full / "x"))
    assert "none" in refused("verify", str(tmp_path / "none"))


def test_the_unexpected_exits_1_and_leaves_its_traceback(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedlora.runner.session as job

    def broken(config: Any) -> None:
        raise ZeroDivisionError("deep\ninside")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "assemble", broken)
    said = refused("run", "model=tiny", "data=tiny", f"out={tmp_path / 'out'}", code=1)
    assert "ZeroDivisionError" in said
    (log,) = tmp_path.rglob("*.log")
    assert str(log) in said
    assert "in broken" in log.read_text()


def test_the_unexpected_where_no_log_can_be_written(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fedlora.runner.session as job

    def broken(config: Any) -> None:
        raise ZeroDivisionError("deep")

    (tmp_path / "fedlora-error.log").mkdir()  # stands for a folder that cannot be written
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "assemble", broken)
    assert "ZeroDivisionError" in refused("run", "model=tiny", "data=tiny", f"out={tmp_path / 'out'}", code=1)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["run", "--help"]])
def test_help(words: list[str], capsys: Any) -> None:
    main(words)
    said = capsys.readouterr().out
    assert "sweeps" in said
    if words[:1] == ["run"]:
        [choices] = re.findall(r"^  strategy=(.*)$", said, flags=re.MULTILINE)
        assert {"fedit", "ffalora", "flexlora", "fedfold"} <= set(choices.split("|"))
        assert "clients_per_round" in said


@pytest.mark.parametrize("verb", ["report", "export", "verify", "demo"])
def test_help_of_other_verbs(verb: str, capsys: Any) -> None:
    main([verb, "--help"])
    assert f"fedlora {verb}" in capsys.readouterr().out


def test_version(capsys: Any) -> None:
    import fedlora

    main(["--version"])
    assert capsys.readouterr().out.strip() == fedlora.__version__


@pytest.mark.parametrize("name", ["a b", "é ü 日本", "lr=0.1", "x (1)", "a,b", "[bold]x[/y]"])
def test_odd_names_can_be_quoted(name: str) -> None:
    from fedlora.config.composition import compose

    assert compose([f"out='/tmp/{name}'"]).out == f"/tmp/{name}"


@pytest.mark.parametrize("name", ["läuf", "a b é", "lr=0.1", "run (1)", "a,b"])
def test_a_path_needs_no_quotes(name: str) -> None:
    """A shell's user cannot know Hydra's grammar."""
    from omegaconf import OmegaConf

    from fedlora.config.composition import compose

    keys = ("out", "resume", "data.train", "data.test", "model.path", "lora.adapter")
    config = compose(["data=files", *(f"{key}=/tmp/{name}" for key in keys)])
    assert [OmegaConf.select(config, key) for key in keys] == [f"/tmp/{name}"] * len(keys)


def test_odd_paths(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "a b, é (1) lr=0.1" / "[bold]x[/y]"
    main(["run", "model=tiny", "data=tiny", "clients=2", "rounds=1", f"out='{out}'"])
    assert (out / "summary.json").is_file()
    assert str(out) in capsys.readouterr().out.split("round 1/1")[0]


def test_a_sweep_over_a_choice_that_does_not_exist_is_refused_in_one_line(refused: Refused) -> None:
    said = refused("run", "-m", "strategy=fedfold,fedfoldd", "model=tiny", "data=tiny")
    assert "unknown strategy 'fedfoldd'" in said
    assert "did you mean 'fedfold'" in said


def test_a_sweep_knows_the_keys_of_what_it_chooses() -> None:
    from fedlora.config import composition

    composition.register()
    composition.check_keys(["strategy=fedfold,fedsvd", "strategy.fresh=0.2"])
    with pytest.raises(composition.ConfigError, match="fersh"):
        composition.check_keys(["strategy=fedfold,fedsvd", "strategy.fersh=0.2"])


@pytest.mark.parametrize("name", ["", "page", "new/page", "page.html"])
def test_a_report_goes_into_a_folder_or_a_file(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    main(["report", str(finished), "--to", str(tmp_path / name)])
    page = tmp_path / name if name.endswith(".html") else tmp_path / name / "report.html"
    assert str(page) in capsys.readouterr().out.splitlines()
    assert page.with_suffix("").is_dir()
