import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fedlora.deploy import flower_app


def test_callers_who_race_make_one_secret(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(flower_app.secret(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert len(found[0]) == 32


def test_the_apps_module_needs_no_torch() -> None:
    code = "import sys, fedlora.deploy.flower_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_killed_caller_left_does_not_lock_a_site_out(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "tmpabc").write_bytes(b"torn")
    assert len(flower_app.secret(tmp_path)) == 32
    assert (tmp_path / "worker" / "secret").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (tmp_path / "worker").iterdir()} == {"secret", "tmpabc"}


@pytest.mark.parametrize(
    "text",
    ['data = "run"', "state = [", 'state = "state"\nwarm = false'],
    ids=["no state", "no TOML", "cold"],
)
def test_no_worker_is_started_ahead_of_a_site_that_could_not_use_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "node.toml").write_text(text)
    flower_app.begin(tmp_path / "node.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["node.toml"]


def test_a_worker_started_ahead_listens_before_any_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("node.toml").write_text('state = "state"')
    flower_app.begin(Path("node.toml"))
    (worker,) = flower_app._started
    try:
        until = time.monotonic() + 60
        log = Path("state/worker.log")
        while "listening" not in log.read_text() and worker.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        assert "listening" in log.read_text()
    finally:
        worker.terminate()
        worker.wait(20)
        flower_app._started.clear()
