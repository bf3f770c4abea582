"""What clients keep travels as a copy and comes back as a log, with the same result as on the spot."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.engines.client_memory import CarriedMemory, ClientCopy, replay
from fedlora.errors import CheckpointError
from fedlora.privacy import Entry, Ledger
from fedlora.storage.client_state import ClientStore, DownloadCache

STEP = Entry(1.0, 0.1, 10)


def carry(store: ClientStore, *clients: int, round: int) -> CarriedMemory:
    return CarriedMemory({c: ClientCopy.of(c, round, store, DownloadCache()) for c in clients})


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path / "clients")


def test_a_client_reads_what_it_kept_before_the_round(store: ClientStore) -> None:
    for round in (1, 2, 3):
        store.write(0, round, {"x": torch.tensor([float(round)])})
    assert carry(store, 0, round=3).read(0, 3)["x"] == 2
    assert carry(store, 0, round=1).read(0, 1) == {}


def test_nothing_is_written_before_the_log_is_replayed(store: ClientStore) -> None:
    away, ledger = carry(store, 0, 1, round=1), Ledger(1e-5).plus(STEP)
    for client in (0, 1):
        away.write(client, 1, {"x": torch.ones(2)})
        away.spend(client, None, ledger)
        away.answer(client)
    assert away.ledger(0) == ledger
    assert away.answered(0) == 1
    assert (store.read(0, 9), store.ledger(0), store.answered(0)) == ({}, None, 0)
    replay(away.log[0], 0, store)
    assert torch.equal(store.read(0, 9)["x"], torch.ones(2))
    assert (store.ledger(0), store.answered(0)) == (ledger, 1)
    assert store.ledger(1) is None


def test_a_ledger_that_has_changed_meanwhile_is_not_replaced(store: ClientStore) -> None:
    away, one = carry(store, 0, round=1), Ledger(1e-5).plus(STEP)
    away.spend(0, None, one)
    store.spend(0, None, one)
    with pytest.raises(CheckpointError, match="no longer the ledger that was read"):
        replay(away.log[0], 0, store)
    assert store.ledger(0) == one


def test_what_cannot_be_read_is_the_client_s_error_when_it_asks(store: ClientStore, tmp_path: Path) -> None:
    store.spend(0, None, Ledger(1e-5).plus(STEP))
    next((tmp_path / "clients").glob("*/ledger.json")).write_text("{")
    away: Any = carry(store, 0, round=1)
    with pytest.raises(CheckpointError, match="cannot be read"):
        away.ledger(0)
    assert away.read(0, 1) == {}
