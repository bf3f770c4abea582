import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

STUB = """#!/bin/sh
pwd
echo "$FLWR_HOME $FLWR_TELEMETRY_ENABLED$FLWR_DISABLE_UPDATE_CHECK"
printf "%s\\n" "$@"
"""


def called(
    script: Path, command: str, tmp_path: Path, proxy: str = "http://proxy"
) -> tuple[Path, str, list[str]]:
    """Where, in what environment and with which words a script calls a command."""
    for name in ("flower-superlink", "flower-superexec", "flower-supernode", "nginx"):
        (tmp_path / name).write_text(STUB if name == command else "#!/bin/sh\nexit 9\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"FEDLORA_BIN": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment["HTTPS_PROXY"] = proxy
    with socket.socket() as superlink, suppress(OSError):  # another test may be listening there
        if (file := script.with_name("env.sh")).is_file():
            superlink.bind(("127.0.0.1", int(re.findall(r"ADDRESS=127\.0\.0\.1:(\d+)", file.read_text())[0])))
            superlink.listen()
        words = {"capture_output": True, "text": True, "check": True, "cwd": "/"}
        done = subprocess.run([script], env=environment, timeout=30, **words)  # type: ignore[call-overload]
    where, env, *words = done.stdout.splitlines()
    return Path(where), env, words


def test_flower_takes_the_superlink_s_words(folder: Path, tmp_path: Path) -> None:
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    where, env, words = called(folder / "server" / "superlink.sh", "flower-superlink", tmp_path)
    given = _parse_args_run_superlink().parse_args(words)
    assert where == folder / "server"
    assert env == f"{folder}/server/flower 01"
    assert (given.host, given.port) == ("127.0.0.1", 8001 if "lab" in folder.parts[-1][5:] else 18000)
    assert (given.isolation, given.enable_supernode_auth, given.insecure) == ("process", True, False)
    assert given.runtime_dependency_install is False
    for name in (
        given.ssl_ca_certfile,
        given.ssl_certfile,
        given.ssl_keyfile,
        given.superexec_auth_secret_file,
    ):
        assert (where / name).is_file(), name
    assert given.database == "state.db"


def test_flower_takes_the_superexec_s_words(deployment: Path, tmp_path: Path) -> None:
    from flwr.supercore.cli.flower_superexec import _parse_args

    where, _, words = called(deployment / "server" / "superexec.sh", "flower-superexec", tmp_path)
    given = _parse_args().parse_args(words)
    assert given.runtime_api_address == "127.0.0.1:8001"
    assert not given.insecure
    assert (where / given.root_certificates).read_bytes() == (deployment / "ca" / "ca.crt").read_bytes()
    assert (where / given.superexec_auth_secret_file).is_file()


@pytest.mark.parametrize(("name", "number", "rank"), [("ward-3", 0, 4), ("ward-9", 1, 8)])
def test_flower_takes_a_site_s_words_and_settings(
    deployment: Path, tmp_path: Path, monkeypatch: Any, name: str, number: int, rank: int
) -> None:
    from flwr.common.config import parse_config_args
    from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode

    where, env, words = called(deployment / "sites" / name / "supernode.sh", "flower-supernode", tmp_path)
    given = _parse_args_run_supernode().parse_args(words)
    assert where == deployment / "sites" / name
    assert env == f"{where}/flower 01"
    assert (given.superlink, given.insecure) == ("fl.example.org:8000", False)
    assert given.port >= 9094 + number  # the first that nobody has
    assert given.runtime_dependency_install is False
    assert (where / given.root_certificates).read_bytes() == (deployment / "ca" / "ca.crt").read_bytes()
    assert (where / given.auth_supernode_private_key).is_file()
    monkeypatch.chdir(where)
    said = {"client": number, "rank": rank, "data": "run", "device": "cpu", "state": "state", "warm": True}
    assert parse_config_args([given.node_config]) == said


def test_every_setting_of_a_site_is_there_to_be_uncommented(deployment: Path) -> None:
    from fedlora.deploy.site_config import SiteConfig

    text = (deployment / "sites" / "ward-3" / "node.toml").read_text()
    found = tomllib.loads(re.sub(r"^# (\S+ = )", r"\1", text, flags=re.MULTILINE))
    assert found.keys() == {field.name.replace("_", "-") for field in fields(SiteConfig)}
    assert all(isinstance(value, bool | int | float | str) for value in found.values())
    node = SiteConfig.read(found)
    assert (node.client, node.rank, node.allow, node.warm) == (0, 4, "my_module", True)
    assert SiteConfig.read(tomllib.loads(text)).epsilon is None  # no limit until the site sets one


def test_what_is_moved_finds_itself_again_and_leaves_the_rest_alone(deployment: Path, tmp_path: Path) -> None:
    server = shutil.copytree(deployment / "server", tmp_path / "again (2)" / "server")
    config = server / "flower" / "config.toml"
    config.write_text(
        config.read_text() + '\n[superlink.mine]\naddress = "x:1"\nroot-certificates = "/own.pem"\n'
    )
    called(server / "superexec.sh", "flower-superexec", tmp_path)
    found = tomllib.loads(config.read_text())["superlink"]
    assert found["fedlora"] == {"address": "127.0.0.1:8001", "root-certificates": f"{server}/ca.crt"}
    assert found["mine"] == {"address": "x:1", "root-certificates": "/own.pem"}
    assert found["default"] == "fedlora"


@pytest.mark.parametrize("script", ["server/superlink.sh", "server/register.sh", "sites/ward-3/supernode.sh"])
def test_a_script_without_flower_says_what_to_do(deployment: Path, script: str, tmp_path: Path) -> None:
    copy = shutil.copytree(deployment, tmp_path / "elsewhere")  # where the environment that wrote it is not
    for file in copy.rglob("*.sh"):
        file.write_text(re.sub("(?m)^made_by=.*", "made_by=/nowhere", file.read_text()))
    done = subprocess.run([copy / script], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "FEDLORA_BIN=" in done.stderr


def test_a_script_finds_the_environment_that_wrote_it(deployment: Path) -> None:
    words = [". server/env.sh && command -v flower-superlink"]
    done = subprocess.run(
        ["bash", "-c", *words], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, cwd=deployment
    )
    assert Path(done.stdout.strip()).parent == Path(sys.executable).parent


def test_a_site_takes_the_next_port_that_is_free(deployment: Path, tmp_path: Path) -> None:
    site = shutil.copytree(deployment / "sites" / "ward-3", tmp_path / "site")
    script = site / "supernode.sh"
    with socket.socket() as server, socket.socket() as other:
        for one in (server, other):
            one.bind(("127.0.0.1", 0))
            one.listen()
        up, taken = server.getsockname()[1], other.getsockname()[1]
        text = re.sub("(?m)^SUPERLINK=.*", f"SUPERLINK=127.0.0.1:{up}", script.read_text())
        script.write_text(re.sub(r"(?m)^PORT=\d+", f"PORT={taken}", text))
        _, _, words = called(script, "flower-supernode", tmp_path, "")
    assert int(words[words.index("--port") + 1]) > taken
    assert (site / "supernode.pid").read_text().strip().isdigit()


def test_units_start_again_and_start_what_is_there(deployment: Path) -> None:
    units = {path.name: path for path in deployment.rglob("*.service")}
    assert len(units) == 5
    for unit in units.values():
        said = dict(line.split("=", 1) for line in unit.read_text().splitlines() if re.match("[A-Z]", line))
        assert (said["Restart"], said["RestartSec"], said["User"]) == ("on-failure", "15", "fedlora")
        place, script = Path(said["ExecStart"]).parts[-2:]
        assert place in unit.parent.name
        assert os.access(unit.parent / script, os.X_OK)


def test_nginx_lets_the_fleet_path_in_alone(deployment: Path, local_deployment: Path, tmp_path: Path) -> None:
    text = (deployment / "server" / "nginx.conf").read_text()
    assert re.findall(r"location (\S+) \{\n +(\S+ [^;]+)", text) == [
        ("/v1/fleet/", "proxy_pass https://127.0.0.1:8001/v1/fleet/"),
        ("/", "return 403"),
    ]
    assert re.findall(r"listen (\S+)", text) == ["8000", "[::]:8000"]
    assert not (local_deployment / "server" / "nginx.conf").exists()
    if (nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
        pytest.skip("no nginx here to read it")
    server = shutil.copytree(deployment / "server", tmp_path / "a b")
    (server / "nginx").mkdir()
    subprocess.run([nginx, "-t", "-e", "stderr", "-p", server, "-c", server / "nginx.conf"], check=True)
