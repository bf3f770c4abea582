"""What a private run has spent, finished or not."""

from pathlib import Path

from fedlora.config.instantiate import Trust, read
from fedlora.errors import CheckpointError
from fedlora.report import Table
from fedlora.runner.privacy_checks import reported_ledgers
from fedlora.storage.run_folder import SERVER, RunFolder


def ledgers(path: Path) -> Table:
    """The ledger of every client of a run, finished or not.

    Raises:
        CheckpointError: no run, or no private one.
    """
    if not (path / "config.yaml").is_file():
        raise CheckpointError(f"privacy show: expected a run's folder, '{path}' has no config.yaml")
    folder, source = RunFolder(path), ""
    if not (found := folder.ledgers()) and (path / "clients.jsonl").exists():
        # Clients on machines of their own keep it there.
        accountant = read(path, Trust()).get("privacy", {}).get("accountant", "prv")
        found, source = reported_ledgers(folder.clients(), accountant), " The sites have reported these."
    if not found:
        raise CheckpointError(
            f"privacy show: '{path}' has no ledger: it ran without privacy, or has released nothing yet"
        )
    rows = []
    for client, ledger in sorted(found.items()):
        rows += [
            [
                "server" if client == SERVER else str(client),
                f"{ledger.epsilon:.3f}" if not at else "",
                f"{ledger.delta:g}",
                f"{entry.sigma:.4f}",
                f"{entry.q:.4f}",
                str(entry.steps),
                "" if ledger.valid else "NOT VALID",
            ]
            for at, entry in enumerate(ledger.entries)
        ]
    form = next(iter(found.values())).record()
    header = ["client", "epsilon", "delta", "sigma", "q", "steps", ""]
    note = f"Definition: {form['adjacency']}. {form['mechanism']}; accountant {form['accountant']}.{source}"
    return Table(f"What {path} has spent", header, rows, note)
