"""The clients' side of Flower's simulation; a module of its own, so that actors keep what they load."""

import functools
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedlora.core.adapter import Adapter

from .bench import RANK
from .flower import ROUNDS, SIZES, Job
from .peft_loop import PeftLoop, Work
from .rows import Batches, ordinary, round_of
from .shapes import LLAMAS, TINY, llama_base, start
from .throughput import steps_of


@functools.lru_cache(maxsize=1)
def kept(folder: Path) -> tuple[Any, Adapter, PeftLoop]:
    """The base, the first adapter and the loop of this process, made once."""
    job = Job.read(folder)
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    base = llama_base((TINY if job.tiny else LLAMAS)["1B"], job.device, dtype)
    adapter = start(base, RANK)
    return base, adapter, PeftLoop(base.model, adapter)


@functools.lru_cache(maxsize=64)
def work(folder: Path, batches: Batches, client: int) -> Work:
    """A client's rows in their batches, the same every round; the way to attend is chosen for them."""
    job, (base, adapter, loop) = Job.read(folder), kept(folder)
    on_gpu = job.device == "cuda"
    steps = steps_of(batches, "1B", on_gpu and not job.tiny)
    request = round_of(base, [adapter] * job.clients, batches, steps, not on_gpu)[client]
    found = Work(adapter, ordinary(batches, steps).batches(request))
    loop.choose(found)
    return found


def app(folder: Path) -> ClientApp:
    """The ClientApp: load, train, reply."""
    client = ClientApp()

    @client.train()
    def answer(message: Message, context: Context) -> Message:
        number = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        own = work(folder, SIZES[(number - 1) // ROUNDS], int(context.node_config["partition-id"]))
        _, adapter, loop = kept(folder)
        sent = message.content.array_records["arrays"].to_torch_state_dict()
        factors, losses = loop.round([Work(adapter.with_tensors(sent), own.batches)])
        state = {name: value.float().cpu() for name, value in factors[0].items()}
        metrics = MetricRecord({"num-examples": sum(map(len, own.batches)), "loss": float(losses.mean())})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    return client
