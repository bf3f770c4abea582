"""`fedlora deploy`: prepare a server and its sites, start and stop them, and check what they see."""

from pathlib import Path

import click

from .words import overrides

SITE = "NAME[:RANK]"


@click.group(short_help="A server and its sites on real machines, over TLS.")
def command() -> None:
    """Set up one server and many sites, over TLS, and look after them."""


@command.command(short_help="Keys, certificates, scripts, settings, checklists.")
@click.argument("folder", metavar="DIR")
@click.option(
    "--server",
    multiple=True,
    metavar="NAME_OR_IP",
    help="Under which sites reach the server, one of several; by default this machine, for a trial.",
)
@click.option("--sites", type=int, metavar="N", help="So many: site-0, site-1, ... of rank 8.")
@click.option("--site", multiple=True, metavar=SITE, help="One of several; without a rank it is 8.")
@click.option(
    "--port", type=int, default=8000, show_default=True, metavar="N", help="The one that sites call."
)
def init(folder: str, server: tuple[str, ...], sites: int | None, site: tuple[str, ...], port: int) -> None:
    """Write what a server and its sites need to begin into DIR, a new folder; CHECKLIST.md in it says how."""
    from fedlora.deploy.init import NewSite
    from fedlora.deploy.init import init as write

    if bool(site) == (sites is not None):
        raise click.UsageError(f"deploy init: say --sites N, or --site {SITE} for each site")
    names = site or [f"site-{i}" for i in range(sites or 0)]
    print(write(Path(folder), [*server], [NewSite.of(name) for name in names], port))


@command.command(short_help="Start what is in DIR on this machine.")
@click.argument("folder", metavar="DIR")
def start(folder: str) -> None:
    """Start the parts in DIR, a deployment's folder or that of its server or of one site; register sites."""
    from rich.console import Console

    from fedlora.deploy import local

    local.start(Path(folder), Console())


@command.command(short_help="Who is connected, what runs, where the logs are.")
@click.argument("folder", metavar="DIR")
def status(folder: str) -> None:
    """Say who is registered and connected, what runs, its last round, and where the logs are."""
    from rich.console import Console

    from fedlora.deploy import local

    local.status(Path(folder), Console())


@command.command("add-site", short_help="One site more: folder, key, registration.")
@click.argument("folder", metavar="DIR")
@click.argument("site", metavar=SITE)
def add_site(folder: str, site: str) -> None:
    """Write the folder of one site more into the deployment in DIR, and register its key."""
    from fedlora.deploy.init import NewSite
    from fedlora.deploy.init import add_site as write
    from fedlora.deploy.local import register

    at = write(Path(folder), NewSite.of(site))
    print(f"{at}\n{register(Path(folder))}\nnext: {at / 'node.toml'}, then {at / 'supernode.sh'}")


@command.command(short_help="End its runs, sites and server on this machine.")
@click.argument("folder", metavar="DIR")
def stop(folder: str) -> None:
    """End the runs, then the sites and the server in DIR, on this machine."""
    from rich.console import Console

    from fedlora.deploy import local

    local.stop(Path(folder), Console())


@command.command(short_help="A running federation: versions, clocks, models, memory, open paths.")
@click.option(
    "--public", metavar="HOST:PORT", help="What sites call: does more than the fleet path answer there?"
)
@overrides
def check(public: str | None, words: tuple[str, ...]) -> None:
    """Meet every site of a running federation, before the first round of a run.

    KEY=VALUE are those of `fedlora run`, without engine=deploy.
    """
    from rich.console import Console

    from fedlora.config import composition
    from fedlora.deploy.check import check as look

    look(composition.compose(["engine=deploy", *words]), public, Console())
