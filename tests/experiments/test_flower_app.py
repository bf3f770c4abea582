import subprocess
import sys
import threading
from pathlib import Path

from fedlora.experiments import flower_app


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
    code = "import sys, fedlora.experiments.flower_app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_a_killed_caller_left_does_not_lock_a_site_out(tmp_path: Path) -> None:
    (tmp_path / "worker").mkdir()
    (tmp_path / "worker" / "tmpabc").write_bytes(b"torn")
    assert len(flower_app.secret(tmp_path)) == 32
    assert (tmp_path / "worker" / "secret").stat().st_mode & 0o777 == 0o600
    assert {path.name for path in (tmp_path / "worker").iterdir()} == {"secret", "tmpabc"}
