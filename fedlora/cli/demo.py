"""The demonstration: what federation gains on the default job, against what anyone could do without it."""

import datetime
import json
from pathlib import Path

import click

# What to run, in the order of the table: three epochs over the same clients' rows at the same settings, which
# two cores do in under four minutes. Alone, every client trains by itself; the best on the test rows counts.
RUNS = {
    "frozen": ("Frozen encoder, federated head", ["rounds=3", "lora.targets=[]", "evaluate.every=3"]),
    "alone": (
        "Best single client, alone",
        ["rounds=1", "client.epochs=3", "evaluate.every=0", "evaluate.updates=true"],
    ),
    "fedit": ("FedIT, rank 8", ["rounds=3", "strategy=fedit", "ranks=8"]),
    "flexlora": ("FlexLoRA, ranks 2 4 8 16", ["rounds=3", "strategy=flexlora", "ranks=[2,4,8,16]"]),
}


@click.command(short_help="A first result on a packaged model and real text, under 4 minutes.")
@click.option("--out", metavar="DIR", help="A new folder; by default runs/demo-<time>.")
def command(out: str | None) -> None:
    """Train on TREC questions over 8 clients: frozen encoder, best single client, FedIT, FlexLoRA."""
    demo(Path(out) if out else None)


def demo(out: Path | None) -> None:
    """Run the four jobs one after the other, then show one table and one report.

    Args:
        out: the folder that holds a run each; None makes one under runs/.

    Raises:
        ConfigError: the folder is there already.
    """
    from rich.console import Console
    from rich.table import Table

    from fedlora.callbacks.console import megabytes
    from fedlora.cli.run_job import run_job
    from fedlora.config.composition import compose
    from fedlora.errors import ConfigError
    from fedlora.report import read_run, write_report

    out = out or Path("runs") / f"demo-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if out.exists():
        raise ConfigError(f"--out: '{out}' is there already; name a new folder")
    console = Console()
    for number, (name, (title, overrides)) in enumerate(RUNS.items(), 1):
        console.rule(f"{number} of {len(RUNS)}: {title}", align="left", style="dim")
        run_job(compose([*overrides, f"out={out / name}"]), console)
    runs = {name: read_run(out / name) for name in RUNS}
    report = write_report([runs["frozen"], runs["fedit"], runs["flexlora"]], out / "report.html")

    table = Table(
        "", "accuracy", "up", "down", "seconds", title="TREC questions, six types of answer", box=None
    )
    for column in table.columns[1:]:
        column.justify = "right"
    table.add_row("Majority class", f"{runs['fedit'].summary['majority']:.3f}", "", "", "")
    for name, (title, _) in RUNS.items():
        summary = runs[name].summary
        if name == "alone":
            lines = (out / name / "clients.jsonl").read_text().splitlines()
            best = max(json.loads(line).get("test_accuracy", 0.0) for line in lines)
            table.add_row(title, f"{best:.3f}", "-", "-", f"{summary['wall_seconds']:.0f}")
            continue
        table.add_row(
            title,
            f"{summary['accuracy']:.3f}",
            megabytes(summary["bytes_up"]),
            megabytes(summary["bytes_down"]),
            f"{summary['wall_seconds']:.0f}",
        )
    console.rule(style="dim")
    console.print(table)
    best_run = out / "flexlora"
    console.print(
        f"\nadapter  {best_run / 'adapter'}   (peft.PeftModel.from_pretrained)\n"
        f"metrics  {best_run / 'metrics.jsonl'}\nreport   {report}\n"
        f"check    fedlora verify {best_run}",
        highlight=False,
        soft_wrap=True,
    )
