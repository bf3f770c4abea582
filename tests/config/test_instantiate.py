"""A `_target_` is code to be called: what may be named, and that nobody but the command line can widen it."""

import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from fedlora.cli.main import main
from fedlora.config.instantiate import Trust, kept, make, received
from fedlora.errors import ConfigError
from fedlora.training.client import Client

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

HOSTILE = {
    "os.system": "os",
    "builtins.eval": "builtins",
    "subprocess.run": "subprocess",
    "fedlora.cli.main.os.system": "fedlora.cli.main.os",
    "fedlora.data.records.json.loads": "json.decoder",
    "fedlora.data.records.csv.reader": "_csv",
    "fedlora.data.packaged.Path": "pathlib",
    "fedlora.data.files.load.__class__": "fedlora.data.files.load",
    "fedlora.strategies.FedIT.__subclasses__": "fedlora.strategies.FedIT",
    "fedlora.storage.atomic.remove": "fedlora.storage.atomic",
    "fedlora.cli.main.main": "fedlora.cli.main",
    "fedlora.models.load": "fedlora.models",
    "fedlora.models.packaged._cached": "fedlora.models.packaged",
    "torch.load": "torch",
    "torch.hub.load": "torch.hub",
    "torch.save": "torch",
    "torch.optim.Adam.load_state_dict": "torch.optim.optimizer",
    "torch.nn.functional.relu": "torch.nn.functional",
    "torch.nn.modules.module.torch.load": "torch.serialization",
    "torch.utils.cpp_extension.load": "torch.utils.cpp_extension",
    "hydra.utils.instantiate": "hydra",
    "my_module.MedianFedIT": "my_module",
}


def said(config: dict[str, Any], key: str = "strategy", allow: tuple[str, ...] = ()) -> str:
    with pytest.raises(ConfigError) as caught:
        make(OmegaConf.create({**config, "allow": list(allow)}), key)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("target", HOSTILE)
