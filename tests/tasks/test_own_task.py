"""Learning tasks that fedlora has not, each a class outside the package, through public names alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import AutoPeftModelForSequenceClassification, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import fedlora as fl
from fedlora.data import Example, Row, text_in
from fedlora.errors import ConfigError, DataError
from fedlora.report import read_run
from fedlora.tasks import LearningTask

PLEASANT = {"sun": 2.0, "honey": 1.5, "home": 1.0, "rain": -1.0, "tax": -1.5, "mud": -2.0}


@dataclass(frozen=True)
class Regression(LearningTask):
    """A number for a text, by the mean squared error; `unit` is what the numbers are divided by."""

    name = "regression"
    columns = ("text", "score")
    headline = "rmse"
    more_is_better = False
    score = "absolute_error"
    unit: float = 1.0

    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        try:
            value = float(record[columns["score"]])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: expected a number in {columns['score']!r}") from error
        return Row(text_in(record, columns["text"], where), value)

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[float]:
        return [row.target / self.unit for row in rows]

    def options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        gap = logits[:, 0] - target
        return gap**2, self.unit * gap.abs()

    def metrics(self, loss: float, score: float) -> dict[str, float]:
        return {"loss": loss, "rmse": self.unit * math.sqrt(loss), "mae": score}

    def baseline(self, train: Sequence[Row], test: Sequence[Row]) -> dict[str, float | None]:
        mean = fmean(row.target for row in train)
        return {"mean": math.sqrt(fmean((row.target - mean) ** 2 for row in test))}

    def predicted(self, logits: Tensor, labels: Sequence[str]) -> list[float]:
        return [self.unit * one for one in logits[:, 0].tolist()]


@dataclass(frozen=True)
class Topics(LearningTask):
    """Any number of the labels for a text (multi-label), by binary cross-entropy."""

    name = "topics"
    columns = ("text", "topics")
    headline = "all_right"

    def row(self, record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> Row:
        return Row(text_in(record, columns["text"], where), tuple(sorted(record[columns["topics"]])))

    def labels(
        self, train: Sequence[Row], test: Sequence[Row], declared: Sequence[str] | None, where: str
    ) -> tuple[str, ...]:
        return tuple(sorted({topic for row in train for topic in row.target}))

    def targets(self, rows: Sequence[Row], labels: Sequence[str]) -> list[Any]:
        return [tuple(float(label in row.target) for label in labels) for row in rows]

    def probe(self, ids: list[int], number: int) -> Example:
        return Example(ids, (1.0, 0.0))

    def options(self, labels: Sequence[str]) -> dict[str, Any]:
        return {"id2label": dict(enumerate(labels)), "problem_type": "multi_label_classification"}

    def scores(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(-1)
        return losses, ((logits > 0) == (target > 0)).all(-1).float()

    def metrics(self, loss: float, score: float) -> dict[str, float]:
        return {"loss": loss, "all_right": score}

    def predicted(self, logits: Tensor, labels: Sequence[str]) -> list[Any]:
        return [[label for label, x in zip(labels, one, strict=True) if x > 0] for one in logits.tolist()]


def rated() -> list[dict[str, Any]]:
    return [
        {"text": f"{count} times {word}", "score": value, "from": f"site {count % 2}"}
        for word, value in PLEASANT.items()
        for count in range(10)
    ]


def about() -> list[dict[str, Any]]:
    return [
        {"text": word, "topics": [t for t in ("a", "b") if t in word]} for word in ("ab", "a", "b", "c")
    ] * 12


pytestmark = [
    pytest.mark.slow,  # whole runs
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of peft and transformers about each other
]
SMALL: dict[str, Any] = {"model": "tiny", "rounds": 2, "ranks": 4, "clients": 3, "progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A regression by FedIT; some tests read it."""
    client = fl.clients.LocalTraining(lr=1e-2, head_lr=2e-2, steps=40, batch_size=8)
    where = tmp_path_factory.mktemp("own") / "run"
    return fl.simulate(
        data=rated(), task=Regression(2.0), client=client, evaluate={"clients": True}, out=where, **SMALL
    )


def test_a_run_has_the_metrics_of_an_own_task_and_learns(run: Any) -> None:
    first, last = run.summary["initial"], run.metrics[-1]
    assert run.summary["metric"] == "rmse"
    assert last["rmse"] == run.summary["rmse"] == pytest.approx(2 * math.sqrt(last["loss"]))
    assert last["rmse"] < 0.7 * min(first["rmse"], run.summary["mean"])
    assert {"mae", "local_absolute_error", "local_loss"} <= last.keys()
    assert not {"accuracy", "local_accuracy", "majority"} & {*run.summary, *last, *run.clients[-1]}


