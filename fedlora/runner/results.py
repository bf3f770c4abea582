"""What a run says when it begins and when it has ended, and the files of its end."""

import hashlib
import math
import platform
import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import fedlora
from fedlora.callbacks.base import RunHandle
from fedlora.callbacks.console import megabytes
from fedlora.core.messages import Task
from fedlora.data.labels import counted
from fedlora.models import save_adapter
from fedlora.models.lora import layer_of
from fedlora.privacy import Ledger
from fedlora.runner import privacy_report
from fedlora.runner.assemble import Assembly
from fedlora.storage.run_folder import RunFolder
from fedlora.tasks import TASKS
from fedlora.training.generation import Answer, scores

ANSWERS = "answers.jsonl"  # in the folder of a run: what the model said to test rows, a line each


def opening(job: Assembly, path: Path | None, done: int, stopped: str | None = None) -> str:
    """What is about to happen, in two lines; no rounds where the run has been stopped for a reason."""
    spec, ranks = job.spec, ", ".join(map(str, sorted(set(job.ranks))))
    sizes = [len(part.rows) for part in job.parts]
    goes = f"rounds {done + 1} to {spec.rounds}" if done else f"{spec.rounds} round{'s' * (spec.rounds > 1)}"
    if stopped:
        goes = f"stopped after round {done}, since {stopped}"
    who = f"{job.rules.clients} clients" if sizes else "sites' own rows"
    if sizes and job.counts_public:
        who += f" of {min(sizes)} to {max(sizes)} rows"
    what = f"{type(spec.strategy).__name__}: {spec.model_name} on {spec.data.name}"
    if job.dataset.labels:
        what += f", {counted(job.dataset.labels)}"
    lines = [f"{what}, {who}, rank {ranks}, {goes}", *([f"-> {path}"] if path is not None else [])]
    if spec.privacy is not None and job.plans:
        lines.insert(1, privacy_report.opening(spec.privacy, job.plans))
    if job.rules.secure_sum:
        lines.insert(1, "secure_sum: clients send under masks, the server sees their weighted sum alone")
    return "\n".join(lines)


def write_holdings(job: Assembly, folder: RunFolder) -> None:
    """Write who holds how many rows of which label; never where anything about rows is protected."""
    if not job.parts and job.dataset.labels:  # the rows are at sites; labels are the run's own
        folder.write_json("data.json", {"labels": list(job.dataset.labels), "clients": []})
    if job.spec.privacy is not None or job.rules.secure_sum or not job.parts:
        return
    said = [[job.dataset.train[i].target for i in part.rows] for part in job.parts]
    clients = [
        {
            "client": client,
            "name": part.name,
            "rank": rank,
            "rows": len(part.rows),
            "labels": [found.count(label) for label in job.dataset.labels],
        }
        for client, (part, rank, found) in enumerate(zip(job.parts, job.ranks, said, strict=True))
    ]
    folder.write_json("data.json", {"labels": list(job.dataset.labels), "clients": clients})


