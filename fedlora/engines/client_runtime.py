"""The client side of a run: from Flower messages to trained updates, for one client or many at once."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedlora.compression import Compression
from fedlora.compression.words import for_downloads, for_uploads
from fedlora.core.update_step import UpdateStep
from fedlora.data import Example
from fedlora.engines.client_memory import ClientMemory, Downloads
from fedlora.engines.replies import Outgoing, draft, outgoing, version_of
from fedlora.errors import CheckpointError, ConfigError, PrivacyError
from fedlora.models import Base
from fedlora.privacy import Ledger
from fedlora.rounds.codec import REFUSED, read_task
from fedlora.rounds.compressed import plain_task
from fedlora.secure_aggregation import protocol
from fedlora.secure_aggregation.masked_round import SUM
from fedlora.storage.client_state import DownloadCache
from fedlora.training.client import Client, TrainRequest, TrainResult

Result = TypeVar("Result")

HELD_OUT = 0.1  # share of a client's rows that its own evaluation keeps back


@dataclass(frozen=True)
class ClientRuntime:
    """Where clients live: one base model, one way to train, and each client's own rows.

    A machine of a real federation holds one client; a simulation holds all of them. The node's config says
    which client a message is for (`client`) and its LoRA rank (`rank`).

    Args:
        base: the frozen model.
        client: how to train locally.
        rows: from a client's id to its rows.
        memory: where clients keep their own trained parts and their ledgers; None where there are none.
        held_out: whether a tenth of each client's rows is kept back, to evaluate on it the client's model:
            what it is sent, before it trains, or where it keeps a part of its own, what it then has.
        shelf: what clients were sent and hold on to.
        bases: other models than `base`, dealt in turn by client id, where clients do not run the same one.
        most: trainings of this run that a client answers, those of earlier processes included; None for any
            number. A round that is asked for again counts again.
        masked: whether a client trains only where its update leaves under the masks of a secure sum.
        steps: whose client halves make of what training gave what is sent, in this order.
        compression: how the numbers of messages travel; None as they are.
        rounds: how many rounds the federation has, for schedules over them; None where nobody has said it.
    """

    base: Base
    client: Client
    rows: Callable[[int], Sequence[Example]]
    memory: ClientMemory | None = None
    held_out: bool = False
    shelf: Downloads = field(default_factory=DownloadCache)
    bases: Sequence[Base] = ()
    most: int | None = None
    masked: bool = False
    steps: Sequence[UpdateStep] = ()
    compression: Compression | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        if self.held_out and self.client.private:
            raise ConfigError("what a client measures on its own rows is not covered by epsilon")

    def profile(self, message: Message, context: Context) -> Message:
        """What the server may know: the client's id and rank."""
        client = int(context.node_config["client"])
        known = ConfigRecord({"client": client, "rank": int(context.node_config["rank"])})
        return Message(RecordDict({"profile": known}), reply_to=message)

    def train(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Train the clients of a group in one pass; each gets the reply that it would get alone.

        What a client may still spend is read, and what it has spent is written, in one piece: a second
        message to the same client, in any process that shares the site's memory, waits.
        """
        if self.memory is None or not (self.client.private or self.most is not None):
            return self._train(messages, contexts)
        with self.memory.alone(int(context.node_config["client"]) for context in contexts):
            return self._train(messages, contexts)

    def _train(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        read = [self._assignment(m, c) for m, c in zip(messages, contexts, strict=True)]
        refused = [self._refusal(m, assignment) for m, (assignment, _) in zip(messages, read, strict=True)]
        if any(why is not None for why in refused):
            return self._without(refused, messages, contexts)
        assignments = [assignment for assignment, _ in read]
        outcomes = self._trained(assignments)
        told = [dict[str, float]()] * len(read)
        if self.held_out:
            told = self._told([_own(a, o) for a, o in zip(assignments, outcomes, strict=True)])
        outcomes = [replace(o, metrics=o.metrics | more) for o, more in zip(outcomes, told, strict=True)]
        sent = [self._sent(a, outcome) for a, outcome in zip(assignments, outcomes, strict=True)]
        drafts = [draft(m, a, out) for m, a, out in zip(messages, assignments, sent, strict=True)]
        if self.memory is None and any(out.outcome.memory or out.kept for out in sent):
            raise ConfigError("a client has a part of its own to keep, and its site has nowhere to keep it")
        self._spend(assignments, outcomes, contexts)
        for a, out in zip(assignments, sent, strict=True):
            self._remember(a, out)  # paid for: it may be a part of what a later message then holds
        for m, (a, held) in zip(messages, read, strict=True):
            # Once nothing can fail any more: a second try starts from what was held before.
            self.shelf.hold(a.client, held, version_of(m))
        return [finish(context) for finish, context in zip(drafts, contexts, strict=True)]

    def evaluate(self, message: Message, context: Context) -> Message:
        """The client's model on the rows that it keeps back, without training."""
        assignment, held = self._assignment(message, context)
        self.shelf.hold(assignment.client, held, version_of(message))
        kept = len(self._split(assignment.client)[1])
        metrics = MetricRecord({"num-examples": kept, **self._told([assignment])[0]})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    def step_tokens(self, context: Context) -> int:
        """About how many tokens one local step of this client holds."""
        return self.client.step_tokens(self._split(int(context.node_config["client"]))[0])

    def app(self) -> ClientApp:
        """The Flower ClientApp of this site."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return self.train([message], [context])[0]

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            return self.evaluate(message, context)

        app.query("keys")(protocol.keys)
        app.query("shares")(protocol.shares)
        app.query("unmask")(protocol.unmask)

        @app.query("profile")
        def profile(message: Message, context: Context) -> Message:
            return self.profile(message, context)

        return app

    def _trained(self, assignments: Sequence[TrainRequest]) -> list[TrainResult]:
        """What training makes of the assignments."""
        with self._discreet("private training"):
            return self._each_base(self.client.train, assignments)

    def _sent(self, assignment: TrainRequest, outcome: TrainResult) -> Outgoing:
        """What is to be sent of an outcome, and what is kept for the next time."""
        codec = for_uploads(self.compression) if assignment.task.shared() else None
        if codec is None and not any(step.at_client for step in self.steps):
            return Outgoing(outcome)
        before = {} if self.memory is None else self.memory.steps.read(assignment.client, assignment.round)
        with self._discreet("a step on a private update"):
            return outgoing(self.steps, codec, assignment, outcome, before)

    @contextmanager
    def _discreet(self, what: str) -> Iterator[None]:
        """Keep the words of an error at the client under privacy, where they may tell of the rows.

        Raises:
            PrivacyError: something failed in the block, under privacy.
        """
        try:
            yield
        except Exception:
            if not self.client.private:
                raise
            logging.getLogger("fedlora").exception("%s failed", what)
            raise PrivacyError(f"{what} failed; the reason is in the client's own log") from None

    def _each_base(
        self,
        work: Callable[[Base, Sequence[TrainRequest]], list[Result]],
        assignments: Sequence[TrainRequest],
    ) -> list[Result]:
        """What `work` makes of the assignments, those of one base together."""
        if not self.bases:
            return work(self.base, assignments)
        found: dict[int, Result] = {}
        for turn, base in enumerate(self.bases):
            own = [i for i, a in enumerate(assignments) if a.client % len(self.bases) == turn]
            if own:
                found |= zip(own, work(base, [assignments[i] for i in own]), strict=True)
        return [found[i] for i in range(len(assignments))]

    def _split(self, client: int) -> tuple[Sequence[Example], Sequence[Example]]:
        """A client's training rows and those it keeps back, always the same ones."""
        rows = self.rows(client)
        kept = max(1, int(len(rows) * HELD_OUT)) if self.held_out and len(rows) > 1 else 0
        return rows[kept:], rows[:kept]

    def _assignment(self, message: Message, context: Context) -> tuple[TrainRequest, dict[str, Tensor]]:
        """What a message asks of a client, and what it holds once this is done."""
        client = int(context.node_config["client"])
        content = plain_task(message.content, for_downloads(self.compression), client)
        task, round, seed, held = read_task(content, self.shelf.held(client))
        memory = {} if self.memory is None else self.memory.read(client, round)
        ledger = self._ledger(client, context)
        rows = self._split(client)[0]
        return TrainRequest(client, round, seed, task, rows, memory, ledger, self.rounds), held

    def _ledger(self, client: int, context: Context) -> Ledger | None:
        """What a client has spent: the ledger on disk, which holds all that Flower's own state knows of."""
        found = None if self.memory is None else self.memory.ledger(client)
        known = context.state.config_records.get("ledger")
        if known is not None and not (found and found.covers(Ledger.load(str(known["json"])))):
            raise CheckpointError(
                f"the ledger of client {client} lacks what it spent before in this run; put the file "
                "back, the client cannot train without it"
            )
        return found

    def _refusal(self, message: Message, assignment: TrainRequest) -> str | None:
        """Why a client must not train now; None if it may."""
        if self.masked and SUM not in message.content:
            return "this client sends under the masks of a secure sum alone, and this message asks for no sum"
        if self.most is not None:
            if self.memory is None:
                raise ConfigError("a client has trainings to count, and its site has nowhere to count them")
            if self.memory.answered(assignment.client) >= self.most:
                return f"this client has answered the {self.most} trainings of a run that it agreed to"
        return self.client.refusal(assignment)

    def _without(
        self, refused: Sequence[str | None], messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message]:
        """The replies where some clients must not train: theirs say why, the others train together."""
        going = [i for i, why in enumerate(refused) if why is None]
        trained = self._train([messages[i] for i in going], [contexts[i] for i in going]) if going else []
        replies = dict(zip(going, trained, strict=True))
        return [
            replies[i] if why is None else Message(Error(REFUSED, why), reply_to=messages[i])
            for i, why in enumerate(refused)
        ]

    def _spend(
        self,
        assignments: Sequence[TrainRequest],
        outcomes: Sequence[TrainResult],
        contexts: Sequence[Context],
    ) -> None:
        """Write down what the outcomes cost, all that could go wrong before they leave being done.

        Raises:
            PrivacyError: a private client's ledger has not grown by exactly this round.
            CheckpointError: the ledger on disk is no longer the one that was read.
        """
        for assignment, outcome, context in zip(assignments, outcomes, contexts, strict=True):
            if self.client.private or outcome.ledger is not None:
                after = self._paid(assignment, outcome)
                if self.memory is None:
                    raise ConfigError("a client has a ledger to keep, and its site has nowhere to keep it")
                self.memory.spend(assignment.client, assignment.ledger, after)
                context.state["ledger"] = ConfigRecord({"json": after.dump()})
            if self.most is not None and self.memory is not None:
                self.memory.answer(assignment.client)

    def _paid(self, assignment: TrainRequest, outcome: TrainResult) -> Ledger:
        """The ledger after an outcome, which must be the one before it and the entry of this round."""
        plan = self.client.plan(len(assignment.rows))
        if plan is None or outcome.ledger is None or outcome.ledger != plan.after(assignment.ledger):
            raise PrivacyError(
                "private training left no entry of its own in the ledger; its result is not sent"
            )
        return outcome.ledger

    def _remember(self, assignment: TrainRequest, sent: Outgoing) -> None:
        if self.memory is not None:
            self.memory.write(assignment.client, assignment.round, sent.outcome.memory)
            self.memory.steps.write(assignment.client, assignment.round, sent.kept)

    def _told(self, assignments: Sequence[TrainRequest]) -> list[dict[str, float]]:
        """Each client's own evaluation; empty where it keeps no rows back."""
        kept = [replace(a, rows=self._split(a.client)[1]) for a in assignments]
        scores = self._each_base(self.client.evaluate, kept)
        name = f"local_{self.base.task.score}"
        return [
            {"local_loss": loss, name: score} if a.rows else {}
            for a, (loss, score) in zip(kept, scores, strict=True)
        ]


def _own(assignment: TrainRequest, outcome: TrainResult) -> TrainRequest:
    """The assignment that would start from an outcome, where a client keeps a part; else as it was."""
    if not outcome.own:
        return assignment
    return replace(assignment, task=replace(assignment.task, adapter=outcome.adapter), memory=outcome.own)