def test_two_rounds_train_the_one_output_by_the_mean_squared_error(run: Any) -> None:
    """Against torch's own loss, with the plain model that PEFT loads from the run's folder."""
    rows = run.spec.data.source().test
    model = AutoPeftModelForSequenceClassification.from_pretrained(run.path / "adapter", num_labels=1).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.path / "adapter")
    with torch.no_grad():
        said = [model(**tokenizer([row.source], return_tensors="pt")).logits[0, 0] for row in rows]
    loss = F.mse_loss(torch.stack(said), torch.tensor([row.target / 2 for row in rows]))
    assert float(loss) == pytest.approx(run.summary["loss"], rel=1e-4)


def test_the_exported_adapter_is_a_plain_one_whose_model_has_one_output(run: Any, tmp_path: Path) -> None:
    run.save(tmp_path / "adapter")
    config = AutoConfig.from_pretrained(tmp_path / "adapter" / "base")
    assert run.task.kind == "regression"
    plain = AutoModelForSequenceClassification.from_pretrained(run.task.base, config=config)
    assert plain.config.num_labels == 1
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    texts = ["3 times honey", "4 times mud"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        said = [2 * float(loaded(**tokenizer([text], return_tensors="pt")).logits) for text in texts]
    assert run.predict(texts) == pytest.approx(said, abs=1e-4)
    assert "logits of plain PEFT" in run.verify()


def test_a_run_of_an_own_task_goes_on_from_python_alone(run: Any, tmp_path: Path) -> None:
    more = run.keep(tmp_path / "more").resume(rounds=3, progress=False)
    assert [line["rmse"] for line in more.metrics[:2]] == [line["rmse"] for line in run.metrics]
    assert more.metrics[2]["rmse"] > 0
    with pytest.raises(ConfigError, match=r"objects that no configuration can name \(data\)"):
        fl.open(tmp_path / "more").base()


def test_a_report_knows_which_way_an_own_metric_is_better(run: Any) -> None:
    read = read_run(run.path)
    assert not read.more_is_better
    assert read.local_metric == "local_absolute_error"
    text = run.report().read_text("utf-8")
    assert "rmse" in text
    assert "local absolute error" in text


def test_an_own_task_reads_files_and_names_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "rated.csv"
    path.write_text("text,stars\n" + "".join(f"{row['text']},{row['score']}\n" for row in rated()))
    run = fl.simulate(data=path, task=Regression(), columns={"score": "stars"}, **SMALL)
    assert run.summary["rmse"] > 0
    with pytest.raises(DataError, match="expected a column 'score', got 'text', 'stars'"):
        fl.simulate(data=path, task=Regression(), **SMALL)


def test_rows_without_labels_can_be_dealt_by_their_clients_and_privately() -> None:
    privacy = fl.privacy.DPSGD(epsilon=8, accountant="rdp")
    data = {name: [r for r in rated() if r["from"] == name] for name in ("site 0", "site 1")}
    small = SMALL | {"clients": None}
    run = fl.simulate(
        data=data, test=rated()[::7], task=Regression(), strategy="ffalora", privacy=privacy, **small
    )
    assert len(run.summary["ledger"]["clients"]) == 2
    assert run.summary["rmse"] > 0


def test_many_labels_a_row_are_one_task_more() -> None:
    client = fl.clients.LocalTraining(lr=5e-3, head_lr=2e-2, steps=20, batch_size=8)
    run = fl.simulate(data=about(), task=Topics(), client=client, **SMALL)
    assert run.task.labels == ("a", "b")
    assert run.summary["all_right"] == run.metrics[-1]["all_right"]
    assert run.summary["loss"] < run.summary["initial"]["loss"]
    assert all({*said} <= {"a", "b"} for said in run.predict(["ab", "c"]))
    assert read_run(run.path).more_is_better


def test_what_does_not_fit_an_own_task_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"data\[0\]: expected a number in 'score'"):
        fl.simulate(data=[{"text": "x", "score": "high"}] * 9, task=Regression(), **SMALL)
    with pytest.raises(ConfigError, match=r"evaluate\.answers: a text classifier writes no text, its rmse"):
        fl.simulate(data=rated(), task=Regression(), evaluate={"answers": 2}, **SMALL)
    with pytest.raises(ConfigError, match="task: expected classification or instruction, got 'regression'"):
        fl.simulate(data=rated(), task="regression", **SMALL)
    with pytest.raises(ConfigError, match="task regression: expected the columns text and score, got"):
        fl.simulate(data=rated(), task=Regression(), label="score", **SMALL)
    with pytest.raises(ConfigError, match="task: the rows of the preset 'tiny' have one already"):
        fl.simulate(data="tiny", task=Regression(), **SMALL)
