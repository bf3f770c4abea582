"""The clients' side of Flower's simulation; a module of its own, so that actors keep what they load."""

import functools
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .shared import Job, build, load, train, trained


@functools.lru_cache(maxsize=1)
def kept(folder: Path) -> tuple[Job, Any]:
    """The job and the model of this process, loaded once."""
    return loaded(folder)


def loaded(folder: Path) -> tuple[Job, Any]:
    """The job and a new model."""
    torch.set_num_threads(1)
    job = Job.read(folder)
    return job, build(job)


def app(folder: Path, cached: bool) -> ClientApp:
    """The ClientApp: load, train, reply."""
    client = ClientApp()

    @client.train()
    def answer(message: Message, context: Context) -> Message:
        job, model = (kept if cached else loaded)(folder)
        who = int(context.node_config["partition-id"])
        load(model, message.content.array_records["arrays"].to_torch_state_dict())
        train(model, job, int(message.content.config_records["config"]["server-round"]), who)  # type: ignore[arg-type]
        state = {name: value.detach() for name, value in trained(model).items()}
        metrics = MetricRecord({"num-examples": len(job.rows[who])})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    return client
