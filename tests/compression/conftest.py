"""A server loop and clients without a model, messages without a server, and rounds of messages alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict
from server_lab import Lab, Noise, identity, lab

from fedlora.core.messages import Peer, State
from fedlora.core.strategy import next_state
from fedlora.rounds.codec import read_update
from fedlora.rounds.exchange import MessageExchange
from fedlora.storage.client_state import ClientStore


@dataclass
class Messages:
    """Rounds of a strategy as messages, with nothing around them that writes files or draws clients."""

    lab: Lab
    folder: Path

    def run(
        self, strategy: Any, compression: Any, rounds: int = 2, still: bool = False
    ) -> tuple[State, list[int]]:
        """The state after so many rounds of three clients, and the bytes up and down."""
        made = len(list(self.folder.glob("*")))
        store = ClientStore(self.folder / str(made))
        (self.folder / str(made)).mkdir(parents=True)
        runtime = self.lab.site(Noise(still=still), memory=store, compression=compression)
        ranks = (4, 1, 3) if strategy.mixed_ranks else (4, 4, 4)
        exchange, warned = MessageExchange(lambda text: warned.append(text), 0, None, compression), []
        state, bytes = strategy.init(self.lab.adapter(4)), [0, 0]
        for round in range(1, rounds + 1):
            replies: list[Message] = []
            for client, rank in enumerate(ranks):
                peer = Peer(client, rank)
                message = exchange.message(client, peer, strategy.task(state, peer), round, state.round)
                message.metadata.__dict__["_message_id"] = f"{round}-{client}"
                context = Context(1, client, {"client": client, "rank": rank}, RecordDict(), {})
                replies += runtime.train([message], [context])
            found = exchange.receive(round, replies, read_update)
            assert not warned, warned
            for line in found.lines:
                bytes = [bytes[0] + line["bytes_up"], bytes[1] + line["bytes_down"]]
            state = next_state(strategy, state, found.updates, np.random.default_rng(round))
        return state, bytes


@pytest.fixture
def messages(lab: Lab, tmp_path: Path) -> Messages:  # noqa: F811 (the fixture of that name)
    return Messages(lab, tmp_path / "kept")
