"""A site's worker: keeps model, rows and what a run needs loaded between messages, and answers them.

One process a site, started by the first message that finds none, reached over a socket in a folder of the
site's user, by whoever knows the secret beside it. It ends itself when the SuperNode is gone, or when nothing
was asked for a while.
"""

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from omegaconf import DictConfig, OmegaConf

import fedlora
from fedlora.config.instantiate import received
from fedlora.data.fields import ColumnError
from fedlora.deploy.flower_app import address, receive, secret, send
from fedlora.deploy.site import make_runtime, rank_of, site_parts
from fedlora.deploy.site_config import Invitation, SiteConfig
from fedlora.engines.client_runtime import ClientRuntime
from fedlora.errors import CheckpointError, ConfigError, ModelError, PrivacyError
from fedlora.rounds.codec import FAILED, REFUSED
from fedlora.storage.atomic import write_whole

IDLE = 1800.0  # seconds without a question after which a worker ends
LOOK = 2.0  # seconds between two looks at whether it is still wanted


class Worker:
    """Answers a site's messages, and keeps the site of the last run loaded."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._log = "worker.log"
        self._runtime: ClientRuntime | None = None
        self._size = 0

    def answer(self, message: Message, context: Context) -> Message:
        """The reply to one message; what goes wrong is a reply, too."""
        TaskIdentity.run_id, TaskIdentity.node_id = context.run_id, context.node_id
        TaskIdentity.task_id = 1  # a reply cannot be made without one; it is not sent
        try:
            return self._answer(message, context)
        except ConfigError as error:
            return Message(Error(REFUSED, " ".join(str(error).split())), reply_to=message)
        except (CheckpointError, ModelError, PrivacyError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        except Exception as error:  # its words could tell of the site's rows, DataError's among them
            logging.exception("a message could not be answered")
            what = type(error).__name__
            if isinstance(error, ColumnError):  # the run's own word or the operator's, and none of the rows'
                what = f'its file has no column "{error.column}", which {error.role} in node.toml can name'
            why = f"{what}; the reason is in {self._log} at this site"
        return Message(Error(FAILED, why), reply_to=message)

    def _answer(self, message: Message, context: Context) -> Message:
        node, config = SiteConfig.read(context.node_config), received(str(context.run_config["config"]))
        self._log = "/".join(
            [*node.home.parts[-3:], "worker.log"]
        )  # sites/NAME/state, or as it has been moved
        plan = self._plan(message, node, str(config.engine.experiment))
        if message.metadata.message_type == "query.profile":
            return self._profile(message, config, node, plan)
        self._load(config, node, plan)
        assert self._runtime is not None
        limits = node.limits
        if message.metadata.message_type == "train" and limits is not None:
            limits.promise(plan.experiment, self._runtime.client.plan(self._size), self._size)
        if "config" in message.content.config_records:
            round = message.content.config_records["config"]["round"]
            if isinstance(round, int) and round > config.rounds + 1:  # one more, for a last evaluation
                return Message(Error(REFUSED, f"round {round} of {config.rounds}"), reply_to=message)
        own: Mapping[str, Any] = {"client": node.client, "rank": rank_of(config, node)}
        inner = Context(context.run_id, context.node_id, dict(own), context.state, {})
        return self._runtime.app()(message, inner)

    def _plan(self, message: Message, node: SiteConfig, experiment: str) -> Invitation:
        """What the server told when it met this node, now or before."""
        if message.metadata.message_type == "query.profile":
            plan = Invitation.read(message.content.config_records["plan"])
            text = plan.record()["plan"]
            write_whole(node.keeps(plan.experiment) / "plan.json", lambda f: f.write_text(text, "utf-8"))
            return plan
        file = node.keeps(Path(experiment).name) / "plan.json"
        if not file.exists():
            raise CheckpointError(f"this site has never met '{experiment}', or its state was removed since")
        return Invitation.read({"plan": file.read_text("utf-8")})

    def _load(self, config: DictConfig, node: SiteConfig, plan: Invitation) -> None:
        of = (OmegaConf.to_yaml(config), node, plan)
        if self._of != of:
            self._of = self._runtime = None  # frees one model before the next is loaded
            self._runtime, self._size = make_runtime(config, node, plan)
            self._of = of

    def _profile(self, message: Message, config: DictConfig, node: SiteConfig, plan: Invitation) -> Message:
        """Who this site is, and what a check of the federation looks at.

        Without a fingerprint of the model in the plan, settings and rows are looked at alone, which takes no
        time to speak of.
        """
        if plan.model:
            self._load(config, node, plan)
            assert self._runtime is not None
            client, size = self._runtime.client, self._size
        else:
            held = site_parts(config, node, plan)
            client, size = held.client, len(held.rows)
        known: dict[str, Any] = {
            "client": node.client,
            "rank": rank_of(config, node),
            "fedlora": fedlora.__version__,
            "torch": str(torch.__version__),
            "clock": time.time(),
            "free_mb": os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20,
            "device": node.device or str(config.model.device),
        }
        noise = client.plan(size)
        if noise is None or not noise.privacy.hides_counts:
            known["rows"] = size
        return Message(RecordDict({"profile": ConfigRecord(known)}), reply_to=message)


def main() -> None:
    """`python -m fedlora.deploy.worker STATE PARENT`: listen until nobody needs it."""
    home, parent = Path(sys.argv[1]), int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    key = secret(home)
    lock = (home / "worker" / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return  # another one came first
    Path(address(home)).unlink(missing_ok=True)
    (home / "worker" / "pid").write_text(str(os.getpid()), "utf-8")
    with Listener(address(home), "AF_UNIX", authkey=key) as listener:
        asked = _watched(parent, Path(address(home)))
        logging.info("listening; process %d, for process %d", os.getpid(), parent)
        worker = Worker()
        while True:
            try:
                with listener.accept() as caller, asked:
                    message, context = receive(caller)
                    reply = worker.answer(message, context)
                    send(caller, reply, context)
            except (AuthenticationError, EOFError, ConnectionError) as error:
                logging.warning("a caller went away: %r", error)


class _Asked:
    """Whether somebody is being answered, and since when nobody is."""

    def __init__(self) -> None:
        self.busy, self.since = False, time.monotonic()

    def __enter__(self) -> None:
        self.busy = True

    def __exit__(self, *error: object) -> None:
        self.busy, self.since = False, time.monotonic()


def _watched(parent: int, socket: Path) -> _Asked:
    """End this process when it is told to, when the parent is gone, or when it was idle for long."""
    asked = _Asked()

    def end(why: str) -> None:
        logging.info("ends: %s", why)
        socket.unlink(missing_ok=True)
        os._exit(0)

    def look() -> None:
        while True:
            time.sleep(LOOK)
            if not _alive(parent):
                end("the process that kept this site up is gone")
            if not asked.busy and time.monotonic() - asked.since > IDLE:
                end(f"nothing was asked for {IDLE:g} s")

    signal.signal(signal.SIGTERM, lambda *_: end("it was told to"))
    threading.Thread(target=look, daemon=True).start()
    return asked


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


if __name__ == "__main__":
    main()
