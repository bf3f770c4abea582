"""What the peers share: the job as the driver wrote it, a plain PEFT model, and a client's round on it.

No peer imports fedlora: this is the code one writes by hand with torch, transformers and PEFT. Tensors go by
the names of PEFT's files, so that what a peer ends in can be held against fedlora's adapter.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Row = tuple[list[int], int]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """The work of every system.

    Args:
        model: folder of the base model.
        labels: how many there are.
        pad: the token to pad with.
        rank: of the adapters.
        alpha: PEFT's lora_alpha.
        targets: names of the adapted modules.
        heads: names of the modules that are trained whole.
        lr: of A and B.
        head_lr: of the heads.
        clip: largest norm of a step's gradient.
        rows: each client's token ids and labels.
        orders: by round, then client: which rows make which batch.
        test: rows to see what was learnt.
        start: the initial factors and heads.
    """

    model: str
    labels: int
    pad: int
    rank: int
    alpha: float
    targets: list[str]
    heads: list[str]
    lr: float
    head_lr: float
    clip: float
    rows: list[list[Row]]
    orders: list[list[list[list[int]]]]
    test: list[Row]
    start: State

    @classmethod
    def read(cls, folder: Path) -> "Job":
        """The job that lies in a folder."""
        return cls(
            **json.loads((folder / "job.json").read_text()), start=load_file(folder / "start.safetensors")
        )

    def write(self, folder: Path) -> None:
        """Put the job into a folder."""
        said = {name: value for name, value in vars(self).items() if name != "start"}
        (folder / "job.json").write_text(json.dumps(said))
        save_file(self.start, folder / "start.safetensors")

    @property
    def rounds(self) -> int:
        """How many there are."""
        return len(self.orders)

    def batches(self, round: int, client: int) -> list[tuple[dict[str, Tensor], Tensor]]:
        """A client's batches of a round, from 1: model inputs and labels."""
        rows = self.rows[client]
        return [self.padded([rows[i] for i in order]) for order in self.orders[round - 1][client]]

    def padded(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Rows padded to their own longest, as DataCollatorWithPadding does."""
        ids = [torch.tensor(row[0]) for row in rows]
        pad = nn.utils.rnn.pad_sequence
        inputs = {
            "input_ids": pad(ids, batch_first=True, padding_value=self.pad),
            "attention_mask": pad([torch.ones_like(one) for one in ids], batch_first=True),
        }
        return inputs, torch.tensor([row[1] for row in rows])


def build(job: Job) -> Any:
    """The base with PEFT's LoRA and the heads, as transformers and PEFT load it; no dropout, as fedlora."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    plain = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=job.labels)
    config = LoraConfig(
        r=job.rank, lora_alpha=job.alpha, target_modules=job.targets, modules_to_save=job.heads
    )
    return get_peft_model(plain, config).eval()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by its name in PEFT's files."""
    return {
        name.replace("modules_to_save.default.", "").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def load(model: nn.Module, state: State) -> None:
    """Set what is trained."""
    with torch.no_grad():
        for name, parameter in trained(model).items():
            parameter.copy_(state[name])


def optimizer(model: nn.Module, job: Job) -> torch.optim.Optimizer:
    """A client's optimizer, new in every round."""
    found = trained(model)
    groups = [
        {"params": [p for name, p in found.items() if ".lora_" in name], "lr": job.lr},
        {"params": [p for name, p in found.items() if ".lora_" not in name], "lr": job.head_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def train(model: nn.Module, job: Job, round: int, client: int) -> None:
    """A client's round, from what the model holds."""
    steps = optimizer(model, job)
    leaves = list(trained(model).values())
    for inputs, labels in job.batches(round, client):
        nn.functional.cross_entropy(model(**inputs).logits, labels).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(leaves, job.clip)
        steps.step()
        steps.zero_grad()


@torch.no_grad()
def accuracy(job: Job, state: State) -> float:
    """The share of right answers on the test rows."""
    model, right = build(job), 0
    load(model, state)
    rows = sorted(job.test, key=lambda row: len(row[0]))
    for first in range(0, len(rows), 32):
        inputs, labels = job.padded(rows[first : first + 32])
        right += int((model(**inputs).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def ended(round: int, job: Job) -> None:
    """Tell the driver, which notes the time."""
    print(f"round {round}/{job.rounds}", flush=True)
