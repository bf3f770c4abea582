"""What a server and its sites need to begin: certificates, keys, scripts, settings and checklists."""

import ipaddress
import json
import os
import re
import secrets
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template

from fedlora.deploy.tls import AUTHORITY_DAYS, SERVER_DAYS, authority, node_key, server
from fedlora.errors import ConfigError
from fedlora.storage.atomic import write_whole

LOOPBACK = ("127.0.0.1", "localhost")
LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
NODE_PORT = 9094  # of Flower's first SuperNode on a machine
SITES = "sites.json"  # at the server: the sites' numbers and ports, for those that come later
SERVICES = {"superlink": "Flower SuperLink", "superexec": "Flower SuperExec", "nginx": "what sites may reach"}


class _Text(Template):
    """A text with @{name} in it: $ is the shells' and nginx's own."""

    delimiter = "@"


@dataclass(frozen=True)
class NewSite:
    """A site that is to take part.

    Args:
        name: of its folder and its SuperNode, in letters, digits and hyphens.
        rank: of its adapter.
    """

    name: str
    rank: int = 8

    def __post_init__(self) -> None:
        """Refuse what no folder, unit or LoRA can be."""
        if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?", self.name):
            raise ConfigError(
                f"--site: expected a name of up to 40 small letters, digits and hyphens, got '{self.name}'"
            )
        if self.rank < 1:
            raise ConfigError(f"--site {self.name}: expected a rank of at least 1, got {self.rank}")

    @classmethod
    def of(cls, text: str) -> "NewSite":
        """From NAME or NAME:RANK."""
        name, given, rank = text.partition(":")
        if given and not re.fullmatch(r"[0-9]{1,6}", rank):
            raise ConfigError(f"--site: expected NAME or NAME:RANK, such as ward-3:8, got '{text}'")
        return cls(name, int(rank)) if given else cls(name)


