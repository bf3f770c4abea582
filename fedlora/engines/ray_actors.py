"""Flower's simulation on Ray: the nodes are this process's, their work is done by actors."""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedlora.engines.client_runtime import ClientRuntime


class Simulated(ClientApp):
    """The ClientApp that travels to an actor with every message: how to load the site there, and no more.

    Args:
        site: loads the clients' side; keeps it for the next message.
        ranks: by client.
    """

    def __init__(self, site: Callable[[], ClientRuntime], ranks: Sequence[int]) -> None:
        super().__init__()
        self._site, self._ranks = site, list(ranks)

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to a message."""
        client = int(context.node_config["partition-id"])
        own: dict[str, Any] = {"client": client, "rank": self._ranks[client]}
        inner = Context(context.run_id, context.node_id, own, context.state, {})
        return self._site().app()(message, inner)


def simulation(
    work: Callable[[Grid, Callable[[], bool]], None],
    client: ClientApp,
    nodes: int,
    actors: int,
    gpus: float = 0.0,
) -> None:
    """Do a server's work over simulated nodes.

    Args:
        work: what the server does with the grid, and with a way to see whether its nodes are gone.
        client: the nodes' side.
        nodes: how many.
        actors: processes that answer messages side by side.
        gpus: share of a GPU of each.
    """
    from flwr.simulation import run_simulation

    failed, stopped = list[BaseException](), threading.Event()

    def main(grid: Grid, context: Context) -> None:
        try:
            work(grid, stopped.is_set)
        except BaseException as error:
            failed.append(error)
            raise

    app = ServerApp()
    app.main()(main)
    resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus}
    init: dict[str, Any] = {
        "num_cpus": actors,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "include_dashboard": False,
    }
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # as future releases do; else it warns
    quiet = logging.getLogger("flwr")
    level = quiet.level
    quiet.setLevel(logging.CRITICAL)  # the run has its own display
    try:
        run_simulation(app, client, nodes, backend_config={"client_resources": resources, "init_args": init})
    except Exception as error:
        if failed:
            raise failed[0] from error
        raise
    finally:
        stopped.set()  # Flower waits for the server's thread, which may wait for replies
        quiet.setLevel(level)
    if failed:
        raise failed[0]