def finish(
    job: Assembly,
    folder: RunFolder,
    run: RunHandle,
    initial: dict[str, Any],
    seconds: Mapping[str, float],
    own: dict[int, dict[str, float]],
    ledgers: Mapping[int, Ledger],
    answers: Sequence[Answer],
) -> None:
    """Write the adapter, the answers, the summary and the report."""
    spec = job.spec
    if answers:
        folder.write_lines(ANSWERS, [asdict(found) for found in answers])
    digest = None
    whole = run.result.whole().plain(partial(layer_of, job.base))
    if whole.pairs and not spec.strategy.personal:  # a personal one's adapter is only a part of a model
        made = folder.write("adapter", lambda to: save_adapter(whole, job.base, to))
        digest = hashlib.sha256((made / "adapter_model.safetensors").read_bytes()).hexdigest()
    rounds = folder.rounds()
    last = _final_line(job, run)
    task = job.dataset.task
    names, local = [*sorted(task.metrics(math.nan, math.nan)), "aggregation_error"], f"local_{task.score}"
    evaluated = [found for found in own.values() if found.keys() >= {local, "local_loss"}]
    ends = {n: fmean(found[n] for found in evaluated) for n in (local, "local_loss") if evaluated}
    if spec.strategy.personal and evaluated:
        ends |= job.named(ends["local_loss"], ends[local])
    away = dict(Counter(name for line in rounds for name in line.get("away", [])))
    privacy: dict[str, Any] = {}
    if spec.privacy is not None:
        privacy = privacy_report.summary(spec.privacy, ledgers, job.rules.secure_sum)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    summary = {
        "strategy": spec.strategy_name,
        "model": spec.model_name,
        "data": spec.data.name,
        "metric": job.metric,
        # Of fedlora's own tasks, reports know by the metric's name whether more of it is better.
        **({} if task in TASKS else {"more_is_better": task.more_is_better}),
        **{name: last[name] for name in names if name in last},
        **ends,
        **scores(answers),
        "initial": initial,
        **({} if spec.privacy else job.baseline()),  # it follows from counts of private labels
        "rounds": run.done,
        **({"stopped": run.stopped} if run.stopped else {}),
        **({"selected_round": run.selected_round} if run.selected_round is not None else {}),
        "clients": job.rules.clients,
        "ranks": sorted(set(job.ranks)),
        "seed": spec.seed,
        "dtype": str(job.base.model.dtype).removeprefix("torch."),
        "bytes_down": sum(line["bytes_down"] for line in rounds),
        "bytes_up": sum(line["bytes_up"] for line in rounds),
        "dropped": sum(line["dropped"] for line in rounds),
        **({"away": away} if away else {}),
        **seconds,
        "peak_memory_mb": round(peak),
        "adapter_sha256": digest,
        **(
            {"virtual_seconds": rounds[-1]["virtual_seconds"]}
            if rounds and "virtual_seconds" in rounds[-1]
            else {}
        ),
        **({"own": own} if own else {}),
        **privacy,
        "versions": {
            "fedlora": fedlora.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "flwr")},
        },
    }
    folder.write_json("summary.json", summary)
    from fedlora.report import read_run, write_report  # imports matplotlib: not before round 1

    write_report([read_run(folder.path)], folder.path / "report.html", spec.defaults())


def _final_line(job: Assembly, run: RunHandle) -> dict[str, Any]:
    """What is known of the run's result: the line of its round, evaluated if that round was not."""
    if job.spec.strategy.personal or not job.spec.evaluate.every:
        return next((line for line in reversed(run.metrics) if "loss" in line), {})
    number = run.done if run.selected_round is None else run.selected_round
    line = next((line for line in run.metrics if line["round"] == number), {})
    if "loss" in line:
        return line
    task = Task(run.result.adapter, base_delta=run.result.base_delta)
    return line | job.named(*job.evaluate([task])[0])


def closing(path: Path) -> str:
    """The result of a finished run and where it lies, for the terminal."""
    from fedlora.report import absences, read_run

    run = read_run(path)
    best = run.summary.get(run.metric)
    said = f"{run.metric} {best:.3f}, " if best is not None else ""
    sent = f"{megabytes(run.summary['bytes_down'])} down, {megabytes(run.summary['bytes_up'])} up"
    lines = [f"{said}{sent}, {run.summary['wall_seconds']:.0f} s"]
    if "virtual_seconds" in run.summary:
        lines[0] += f", {run.summary['virtual_seconds']:.1f} virtual s"
    if "stopped" in run.summary:
        lines.append(f"stopped  after round {run.summary['rounds']}: {run.summary['stopped']}")
    if "selected_round" in run.summary:
        lines.append(f"selected round {run.summary['selected_round']}, by the validation rows")
    if "exact_match" in run.summary:
        lines.append(_answered(run.summary))
    if absent := absences(run):
        lines.append(f"away     {absent}")
    if "ledger" in run.summary:
        lines.append(privacy_report.closing(run.summary))
    files = {"adapter": "adapter", "metrics": "metrics.jsonl", "answers": ANSWERS, "report": "report.html"}
    for what, name in files.items():
        if (path / name).exists():
            lines.append(f"{what:8} {path / name}")
    return "\n".join(lines)


def _answered(summary: Mapping[str, Any]) -> str:
    """How right the answers are, and how right those of the base were."""
    names = {"exact_match": "exact match", "rouge_l": "ROUGE-L"}
    said = [
        f"{words} {summary[key]:.3f} (base {summary['initial'][key]:.3f})" for key, words in names.items()
    ]
    return f"answers  {', '.join(said)}"
