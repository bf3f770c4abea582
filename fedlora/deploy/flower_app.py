"""What Flower starts on every machine of a deployment: the ServerApp, and a ClientApp that asks a worker.

Flower makes a new process for every message to a site. To load a model in each would cost more than to train,
so that process only hands its message on, over a local socket, to a worker that keeps everything loaded, and
starts the worker if there is none. It imports neither torch nor any other part of fedlora, which is why what
it needs of Flower is here.
"""

import os
import secrets
import subprocess
import sys
import tempfile
import time
import tomllib
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path

from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.serverapp import Grid, ServerApp

START = 120.0  # seconds that a worker may take until it listens
FAILED = 2  # flwr's code for a ClientApp that raised

_started: list[subprocess.Popen[bytes]] = []  # workers outlive this process; nothing is to wait for them

server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run a federation over the sites behind a SuperLink."""
    from fedlora.deploy.server import serve

    serve(grid, {name: str(value) for name, value in context.run_config.items()})


class Relay(ClientApp):
    """Hands every message on to this node's worker; with `warm=false` it does the work itself."""

    def __call__(self, message: Message, context: Context) -> Message:
        """The reply to a message."""
        if context.node_config.get("warm", True) is False:
            from fedlora.deploy.worker import Worker

            return Worker().answer(message, context)
        try:
            home = Path(str(context.node_config["state"])).expanduser().absolute()
        except KeyError:
            why = "--node-config: state is missing; say state=FOLDER"
            return Message(Error(FAILED, why), reply_to=message)
        for last in (False, True):
            try:
                return ask(home, message, context)
            except (EOFError, ConnectionError) as error:
                if last:  # it was killed twice over the same message
                    why = f"this site's worker died: {type(error).__name__}; see {home / 'worker.log'}"
                    return Message(Error(FAILED, why), reply_to=message)
        raise AssertionError


client = Relay()


def ask(home: Path, message: Message, context: Context) -> Message:
    """The worker's reply; it is started if there is none.

    Raises:
        EOFError: it died while it worked.
        ConnectionError: it could not be started.
    """
    with _connected(home) as worker:
        send(worker, message, context)
        reply, after = receive(worker)
    context.state = after.state
    return reply


def send(to: Connection, message: Message, context: Context) -> None:
    """Send both over a local socket, as Flower would over a network."""
    to.send_bytes(message_to_proto(message).SerializeToString())
    to.send_bytes(context_to_proto(context).SerializeToString())


def receive(source: Connection) -> tuple[Message, Context]:
    """What `send` has sent."""
    message = message_from_proto(MessageProto.FromString(source.recv_bytes()))
    return message, context_from_proto(ContextProto.FromString(source.recv_bytes()))


def address(home: Path) -> str:
    """Where the worker of a site listens: in a folder that is its user's alone."""
    return str(home / "worker" / "socket")


def secret(home: Path) -> bytes:
    """What both ends of the socket know; made when first asked for, whole or not at all."""
    folder = home / "worker"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    known = folder / "secret"
    if not known.exists():
        handle, made = tempfile.mkstemp(dir=folder)  # readable by its owner alone
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        with suppress(FileExistsError):  # another caller came first
            os.link(made, known)
        os.unlink(made)
    return known.read_bytes()


def _connected(home: Path) -> Connection:
    key, until, started = secret(home), time.monotonic() + START, None
    while True:
        try:
            return Client(address(home), "AF_UNIX", authkey=key)
        except (FileNotFoundError, ConnectionRefusedError):
            pass
        except AuthenticationError as error:
            raise ConnectionError("the worker does not know this site's secret") from error
        if started is None or started.poll() is not None:
            started = _start(home)
        if time.monotonic() > until:
            raise ConnectionError(f"no worker after {START:g} s")
        time.sleep(0.1)


def _start(home: Path) -> subprocess.Popen[bytes]:
    """A worker of its own session, which ends itself when whoever keeps this site up is gone."""
    words = [sys.executable, "-m", "fedlora.deploy.worker", str(home), str(os.getppid())]
    with (home / "worker.log").open("ab") as log:
        worker = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    _started.append(worker)
    return worker


def begin(file: Path) -> None:
    """Start the worker of a site before its first message: importing torch takes seconds.

    Args:
        file: the site's node.toml. What is wrong with it is said when the first message comes.
    """
    try:
        config = tomllib.loads(file.read_text("utf-8"))
        home = Path(str(config["state"])).expanduser().absolute()
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return
    if config.get("warm", True) is not False:
        secret(home)
        _start(home)


if (
    __name__ == "__main__"
):  # of supernode.sh, whose process becomes the SuperNode, after which the worker looks
    begin(Path(sys.argv[1]))
