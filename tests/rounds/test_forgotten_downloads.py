"""Base deltas that were replaced take no memory, however many clients once received them."""

from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from fedlora.rounds import exchange
from fedlora.storage import client_state
from fedlora.storage.client_state import DownloadCache
from fedlora.strategies import FedExLoRA, FedFold, FLoRA, RoLoRA

pytestmark = pytest.mark.slow  # whole runs

GROWING = [FedExLoRA(), FLoRA(), FedFold()]


def shelf_bytes(shelf: DownloadCache, clients: int) -> int:
    """What all clients hold, equal tensors counted once."""
    held = {t.data_ptr(): t.nbytes for k in range(clients) for t in shelf.held(k).values()}
    return sum(held.values())


@pytest.mark.parametrize("strategy", GROWING, ids=lambda s: type(s).__name__)
def test_memory_does_not_grow_with_the_clients_that_were_sampled_once(lab: Any, strategy: Any) -> None:
    # Base deltas are dense, and so of one size, from the first rounds on; those of two rounds are held.
    found = {}
    for rounds in (12, 28):
        run = lab.run(strategy, ranks=(4,) * 60, rounds=rounds, clients_per_round=2)
        assert len({k for line in run.sampled() for k in line}) > rounds / 2
        found[rounds] = shelf_bytes(run.grid._site.shelf, 60)
    dense = sum(4 * (o * i + min(o, i) ** 2) for o, i in ((6, 8), (8, 8)))
    own = 12 * 1024  # A of the size of a LoRA, heads
    assert found[28] <= found[12] * 1.25 + own
    assert found[28] <= 3 * dense + own


@pytest.mark.parametrize("strategy", [*GROWING, RoLoRA()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("lost", [0.0, 0.4])
def test_nobody_is_counted_on_for_what_is_forgotten_and_hardly_a_byte_more_is_sent(
    lab: Any, strategy: Any, lost: float
) -> None:
    """Against clients that never forget; some replies do not arrive, and some rounds come to nothing."""
    rng = np.random.default_rng(5)

    def some(replies: list[Message]) -> list[Message]:
        return [reply for reply in replies if rng.random() >= lost]

    ranks = (4,) * 8 if not strategy.mixed_ranks else (4, 2, 4, 1, 4, 2, 4, 4)
    run = lab.run(strategy, ranks, rounds=14, clients_per_round=3, min_updates=2, change=some)
    lines = run.lines("clients.jsonl")
    assert not [line for line in lines if "restarted" in line.get("reason", "")]
    assert {line.get("reason", "no reply")[:8] for line in lines} == {"no reply"}
    if not lost:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(client_state, "forgotten", lambda seen, version: set())
            patch.setattr(exchange, "forgotten", lambda seen, version: set())
            never = lab.run(strategy, ranks, rounds=14, clients_per_round=3, min_updates=2)
        assert never.digest == run.digest
        down, least = ([x["bytes_down"] for x in those.lines("clients.jsonl")] for those in (run, never))
        # Of a base delta that is dense one factor is an identity, which FedFold's rare ranks are sent again.
        assert down == least if strategy != FedFold() else sum(down) <= 1.02 * sum(least)
