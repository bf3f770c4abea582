"""SCAFFOLD at a site: its control variate lies on the site's own disk, where a new worker finds it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message

from fedlora.config.translate import run_spec
from fedlora.core.messages import Peer, Task, Update
from fedlora.deploy.worker import Worker
from fedlora.rounds.codec import read_update, write_task
from fedlora.runner.assemble import assemble
from fedlora.storage.tensors import read_tensors
from fedlora.training.rules import Scaffold, ServerMemory

WORDS = (
    "strategy=ffalora",
    "rule=scaffold",
    "weights=uniform",
    "client.optimizer._target_=torch.optim.SGD",
    "client.clip=null",
    "client.steps=2",
)


def test_a_site_goes_on_from_what_it_kept_and_says_so_if_that_is_gone(
    ask: Any, composed: Any, site: dict[str, Any], tmp_path: Path
) -> None:
    config = composed(*WORDS)
    asked, job = ask(config, site), assemble(run_spec(config))
    assert not asked().has_error()
    peer = job.peer(0, 2)
    plain = job.spec.strategy.task(job.start, peer)
    shapes = {name: tuple(dict(plain.adapter.tensors())[name].shape) for name in plain.shared()}

    def task(known: ServerMemory) -> Task:
        return replace(plain, method=(Scaffold().ask(known, plain, peer),))

    def reply(known: ServerMemory, round: int) -> Message:
        asked.worker = Worker()  # as after a restart
        return asked("train", write_task(task(known), round, 0)[0])  # type: ignore[no-any-return]

    def update(known: ServerMemory, round: int) -> Update:
        found = read_update(reply(known, round), task(known), Peer(0, 2), round)
        sent = {name.removeprefix("0/"): tensor for name, tensor in found.sent.items()}
        return replace(found, peer=peer, version=known.version, sent=sent)

    first = ServerMemory(0, {}, [(shapes, 2)])
    one = update(first, 1)
    second = ServerMemory(1, Scaffold().learn(first, [one]), [(shapes, 2)])
    two = update(second, 2)
    (kept,) = (tmp_path / "state").rglob("round-000002.safetensors")
    memory = read_tensors(kept)[0]
    for name, change in one.sent.items():
        torch.testing.assert_close(memory[f"0/own/{name}"], change)
        torch.testing.assert_close(memory[f"0/next/{name}"], change + two.sent[name])
    for folder in (tmp_path / "state").rglob("client-0"):
        shutil.rmtree(folder)
    assert "lacks the control variate that it had after round 1" in asked.why(reply(second, 2))
