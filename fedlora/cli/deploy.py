"""`fedlora deploy`: prepare a server and its sites, and check what they see."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from fedlora.errors import ConfigError

USAGE = """fedlora deploy: one server and many sites, over TLS

  fedlora deploy init DIR --sites N | --site NAME[:RANK]...
                                          keys, certificates, scripts, settings, checklists
  fedlora deploy start DIR                start what is in it on this machine, and register the sites
  fedlora deploy status DIR               who is connected, what runs, its last round, where the logs are
  fedlora deploy add-site DIR NAME[:RANK] one site more: folder, key, registration
  fedlora deploy stop DIR                 end its runs, sites and server on this machine
  fedlora deploy check [--public HOST:PORT] [GROUP=CHOICE] [KEY=VALUE] ...
                                          a running federation: versions, clocks, models, memory, open paths
"""


def deploy(words: list[str]) -> None:
    """The verb, with its own verbs.

    Raises:
        ConfigError: another verb.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    verbs: dict[str, Callable[[list[str]], None]] = {
        "init": _init,
        "start": partial(_local, "start"),
        "status": partial(_local, "status"),
        "add-site": _add_site,
        "stop": partial(_local, "stop"),
        "check": _check,
    }
    if words[0] not in verbs:
        raise ConfigError(f"unknown verb 'deploy {words[0]}'; there are {', '.join(verbs)}")
    verbs[words[0]](words[1:])


def _init(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora deploy init",
        description="Write what a server and its sites need to begin; CHECKLIST.md in it says how.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new folder; it may be moved afterwards")
    parser.add_argument(
        "--server",
        action="append",
        metavar="NAME_OR_IP",
        help="under which sites reach the server, one of several; default: this machine, for a trial",
    )
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--sites", type=int, metavar="N", help="so many: site-0, site-1, ... of rank 8")
    who.add_argument(
        "--site", action="append", metavar="NAME[:RANK]", help="one of several; without a rank it is 8"
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="that sites call; default: 8000")
    given = parser.parse_args(words)
    from fedlora.deploy.init import NewSite, init

    sites = [NewSite.of(text) for text in given.site or [f"site-{i}" for i in range(given.sites)]]
    print(init(given.folder, given.server or [], sites, given.port))


def _local(verb: str, words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog=f"fedlora deploy {verb}", description="For the parts whose folders are on this machine."
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="of a deployment, or of its server or one site alone"
    )
    folder = parser.parse_args(words).folder
    from fedlora.deploy import local

    getattr(local, verb)(folder, Console())


def _add_site(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora deploy add-site", description="Write the folder of one site more, and register its key."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a deployment")
    parser.add_argument("site", metavar="NAME[:RANK]", help="of the site; without a rank it is 8")
    given = parser.parse_args(words)
    from fedlora.deploy.init import NewSite, add_site
    from fedlora.deploy.local import register

    at = add_site(given.folder, NewSite.of(given.site))
    print(f"{at}\n{register(given.folder)}\nnext: {at / 'node.toml'}, then {at / 'supernode.sh'}")


def _check(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora deploy check",
        description="Meet every site of a running federation, before the first round of a run.",
    )
    parser.add_argument(
        "--public", metavar="HOST:PORT", help="what sites call: does more than the fleet path answer there?"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="those of `fedlora run`, without engine=deploy"
    )
    given = parser.parse_args(words)
    from fedlora.config import composition
    from fedlora.deploy.check import check

    check(composition.compose(["engine=deploy", *given.overrides]), given.public, Console())
