import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.callbacks.remote import MARK, ProgressReceiver, ProgressSender
from fedlora.errors import CheckpointError


class Shown:
    """A display that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *values: self.calls.append((name, *values))


def test_a_display_over_a_log_is_told_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    teller, shown = ProgressSender(), Shown()
    teller.begin(1, 3)
    print("INFO :  something of Flower's own")
    teller.advance(1)
    teller.warn("round 1: client 2 dropped: 'ä' \n is no line")
    teller.end({"round": 1, "loss": 0.5, "epsilon": None})
    teller.tell("done")
    listener = ProgressReceiver(tmp_path)
    heard = [listener.hear(line, shown) for line in capsys.readouterr().out.splitlines()]
    assert shown.calls == [
        ("begin", 1, 3),
        ("advance", 1),
        ("warn", "round 1: client 2 dropped: 'ä' \n is no line"),
        ("end", {"round": 1, "loss": 0.5, "epsilon": None}),
    ]
    assert [said for said in heard if said] == [("done", [])]


def test_a_log_that_is_read_again_says_nothing_twice(capsys: Any, tmp_path: Path) -> None:
    teller, shown, listener = ProgressSender(), Shown(), ProgressReceiver(tmp_path)
    for clients in (1, 2, 3):
        teller.advance(clients)
    lines = capsys.readouterr().out.splitlines()
    for line in [*lines[:2], "torn", lines[0][:30], *lines]:
        listener.hear(line, shown)
    assert shown.calls == [("advance", 1), ("advance", 2), ("advance", 3)]


def test_files_come_as_they_were(capsys: Any, tmp_path: Path) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "adapter").mkdir(parents=True)
    big = bytes(range(256)) * 1000
    (source / "adapter" / "weights").write_bytes(big)
    (source / "summary.json").write_text('{"a": 1}')
    (source / "secret").write_text("stays")
    ProgressSender().bring(source, ["summary.json", "adapter", "missing"])
    listener = ProgressReceiver(target)
    for line in capsys.readouterr().out.splitlines():
        assert len(line) < 100_000
        listener.hear(line, Shown())
    assert (target / "adapter" / "weights").read_bytes() == big
    assert (target / "summary.json").read_text() == '{"a": 1}'
    assert not (target / "secret").exists()
    assert {path.name for path in target.iterdir()} == {"summary.json", "adapter"}


def test_a_summary_is_there_only_once_all_else_is(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    source, target = tmp_path / "from", tmp_path / "to"
    (source / "adapter").mkdir(parents=True)
    (source / "adapter" / "weights").write_text("w")
    (source / "summary.json").write_text("{}")
    ProgressSender().bring(source, ["summary.json", "adapter"])
    listener, replace = ProgressReceiver(target), Path.replace

    def full(path: Path, to: Path) -> Path:
        if path.name == "weights":
            raise OSError("no space left on device")
        return replace(path, to)

    monkeypatch.setattr(Path, "replace", full)
    *pieces, last = capsys.readouterr().out.splitlines()
    for line in pieces:
        listener.hear(line, Shown())
    with pytest.raises(OSError, match="no space"):
        listener.hear(last, Shown())
    assert not (target / "summary.json").exists()


def test_a_piece_that_came_damaged_is_noticed(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x" * 5000)
    ProgressSender().bring(tmp_path, ["file"])
    piece, end = capsys.readouterr().out.splitlines()
    listener = ProgressReceiver(tmp_path / "to")
    number, what, i, n, data = json.loads(piece.removeprefix(MARK))
    listener.hear(MARK + json.dumps([number, what, i, n, data[:-8]]), Shown())
    with pytest.raises(CheckpointError, match="damaged"):
        listener.hear(end, Shown())


def test_names_lead_nowhere_else(capsys: Any, tmp_path: Path) -> None:
    import base64
    import io
    import zipfile
    import zlib

    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../../escaped", "x")
        archive.writestr("/absolute", "x")
    data, teller, listener = packed.getvalue(), ProgressSender(), ProgressReceiver(tmp_path / "a" / "b")
    teller.tell("piece", 0, 1, base64.b64encode(data).decode())
    teller.tell("brought", zlib.crc32(data))
    for line in capsys.readouterr().out.splitlines():
        listener.hear(line, Shown())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"escaped", "absolute"}
    assert all((tmp_path / "a" / "b") in path.parents for path in tmp_path.rglob("*") if path.is_file())
