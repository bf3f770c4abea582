"""The one job: how `fedlora run` is told of it, and the same written down for the peers."""

from dataclasses import dataclass
from typing import cast

from fedlora.clients import LocalTraining
from fedlora.config.composition import compose
from fedlora.config.translate import run_spec
from fedlora.core.messages import Task
from fedlora.runner.assemble import assemble
from fedlora.training.client import TrainRequest

from .shared import Job

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Size:
    """How large the job is: clients of so many rows, batches of so many, rounds of one local epoch."""

    clients: int = 8
    rows: int = 48
    batch: int = 8
    rounds: int = 4

    def words(self) -> list[str]:
        """What `fedlora run` is told. The parts are even, so that more clients only mean more of the same."""
        return [
            *("model=minilm", "data=trec", "data.partition=iid", f"data.max_rows={self.rows}"),
            *(
                "strategy=fedit",
                f"clients={self.clients}",
                "ranks=8",
                "lora.scale=2.0",
                f"rounds={self.rounds}",
            ),
            *(f"client.batch_size={self.batch}", "client.clip=1.0", "evaluate.every=0", "seed=0"),
        ]


def written(size: Size) -> Job:
    """The job as fedlora makes it, with every batch that it will draw."""
    made = assemble(run_spec(compose(size.words())))
    client, adapter = made.runtime.client, made.start.adapter
    assert isinstance(client, LocalTraining)
    rows = [list(made.runtime.rows(k)) for k in range(size.clients)]
    orders = []
    for round in range(1, size.rounds + 1):
        drawn = [client.batches(TrainRequest(k, round, 0, Task(adapter), own)) for k, own in enumerate(rows)]
        places = [{id(row): i for i, row in enumerate(own)} for own in rows]
        orders.append(
            [[[at[id(row)] for row in batch] for batch in own] for at, own in zip(places, drawn, strict=True)]
        )
    start = {
        f"{PREFIX}{name}.lora_{factor}.weight": value.contiguous()
        for name, pair in adapter.pairs.items()
        for factor, value in pair.factors()
    }
    scale = next(iter(adapter.pairs.values())).scale
    return Job(
        model=made.base.path,
        labels=len(made.dataset.labels),
        pad=made.base.pad_id,
        rank=made.ranks[0],
        alpha=scale * made.ranks[0],
        targets=list(adapter.pairs),
        heads=list(made.base.heads),
        lr=client.lr,
        head_lr=client.head_lr or client.lr,
        clip=client.clip,
        rows=[[(list(row.input_ids), cast("int", row.target)) for row in own] for own in rows],
        orders=orders,
        test=[(list(row.input_ids), cast("int", row.target)) for row in made.test],
        start=start | {f"{PREFIX}{name}": value for name, value in adapter.extra.items()},
    )
