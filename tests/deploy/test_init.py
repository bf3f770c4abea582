import ssl
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.cli.main import main

NAMES = ("fl.example.org", "192.0.2.7", "2001:db8::7")


def files(folder: Path) -> dict[str, Path]:
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


def test_keys_are_their_owner_s_alone_and_scripts_can_run(folder: Path) -> None:
    for name, path in files(folder).items():
        secret = path.suffix in (".key", ".secret", ".pid")
        want = 0o600 if secret else 0o755 if path.suffix == ".sh" and path.name != "env.sh" else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == want, name
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len((folder / "server" / "superexec.secret").read_bytes()) == 32


def test_the_authority_s_key_is_in_its_own_folder_only(folder: Path) -> None:
    key = (folder / "ca" / "ca.key").read_bytes()
    assert [name for name, path in files(folder).items() if key in path.read_bytes()] == ["ca/ca.key"]


def test_no_text_has_a_hole_and_every_script_is_one(folder: Path) -> None:
    for name, path in files(folder).items():
        assert path.suffix == ".secret" or "@{" not in path.read_text(), name
        if path.suffix == ".sh":
            subprocess.run(["bash", "-n", str(path)], check=True)


def test_two_deployments_share_no_secret(deployment: Path, local_deployment: Path) -> None:
    for name in ("ca/ca.key", "server/server.key", "server/superexec.secret"):
        assert (deployment / name).read_bytes() != (local_deployment / name).read_bytes()
    assert len({path.read_bytes() for path in deployment.rglob("*.key")}) == 4


def shaken(folder: Path, authority: Path, name: str) -> bool:
    """Whether a client that believes an authority and calls a name speaks TLS with the server."""
    there = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    there.load_cert_chain(folder / "server" / "server.crt", folder / "server" / "server.key")
    here = ssl.create_default_context(cafile=str(authority / "ca.crt"))
    here.verify_flags |= ssl.VERIFY_X509_STRICT
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [here.wrap_bio(down, up, server_hostname=name), there.wrap_bio(up, down, server_side=True)]
    try:
        for end in ends * 3:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    except ssl.SSLCertVerificationError:
        return False
    return ends[0].version() == "TLSv1.3" and ends[0].cipher() is not None


@pytest.mark.parametrize("name", [*NAMES, "localhost", "127.0.0.1"])
def test_a_site_believes_the_server_under_each_of_its_names(deployment: Path, name: str) -> None:
    assert shaken(deployment, deployment / "sites" / "ward-3", name)


def test_a_site_believes_no_other_name_and_no_other_authority(
    deployment: Path, local_deployment: Path
) -> None:
    assert not shaken(deployment, deployment / "sites" / "ward-3", "example.org")
    assert not shaken(deployment, deployment / "sites" / "ward-3", "192.0.2.8")
    assert not shaken(deployment, local_deployment / "sites" / "site-0", "localhost")
    assert not shaken(local_deployment, local_deployment / "sites" / "site-0", NAMES[0])


def test_certificates_can_do_what_they_are_for_and_no_more(deployment: Path) -> None:
    top, server = (
        x509.load_pem_x509_certificate((deployment / name).read_bytes())
        for name in ("ca/ca.crt", "server/server.crt")
    )
    assert top.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(
        True, 0
    )
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not server.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    assert top.not_valid_before_utc <= server.not_valid_before_utc < server.not_valid_after_utc
    assert 700 < (server.not_valid_after_utc - server.not_valid_before_utc).days < 826
    assert server.not_valid_after_utc < top.not_valid_after_utc


def test_a_site_s_key_is_one_that_flower_takes(deployment: Path) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    for name in ("ward-3", "ward-9"):
        private = (deployment / "sites" / name / "node.key").read_bytes()
        key = serialization.load_ssh_private_key(private, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        assert key.curve.name == "secp384r1"
        registered = deployment / "server" / "keys" / f"{name}.pub"
        assert try_load_public_key(registered) == public_key_to_bytes(key.public_key())
        assert registered.read_bytes() == (deployment / "sites" / name / "node.key.pub").read_bytes()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--sites", "0"], ["at least one site"]),
        (["--site", "Ward"], ["--site", "'Ward'"]),
        (["--site", "../x"], ["'../x'"]),
        (["--site", "a b:3"], ["'a b'"]),
        (["--site", "a:x"], ["NAME:RANK", "'a:x'"]),
        (["--site", "a:"], ["NAME:RANK", "'a:'"]),
        (["--site", "a:0"], ["rank", "0"]),
        (["--site", "a", "--site", "a:3"], ["'a'", "once"]),
        (["--sites", "1", "--port", "0"], ["--port", "0"]),
        (["--sites", "1", "--port", "65535"], ["--port", "65535"]),
        (["--sites", "1", "--server", "https://x"], ["--server", "https://x"]),
        (["--sites", "1", "--server", "x:8000"], ["--server", "x:8000"]),
        (["--sites", "1", "--server", "0.0.0.0"], ["--server", "0.0.0.0"]),
        (["--sites", "1", "--server", "$(id)"], ["--server", "$(id)"]),
        (["--sites", "1", "--server", ""], ["--server"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_what_cannot_be_is_one_line_and_writes_nothing(
    refused: Callable[..., str], tmp_path: Path, words: list[str], named: list[str]
) -> None:
    said = refused("deploy", "init", str(tmp_path / "lab"), *words)
    assert all(word in said for word in named), said
    assert not (tmp_path / "lab").exists()


def test_a_folder_that_is_not_empty_is_left_alone(
    refused: Callable[..., str], deployment: Path, tmp_path: Path
) -> None:
    before = {name: path.read_bytes() for name, path in files(deployment).items()}
    assert "not empty" in refused("deploy", "init", str(deployment), "--sites", "1")
    assert before == {name: path.read_bytes() for name, path in files(deployment).items()}
    (tmp_path / "file").write_text("")
    assert "not empty" in refused("deploy", "init", str(tmp_path / "file"), "--sites", "1")


def test_an_empty_folder_is_taken(tmp_path: Path, capsys: Any) -> None:
    main(["deploy", "init", str(tmp_path), "--sites", "1"])
    assert "CHECKLIST.md" in capsys.readouterr().out
    assert (tmp_path / "sites" / "site-0" / "supernode.sh").is_file()


def test_help_and_unknown_verbs(refused: Callable[..., str], capsys: Any) -> None:
    for words in (["deploy", "--help"], ["deploy"]):
        main(words)
        assert {"init", "start", "status", "add-site", "stop", "check"} <= {*capsys.readouterr().out.split()}
    assert "frob" in refused("deploy", "frob")