def init(folder: Path, names: Sequence[str], sites: Sequence[NewSite], port: int) -> str:
    """Write the folder of a deployment.

    Args:
        folder: new, or empty.
        names: under which sites reach the server; they call the first. This machine's own are added.
        sites: who takes part; their order gives their numbers.
        port: which sites call.

    Returns:
        What to do next.

    Raises:
        ConfigError: a name, a rank or a port that cannot be, or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"deploy init: '{folder}' is there already and not empty; name a new folder")
    if not sites:
        raise ConfigError(
            "deploy init: expected at least one site, got none; say --sites N or --site NAME:RANK"
        )
    if twice := sorted({site.name for site in sites if [s.name for s in sites].count(site.name) > 1}):
        raise ConfigError(f"--site: expected every name once, got '{twice[0]}' more than once")
    if not 1 <= port <= 65534:
        raise ConfigError(f"--port: expected a number from 1 to 65534, got {port}")
    every = list(dict.fromkeys([*map(_checked, names), *LOOPBACK]))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder.absolute(), every, sites, port)
    return (
        f"{len(sites)} site{'s' * (len(sites) > 1)} and a server -> {folder}\nnext: {folder / 'CHECKLIST.md'}"
    )


def _write(folder: Path, names: Sequence[str], sites: Sequence[NewSite], port: int) -> None:
    # In a trial on one machine sites call the SuperLink itself; else the proxy does, on the next port.
    proxied = not all(_loopback(name) for name in names)
    host = f"[{names[0]}]" if ":" in names[0] else names[0]
    words = {
        "address": f"{host}:{port}",
        "public": str(port),
        "port": str(port + proxied),
        "ca": str(folder / "server" / "ca.crt").replace("\\", "\\\\").replace('"', '\\"'),
        "site": sites[0].name,
        "bin": shlex.quote(str(Path(sys.executable).parent)),
        "years": str(AUTHORITY_DAYS // 365),
        "days": str(SERVER_DAYS),
    }
    signer = authority("fedlora deployment")
    shown = server(signer, names)
    _put(folder / "ca" / "ca.key", signer.key, 0o600)
    for place in ("ca", "server"):
        _put(folder / place / "ca.crt", signer.certificate)
    at = folder / "server"
    _put(at / "server.crt", shown.certificate)
    _put(at / "server.key", shown.key, 0o600)
    _put(at / "superexec.secret", secrets.token_bytes(32), 0o600)
    _put(at / "flower" / "config.toml", _text("config.toml", words))
    _put(at / "env.sh", _text("env.sh", words))
    scripts = ["superlink.sh", "superexec.sh", "register.sh", *(["nginx.sh"] if proxied else [])]
    for script in scripts:
        _put(at / script, _text(script, words), 0o755)
    if proxied:
        _put(at / "nginx.conf", _text("nginx.conf", words))
    for service, what in SERVICES.items():
        if (script := f"{service}.sh") in scripts:
            unit = _text("server.service", words | {"what": what, "script": script})
            _put(at / f"fedlora-{service}.service", unit)
    for number, site in enumerate(sites):
        _add(folder, site, number, NODE_PORT + number, signer.certificate, words["address"])
    entries = {site.name: {"client": i, "port": NODE_PORT + i} for i, site in enumerate(sites)}
    _put(at / SITES, (json.dumps({"address": words["address"], "sites": entries}, indent=2) + "\n").encode())
    name = "checklist.md" if proxied else "trial.md"
    _put(folder / "CHECKLIST.md", _text(name, words))


def add_site(folder: Path, site: NewSite) -> Path:
    """Write the folder of one site more, and its public key for the server.

    Args:
        folder: what `init` wrote, its server's folder in it.
        site: whose name no other has.

    Returns:
        The site's folder.

    Raises:
        ConfigError: the folder is none, or there is a site of this name.
    """
    file = folder / "server" / SITES
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"deploy add-site: expected a folder that `fedlora deploy init` wrote, cannot read '{file}'"
        ) from error
    sites = known["sites"]
    if site.name in sites:
        raise ConfigError(
            f"deploy add-site: there is a site '{site.name}' already; give this one another name"
        )
    number = 1 + max(entry["client"] for entry in sites.values())
    port = _free(1 + max(entry["port"] for entry in sites.values()))
    authority = (folder / "server" / "ca.crt").read_bytes()
    at = _add(folder.absolute(), site, number, port, authority, known["address"])
    sites[site.name] = {"client": number, "port": port}
    write_whole(file, lambda to: to.write_text(json.dumps(known, indent=2) + "\n", "utf-8"))
    return at


def _free(port: int) -> int:
    """The first port of this machine from there on that nobody listens on; a site elsewhere looks itself."""
    while port < 65535:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)):
                return port
        port += 1
    raise ConfigError("deploy add-site: no port of this machine is free; set PORT in the site's supernode.sh")


def _add(folder: Path, site: NewSite, number: int, port: int, authority: bytes, address: str) -> Path:
    words = {
        "name": site.name,
        "client": str(number),
        "rank": str(site.rank),
        "port": str(port),
        "address": address,
        "bin": shlex.quote(str(Path(sys.executable).parent)),
    }
    at = folder / "sites" / site.name
    public = _write_site(at, site.name, authority, words)
    _put(folder / "server" / "keys" / f"{site.name}.pub", public)
    return at


def _write_site(at: Path, name: str, authority: bytes, words: dict[str, str]) -> bytes:
    """The folder that a site gets; returns its public key."""
    private, public = node_key(name)
    _put(at / "ca.crt", authority)
    _put(at / "node.key", private, 0o600)
    _put(at / "node.key.pub", public)
    _put(at / "node.toml", _text("node.toml", words))
    _put(at / "supernode.sh", _text("supernode.sh", words), 0o755)
    _put(at / f"fedlora-{name}.service", _text("site.service", words))
    _put(at / "CHECKLIST.md", _text("site.md", words))
    return public


def _text(name: str, words: dict[str, str]) -> bytes:
    template = resources.files("fedlora.deploy") / "templates" / name
    return _Text(template.read_text(encoding="utf-8")).substitute(words).encode()


def _put(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that has its mode from the first byte on; a key is never open to others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)


def _checked(name: str) -> str:
    """A host name or an address, as it is."""
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        if re.fullmatch(rf"{LABEL}(\.{LABEL})*", name) and len(name) <= 253:
            return name
    else:
        if not address.is_unspecified and "%" not in name:
            return name
    raise ConfigError(
        f"--server: expected a host name or an address under which sites reach the server, got '{name}'"
    )


def _loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
