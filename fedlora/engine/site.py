"""The client side of a run: from Flower messages to trained updates, for one client or many at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora.client import Assignment, Client, Outcome
from fedlora.data import Example
from fedlora.engine.wire import read_task, write_update
from fedlora.models import Base
from fedlora.trainer import evaluate

HELD_OUT = 0.1  # share of a client's rows that its own evaluation keeps back


@dataclass(frozen=True)
class Site:
    """Where clients live: one base model, one way to train, and each client's own rows.

    A machine of a real federation holds one client; a simulation holds all of them. The node's config says
    which client a message is for (`client`) and its LoRA rank (`rank`).

    Args:
        base: the frozen model.
        client: how to train locally.
        rows: from a client's id to its rows.
        held_out: whether a tenth of each client's rows is kept back, to evaluate on it what the client is
            sent before it trains.
    """

    base: Base
    client: Client
    rows: Callable[[int], Sequence[Example]]
    held_out: bool = False

    def profile(self, message: Message, context: Context) -> Message:
        """What the server may know: the client's id and rank."""
        client = int(context.node_config["client"])
        known = ConfigRecord({"client": client, "rank": int(context.node_config["rank"])})
        return Message(RecordDict({"profile": known}), reply_to=message)

    def train(self, messages: Sequence[Message], contexts: Sequence[Context]) -> list[Message]:
        """Train the clients of a group in one pass; each gets the reply that it would get alone."""
        assignments = []
        for message, context in zip(messages, contexts, strict=True):
            task, round, seed = read_task(message.content)
            client = int(context.node_config["client"])
            assignments.append(Assignment(client, round, seed, task, self._split(client)[0]))
        outcomes = self.client.train(self.base, assignments)
        if self.held_out:
            outcomes = self._with_own_evaluation(assignments, outcomes)
        return [
            Message(write_update(outcome, a.task, a.round, len(a.rows)), reply_to=message)
            for message, a, outcome in zip(messages, assignments, outcomes, strict=True)
        ]

    def step_tokens(self, context: Context) -> int:
        """About how many tokens one local step of this client holds."""
        return self.client.step_tokens(self._split(int(context.node_config["client"]))[0])

    def app(self) -> ClientApp:
        """The Flower ClientApp of this site."""
        app = ClientApp()

        @app.train()
        def train(message: Message, context: Context) -> Message:
            return self.train([message], [context])[0]

        @app.query("profile")
        def profile(message: Message, context: Context) -> Message:
            return self.profile(message, context)

        return app

    def _split(self, client: int) -> tuple[Sequence[Example], Sequence[Example]]:
        """A client's training rows and those it keeps back, always the same ones."""
        rows = self.rows(client)
        kept = max(1, int(len(rows) * HELD_OUT)) if self.held_out and len(rows) > 1 else 0
        return rows[kept:], rows[:kept]

    def _with_own_evaluation(
        self, assignments: Sequence[Assignment], outcomes: Sequence[Outcome]
    ) -> list[Outcome]:
        kept = [self._split(a.client)[1] for a in assignments]
        scores = evaluate(self.base, [a.task.adapter for a in assignments], kept)
        return [
            Outcome(outcome.adapter, outcome.metrics | {"local_loss": loss, "local_accuracy": right})
            if own
            else outcome
            for outcome, (loss, right), own in zip(outcomes, scores, kept, strict=True)
        ]