def test_what_is_not_ours_is_refused_with_what_to_say(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = {"data": "data", "models": "model"}.get(target.split(".")[1], "strategy")
    text = said({group: {"_target_": target}}, group)
    assert f"'{target}' is outside of what a configuration may name of fedlora and torch" in text
    if target != "fedlora.data.records.json.loads":  # whose module is named where it is defined
        assert f"say allow=[{HOSTILE[target]}] if you trust it" in text


DEEP: list[dict[str, Any]] = [
    {"_target_": "fedlora.strategies.FedIT", "x": {"_target_": "os.system", "command": "true"}},
    {"a": [{"b": [{"_target_": "os.system"}]}]},
    {"_target_": "fedlora.strategies.FedIT", "_args_": [{"_target_": "os.system"}]},
    {"_target_": "fedlora.strategies.FedIT", "_recursive_": False, "x": {"_target_": "os.system"}},
    {"_target_": "fedlora.strategies.FedIT", "_partial_": True, "x": {"_target_": "os.system"}},
    {"_target_": "${other}"},
    {"_target_": "fedlora.strategies.FedIT", "x": "${part}"},
]


@pytest.mark.parametrize("part", DEEP, ids=str)
def test_every_target_is_checked_before_any_is_called(part: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it was called"))
    monkeypatch.setattr(
        "fedlora.strategies.FedIT.__init__", lambda self, **more: pytest.fail("it was called")
    )
    text = said({"strategy": part, "other": "os.system", "part": {"_target_": "os.system"}})
    assert "'os.system'" in text
    assert "allow=[os]" in text


@pytest.mark.parametrize("value", ["\\${other}", "\\${oc.create:${part}}", "a \\${oc.env:HOME}"])
def test_a_reference_that_appears_only_when_it_is_resolved_is_refused(value: str) -> None:
    config = {"strategy": {"_target_": "fedlora.strategies.FedIT", "x": value}, "other": 1, "part": "x"}
    assert "strategy.x: expected a plain value" in said(config)


@pytest.mark.parametrize(
    "target", [7, None, ["os.system"], {"a": 1}, "", ".", "os..system", "fedlora.", "torch"]
)
def test_what_is_no_name_is_refused(target: Any) -> None:
    said({"strategy": {"_target_": target}})


def test_a_name_that_is_not_there_says_so() -> None:
    assert "cannot find 'fedlora.strategies.FedAvgg'" in said(
        {"strategy": {"_target_": "fedlora.strategies.FedAvgg"}}
    )


@pytest.mark.parametrize("target", ["torch.optim.SGD", "torch.optim.adamw.AdamW"])
def test_optimizers_and_our_own_are_let_through(target: str) -> None:
    optimizer = {"_target_": target, "_partial_": True, "lr": 0.1}
    client = {"_target_": "fedlora.clients.GatedExperts.of", "lr": 0.1, "optimizer": optimizer}
    made = make(OmegaConf.create({"client": client}), "client", Client)  # and no word of allow
    assert made.local.optimizer.keywords == {"lr": 0.1}


# A group may name its own part of fedlora and no other: what reads files is for the data alone.
ELSEWHERE = {
    "fedlora.data.files.load": "data",
    "fedlora.data.hub.load": "data",
    "fedlora.models.packaged.tiny": "model",
    "fedlora.strategies.FedIT": "strategy",
    "fedlora.privacy.DPSGD": "privacy",
    "fedlora.robust.krum.Krum": "robust",
}


@pytest.mark.parametrize("target", ELSEWHERE)
def test_a_group_names_its_own_part_alone(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedlora.privacy.DPSGD.__post_init__", lambda self: pytest.fail("it was called"))
    for group in {*ELSEWHERE.values(), "client"} - {ELSEWHERE[target]}:
        for part in ({"_target_": target}, {"_target_": "torch.nn.Identity", "x": [{"_target_": target}]}):
            assert f"'{target}' is outside" in said({group: part}, group)


STRATEGY = "fedlora.strategies.FedIT"


@pytest.mark.parametrize("word", ["_partial_", "_args_", "_convert_", "_recursive_", "_mode_"])
@pytest.mark.parametrize("value", [True, False, None, 1, "true", [], "all"], ids=repr)
def test_no_word_of_hydras_changes_what_is_made(word: str, value: Any) -> None:
    top = {"_target_": STRATEGY, word: value}
    deep = {"_target_": STRATEGY, "x": {"y": [{"_target_": STRATEGY, word: value}]}}
    bare = {"_target_": STRATEGY, "x": {"y": {word: value}}}
    for part in (top, deep, bare):
        text = said({"strategy": part})
        assert text.startswith("strategy")
        assert word in text


def test_a_local_run_cannot_be_left_without_its_privacy(no_run: Callable[..., str]) -> None:
    said = no_run("privacy=dp_sgd", "+privacy._partial_=true")
    assert "privacy._partial_" in said
    assert "leave it out" in said


@pytest.mark.parametrize(
    "text",
    ["a: ${oc.env:HOME}", "a: {b: ['x ${oc.env:HOME}']}", "a: {'${oc.env:HOME}': 1}", "a: 1\nb: ${a}"],
)
def test_what_a_server_sends_reads_nothing_of_the_readers(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of-the-site")
    with pytest.raises(ConfigError, match="expected plain values") as caught:
        received(text)
    assert "of-the-site" not in str(caught.value)


@pytest.mark.parametrize("text", ["[1]", "a: [", "7", ""])
def test_what_a_server_sends_must_be_a_configuration(text: str) -> None:
    if text:
        with pytest.raises(ConfigError, match="the server's configuration"):
            received(text)
    else:
        assert received(text) == {}


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A strategy of the user's; the file beside it tells whether it was imported."""
    (tmp_path / "my_module.py").write_text(
        "import os, pathlib\nfrom fedlora.strategies import FedIT\n"
        f"pathlib.Path({str(tmp_path / 'imported')!r}).write_text('')\n"
        "class Mine(FedIT):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "my_module", None)
    del sys.modules["my_module"]
    return tmp_path / "imported"


MINE = {"strategy": {"_target_": "my_module.Mine"}}


def test_a_module_that_is_not_allowed_is_not_even_imported(module: Path) -> None:
    assert "allow=[my_module]" in said(MINE)
    assert "allow=[my_module]" in said(MINE, allow=("my_mod", "module", "my_module.Other"))
    assert not module.exists()


def test_an_allowed_module_gives_its_own_and_not_what_it_imports(module: Path) -> None:
    assert type(make(OmegaConf.create({**MINE, "allow": ["my_module"]}), "strategy")).__name__ == "Mine"
    assert module.exists()
    borrowed = {"strategy": {"_target_": "my_module.os.system"}}
    assert "'my_module.os.system'" in said(borrowed, allow=("my_module",))
    inner = {"strategy": {"_target_": "my_module.pathlib.Path"}}
    assert "allow=[pathlib]" in said(inner, allow=("my_module",))


SMALL = ("model=tiny", "data=tiny", "clients=2", "rounds=1", "ranks=2", "+data.source.rows=24")


def test_the_command_line_allows_and_the_run_keeps_no_trace(
    module: Path, refused: Callable[..., str], tmp_path: Path
) -> None:
    words = ("run", *SMALL, "strategy._target_=my_module.Mine", f"out={tmp_path / 'run'}")
    assert "allow=[my_module]" in refused(*words)
    assert not (tmp_path / "run").exists()
    main([*words, "allow=[my_module]"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["allow"] == []
    resume = ("run", f"resume={tmp_path / 'run'}", "rounds=2")
    assert "allow=[my_module]" in refused(*resume)
    main([*resume, "allow=[my_module]"])
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["rounds"] == 2


@pytest.fixture
def hostile(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run's folder whose settings would run code, and say that they may."""
    monkeypatch.setattr("os.system", lambda command: pytest.fail("it was called"))

    def go(part: str) -> Path:
        copy = Path(shutil.copytree(finished, tmp_path / part))
        config = yaml.safe_load((copy / "config.yaml").read_text())
        bomb = {"_target_": "os.system", "command": "true"}
        if part in ("data", "model"):
            config[part] |= {"source": bomb}
        else:
            config[part] = bomb
        (copy / "config.yaml").write_text(yaml.safe_dump(config | {"allow": ["os", "posix", "nt"]}))
        (copy / "summary.json").write_text((finished / "summary.json").read_text())
        return copy

    return go


@pytest.mark.parametrize("part", ["data", "model", "strategy", "client", "privacy"])
def test_a_folder_cannot_grant_itself_anything(
    hostile: Callable[..., Path], refused: Callable[..., str], tmp_path: Path, part: str
) -> None:
    run, to = hostile(part), ["--to", str(tmp_path / "to")]
    assert "say allow=[os]" in refused("run", f"resume={run}", "rounds=2")
    for words in (
        ["export", str(run), *to, "--client", "0"],
        ["verify", str(run)],
        ["export", str(run), *to],
    ):
        with suppress(SystemExit):  # where the part is needed, it is refused; nothing is called in any case
            main(words)
    main(["report", str(run)])  # reads, and makes nothing


def test_what_a_command_line_grants_must_be_said_well(refused: Callable[..., str]) -> None:
    for word in ("allow=os", "allow=[[a]]", "allow={a: 1}", "allow=[1]", "allow=1,2"):
        assert "allow" in refused("verify", "x", word)
    assert "model.allow_pickle" in refused("verify", "x", "model.allow_pickle=maybe")
    trust, rest = Trust.said(["rounds=3", "allow=[a, b.c]", "model.allow_pickle=true", "--merge"])
    assert (trust, rest) == (Trust(("a", "b.c"), True), ["rounds=3", "--merge"])


def test_what_is_kept_grants_nothing_whatever_it_said() -> None:
    given = {"allow": ["os"], "model": {"path": "x", "allow_pickle": True}, "resume": "x", "rounds": 3}
    found = yaml.safe_load(kept(OmegaConf.create(given)))
    assert found == {"allow": [], "model": {"path": "x", "allow_pickle": False}, "resume": None, "rounds": 3}
    given["model"] = {"allow_pickle": "${oc.env:HOME}"}
    assert Trust().into(OmegaConf.create(given)).model.allow_pickle is False


def test_a_site_listens_to_its_own_word_alone(tmp_path: Path) -> None:
    from fedlora.config.composition import compose
    from fedlora.deploy.site import make_runtime
    from fedlora.deploy.site_config import Invitation, SiteConfig

    deployed = ("engine=deploy", "engine.superlink=s", "engine.experiment=x")
    config = compose([*SMALL, *deployed, "strategy._target_=my_module.Mine", "allow=[my_module]"])
    node = SiteConfig.read({"client": 0, "data": "run", "state": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"allow=\[my_module\]"):
        make_runtime(config, node, Invitation("x", "classification", ("a", "b"), ""))
