import json
from pathlib import Path
from typing import Any

import pytest

from fedlora.callbacks.base import Callback, Callbacks, RunHandle
from fedlora.callbacks.remote import MARK, ProgressReceiver, ProgressSender
from fedlora.errors import CheckpointError


class Seen(Callback):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def on_round_begin(self, run: RunHandle, *values: Any) -> None:
        self.calls.append(("begin", *values))

    def on_client_done(self, run: RunHandle, *values: Any) -> None:
        self.calls.append(("done", *values))

    def on_round_end(self, run: RunHandle, *values: Any) -> None:
        self.calls.append(("end", *values))

    def on_warning(self, run: RunHandle, *values: Any) -> None:
        self.calls.append(("warning", *values))


def watched_by(*callbacks: Callback) -> Callbacks:
    return Callbacks(RunHandle(3, callbacks=callbacks))


def test_a_display_over_a_log_is_told_the_same(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    teller, there, seen = ProgressSender(), Seen(), Seen()
    server, here = watched_by(teller, there), watched_by(seen)
    server.run_begin()
    server.round_begin(1, 3)
    print("INFO :  something of Flower's own")
    server.client_done(1)
    server.run.warn("round 1: client 2 dropped: 'ä' \n is no line")
    server.round_end({"round": 1, "loss": 0.5, "epsilon": None})
    teller.tell("done")
    server.run_end({})
    listener = ProgressReceiver(tmp_path)
    heard = [listener.hear(line, here) for line in capsys.readouterr().out.splitlines()]
    assert (
        seen.calls
        == there.calls
        == [
            ("begin", 1, 3),
            ("done", 1),
            ("warning", "round 1: client 2 dropped: 'ä' \n is no line"),
            ("end", {"round": 1, "loss": 0.5, "epsilon": None}),
        ]
    )
    assert [said for said in heard if said] == [("done", [])]
    assert (here.run.done, here.run.metrics) == (1, server.run.metrics)


def test_the_lines_of_a_log_are_those_that_every_release_reads(capsys: pytest.CaptureFixture[str]) -> None:
    server = watched_by(ProgressSender())
    server.round_begin(1, 3)
    server.client_done(2)
    server.run.warn("odd")
    server.round_end({"round": 1})
    assert capsys.readouterr().out.splitlines() == [
        'fedlora-told [0, "begin", 1, 3]',
        'fedlora-told [1, "advance", 2]',
        'fedlora-told [2, "warn", "odd"]',
        'fedlora-told [3, "end", {"round": 1}]',
    ]


def test_a_log_that_is_read_again_says_nothing_twice(capsys: Any, tmp_path: Path) -> None:
    seen, listener = Seen(), ProgressReceiver(tmp_path)
    server, here = watched_by(ProgressSender()), watched_by(seen)
    for clients in (1, 2, 3):
        server.client_done(clients)
    lines = capsys.readouterr().out.splitlines()
    for line in [*lines[:2], "torn", lines[0][:30], *lines]:
        listener.hear(line, here)
    assert seen.calls == [("done", 1), ("done", 2), ("done", 3)]


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
        listener.hear(line, watched_by())
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
        listener.hear(line, watched_by())
    with pytest.raises(OSError, match="no space"):
        listener.hear(last, watched_by())
    assert not (target / "summary.json").exists()


def test_a_piece_that_came_damaged_is_noticed(capsys: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x" * 5000)
    ProgressSender().bring(tmp_path, ["file"])
    piece, end = capsys.readouterr().out.splitlines()
    listener = ProgressReceiver(tmp_path / "to")
    number, what, i, n, data = json.loads(piece.removeprefix(MARK))
    listener.hear(MARK + json.dumps([number, what, i, n, data[:-8]]), watched_by())
    with pytest.raises(CheckpointError, match="damaged"):
        listener.hear(end, watched_by())


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
        listener.hear(line, watched_by())
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"escaped", "absolute"}
    assert all((tmp_path / "a" / "b") in path.parents for path in tmp_path.rglob("*") if path.is_file())
