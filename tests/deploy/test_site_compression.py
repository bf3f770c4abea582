"""A site reads a task in the code of the run's settings, and answers in it."""

from typing import Any

import torch

from fedlora.compression import MessageKey, TopK
from fedlora.compression.words import for_downloads
from fedlora.config.translate import run_spec
from fedlora.core.messages import Peer
from fedlora.rounds.codec import read_update, size
from fedlora.rounds.compressed import code_task, plain_update
from fedlora.runner.assemble import assemble

WORDS = ("compression=topk", "compression.density=0.05", "compression.download=int8", "strategy=ffalora")


def test_a_site_applies_the_compression_of_the_run(ask: Any, composed: Any, site: dict[str, Any]) -> None:
    config = composed(*WORDS)
    asked = ask(config, site)
    assert not asked().has_error()
    job = assemble(run_spec(config))
    codec = job.spec.compression
    assert isinstance(codec, TopK)
    task, client = job.spec.strategy.task(job.start, job.peer(0, 2)), int(site["client"])
    content = asked.work()
    whole = size(content)
    code_task(content, task, for_downloads(codec), MessageKey(0, client, 1, down=True))  # type: ignore[arg-type]
    assert size(content) < whole
    reply = asked("train", content)
    assert not reply.has_error(), reply.error.reason
    assert set(reply.content.array_records["arrays"]) == {"places", "values"}
    plain_update(reply, task, codec, MessageKey(0, client, 1))
    update = read_update(reply, task, Peer(client, 2), 1)
    before, after = dict(task.adapter.tensors()), dict(update.adapter.tensors())
    moved = sum(int((before[name] != after[name]).sum()) for name in task.shared())
    among = sum(before[name].numel() for name in task.shared())
    assert 0 < moved <= round(0.05 * among)
    assert all(torch.equal(before[n], after[n]) for n in before if n not in task.shared())
