"""The parts of a run's description that are no objects of their own: model, data, adapter, evaluation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedlora.data import Dataset, Row
from fedlora.errors import ConfigError
from fedlora.models import LoRA
from fedlora.models.device import chosen_dtype
from fedlora.models.parametrizations import LORA, DoRA, Parametrization, composed
from fedlora.tasks import LearningTask

Partitioner = Callable[[Sequence[Row], int | None, np.random.Generator], Sequence[Sequence[int]]]


@dataclass(frozen=True)
class ModelSpec:
    """Which base model the clients share, and how it is loaded.

    Args:
        path: a folder that transformers reads, or a name on the hub.
        source: makes the folder of a packaged model where there is no path.
        name: what reports call the model.
        dtype: of the frozen weights: float32, bfloat16 or float64; adapters are float32. Of auto it becomes
            the one that suits the device, here and now, so that all of a run has the same.
        device: cpu, cuda, cuda:1 or mps.
        quantize: 4bit or 8bit, on a GPU with bitsandbytes.
        gradient_checkpointing: compute layers once more on the way back, for less memory; None where a row
            does not fit a GPU otherwise.
        attention: transformers' attn_implementation, such as flash_attention_2; None takes fedlora's own.
        allow_pickle: load weights that are not safetensors; only who starts the run can allow it.
        loaded: a transformers model and its tokenizer that are in memory already.
        lora_targets: the modules that get an adapter where the run names none.
        lr: the learning rate that suits the model.
    """

    path: str | None = None
    source: Callable[[], str | Path] | None = None
    name: str = ""
    dtype: str = "float32"
    device: str = "cpu"
    quantize: str | None = None
    gradient_checkpointing: bool | None = None
    attention: str | None = None
    allow_pickle: bool = False
    loaded: tuple[Any, Any] | None = None
    lora_targets: Any = "all-linear"
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.loaded is None:  # else it is there, in a dtype of its own
            object.__setattr__(self, "dtype", chosen_dtype(self.dtype, self.device))


@dataclass(frozen=True)
class DataSpec:
    """Which rows there are, and how they become clients.

    Args:
        source: reads the training and test rows.
        name: what reports call the data.
        partition: iid, dirichlet (by label), shards (by label) or natural; or a function from the training
            rows, the number of clients and a seeded generator to the positions of each client's rows.
        alpha: of the Dirichlet proportions; smaller is more skewed.
        shards: how many shards a client gets.
        min_rows: every client has at least so many rows.
        max_rows: and at most so many; None does not cap.
        max_length: tokens of a row; longer rows are cut.
        at_sites: whether the training rows are at other sites, so that here are test rows alone.
        columns: text, label, prompt, response -> the column of that name in a site's file.
        quotes: whether " encloses the cells of a site's table; None: it does in CSV, and is text in TSV.
        file: which file of its folder a site takes.
        client: the column that names a row's client.
        tested: reads the test rows alone, given the labels, where that can be done without the training rows.
        task: what is learnt, where it is no task of fedlora's own; it is the task of what `source` reads.
    """

    source: Callable[[], Dataset]
    name: str = ""
    partition: str | Partitioner = "iid"
    alpha: float = 0.5
    shards: int = 2
    min_rows: int = 1
    max_rows: int | None = None
    max_length: int = 128
    at_sites: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict)
    quotes: bool | None = None
    file: str | None = None
    client: str | None = None
    tested: Callable[[Sequence[str]], Dataset] | None = None
    task: LearningTask | None = None


@dataclass(frozen=True)
class LoRASpec:
    """Which weights get an adapter, and which form it has.

    Args:
        targets: names of modules as PEFT takes them, or all-linear; None takes those that suit the model.
        target_parameters: names of parameters that hold the weights of many experts, as PEFT takes them.
        scale: s in ΔW = s·B·A, the same at every rank.
        alpha: or PEFT's lora_alpha: then s = alpha / rank.
        use_rslora: with alpha: s = alpha / √rank.
        rank_pattern: module -> rank, for every client.
        alpha_pattern: module -> alpha.
        head: the classification head: train (and send, and average), last (its last layer), or freeze.
        init: lora (A random, B = 0), pissa or olora (taken out of the base); None: the strategy's own.
        dora: whether the length of every row of the adapted weights is trained too, by DoRA.
        adapter: a folder that PEFT wrote, to start from.
        parametrization: another way to change the weights than plain LoRA's.
    """

    targets: Any = None
    target_parameters: Any = ()
    scale: float = 2.0
    alpha: float | None = None
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    head: str = "train"
    init: str | None = None
    dora: bool = False
    adapter: str | None = None
    parametrization: Parametrization = LORA

    def __post_init__(self) -> None:
        if self.head not in ("train", "last", "freeze"):
            raise ConfigError(f"lora.head: expected train, last or freeze, got '{self.head}'")

    @property
    def form(self) -> Parametrization:
        """How the weights are changed."""
        return composed(self.parametrization, DoRA() if self.dora else LORA)

    @property
    def scaling(self) -> LoRA:
        """The rule from a client's rank to the scales of its modules."""
        return LoRA(self.scale, self.alpha, self.use_rslora, self.rank_pattern, self.alpha_pattern)


@dataclass(frozen=True)
class EvaluationSpec:
    """When and on what the run evaluates.

    Args:
        rows: test rows, or validation: a fifth of the training rows at most, which nobody then trains on.
        every: rounds between evaluations on the test rows; 0 never evaluates.
        clients: each client also keeps a tenth of its rows and evaluates what it is sent on them.
        updates: each client's update is also evaluated by itself on the test rows.
        answers: so many test rows are answered word for word, by the base and by what is trained.
    """

    rows: str = "test"
    every: int = 1
    clients: bool = False
    updates: bool = False
    answers: int = 0

    def __post_init__(self) -> None:
        if self.rows not in ("test", "validation"):
            raise ConfigError(f"evaluate.rows: expected test or validation, got '{self.rows}'")
        if self.answers < 0:
            raise ConfigError(
                f"evaluate.answers: expected a number of test rows, or 0 for none; got {self.answers}"
            )
