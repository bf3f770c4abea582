import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.core.messages import State
from fedlora.errors import CheckpointError, ConfigError
from fedlora.storage.run_folder import RunFolder


def state(lab: Any, round: int) -> State:
    adapter = lab.adapter()
    for pair in adapter.pairs.values():
        pair.B.fill_(float(round))
    return State(adapter, round)


@pytest.fixture
def folder(lab: Any, tmp_path: Path) -> RunFolder:
    made = RunFolder.create(tmp_path / "run", "seed: 1\n")
    made.save_state(0, state(lab, 0))
    for round in (1, 2, 3):
        rows = [{"round": round, "client": c} for c in (0, 1)]
        made.finish_round(round, state(lab, round), {"round": round, "dropped": 0}, rows)
    return made


def newest(folder: RunFolder) -> Path:
    return max((folder.path / "checkpoint").iterdir())


def test_the_last_state_comes_back_bit_for_bit(lab: Any, folder: RunFolder) -> None:
    round, back = folder.load_state()
    assert (round, back.round) == (3, 3)
    assert back.adapter.digest() == state(lab, 3).adapter.digest()


def test_two_checkpoints_are_kept_and_no_temporary_file(folder: RunFolder) -> None:
    names = sorted(path.name for path in (folder.path / "checkpoint").iterdir())
    assert names == ["round-000002.safetensors", "round-000003.safetensors"]
    assert not list(folder.path.rglob("*.tmp"))


def test_nothing_in_a_folder_is_pickled(folder: RunFolder) -> None:
    for path in folder.path.rglob("*"):
        assert path.is_dir() or path.suffix in (".yaml", ".jsonl", ".safetensors")


@pytest.mark.parametrize("damage", ["cut", "empty", "half", "garbage", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(lab: Any, folder: RunFolder, damage: str) -> None:
    path = newest(folder)
    data = path.read_bytes()
    made = {"cut": data[:-1], "empty": b"", "half": data[: len(data) // 2], "garbage": b"\xff" * 99}
    if damage == "gone":
        path.unlink()
        round, back = folder.load_state()
    else:
        path.write_bytes(made[damage])
        with pytest.warns(UserWarning, match="round-000003"):
            round, back = folder.load_state()
    assert round == 2
    assert back.adapter.digest() == state(lab, 2).adapter.digest()
    assert [line["round"] for line in folder.rounds()] == [1, 2]
    assert len((folder.path / "clients.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_any_flipped_bit_is_seen(lab: Any, folder: RunFolder) -> None:
    """Over the whole header and a sample of the body: the old state, or the true one; nothing else."""
    path = newest(folder)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    logs = {name: (folder.path / name).read_text() for name in ("metrics.jsonl", "clients.jsonl")}
    rng = random.Random(0)
    places = [*range(header), *rng.sample(range(header, len(whole)), 60)]
    good = {r: state(lab, r).adapter.digest() for r in (2, 3)}
    for at in places:
        data = bytearray(whole)
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            round, back = folder.load_state()
        where = f"byte {at}: {whole[max(0, at - 20) : at + 20]!r}"
        assert round in good, where
        assert back.adapter.digest() == good[round], where
        assert back.round == round, where
        for name, text in logs.items():
            (folder.path / name).write_text(text)


@pytest.mark.parametrize("wrong", [b'"2"', b'"9"'])
def test_a_wrong_round_in_a_checkpoint_is_seen(folder: RunFolder, wrong: bytes) -> None:
    """One flipped bit makes round 3 a round 2, and the run would do a round twice."""
    path = newest(folder)
    data = path.read_bytes()
    assert data.count(b'"round":"3"') == 1
    path.write_bytes(data.replace(b'"round":"3"', b'"round":' + wrong))
    with pytest.warns(UserWarning, match="round-000003"):
        round, back = folder.load_state()
    assert (round, back.round) == (2, 2)


def test_no_whole_checkpoint_says_so(folder: RunFolder) -> None:
    for path in (folder.path / "checkpoint").iterdir():
        path.write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(CheckpointError, match="no undamaged checkpoint"),
    ):
        folder.load_state()


@pytest.mark.parametrize(
    "torn", ['{"round": 4, "cl', '{"round": 4, "client": 0}', "", '{"round": 4}\n{"round": 5}\n']
)
def test_lines_beyond_the_checkpoint_are_cut(folder: RunFolder, torn: str) -> None:
    for name in ("metrics.jsonl", "clients.jsonl"):
        with (folder.path / name).open("a") as file:
            file.write(torn)
    folder.load_state()
    rounds = [json.loads(line)["round"] for line in (folder.path / "clients.jsonl").read_text().splitlines()]
    assert rounds == [1, 1, 2, 2, 3, 3]
    assert [line["round"] for line in folder.rounds()] == [1, 2, 3]


def test_a_torn_line_does_not_stop_the_reader(folder: RunFolder) -> None:
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"round": 4, "lo')
    assert [line["round"] for line in folder.rounds()] == [1, 2, 3]


def test_a_failed_write_leaves_the_old_file(folder: RunFolder) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    before = (folder.path / "config.yaml").read_text()
    with pytest.raises(OSError, match="disk full"):
        folder.write("config.yaml", fail)
    assert (folder.path / "config.yaml").read_text() == before
    folder.write("config.yaml", lambda path: path.write_text("new"))  # over what the failure left
    assert (folder.path / "config.yaml").read_text() == "new"


def test_a_folder_is_replaced_whole(folder: RunFolder) -> None:
    def make(name: str) -> Any:
        def write(path: Path) -> None:
            path.mkdir()
            (path / name).write_text("x")

        return write

    folder.write("adapter", make("old"))
    folder.write("adapter", make("new"))
    assert [path.name for path in (folder.path / "adapter").iterdir()] == ["new"]


def test_a_second_run_in_a_folder_is_refused(folder: RunFolder) -> None:
    with pytest.raises(ConfigError, match=r"holds a run already.*resume="):
        RunFolder.create(folder.path, "x: 1")
    assert (folder.path / "config.yaml").read_text() == "seed: 1\n"


def test_two_at_a_time_cannot_go_on_with_a_run(folder: RunFolder) -> None:
    held = folder.hold()
    with pytest.raises(ConfigError, match="another process is at work"):
        RunFolder(folder.path).hold()
    held.close()
    RunFolder(folder.path).hold().close()


def test_a_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out: cannot make"):
        RunFolder.create(tmp_path / "file" / "run", "")
    with pytest.raises(ConfigError, match="out: cannot make"):
        RunFolder.create(Path("/proc/none/run"), "")


def test_a_state_without_pairs_is_kept(tmp_path: Path) -> None:
    from fedlora.core.adapter import Adapter

    folder = RunFolder.create(tmp_path / "run", "")
    folder.save_state(0, State(Adapter({}, {"h": torch.tensor(1.5)}), 0))
    assert folder.load_state()[1].adapter.extra["h"].item() == 1.5
