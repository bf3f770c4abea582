"""`fedlora privacy`: plan a private run, look at what one has spent, audit the code that trains."""

from pathlib import Path

import click

from .words import overrides


@click.group(short_help="What privacy costs, has cost, and whether training keeps its word.")
def command() -> None:
    """Look at what a private run costs, before and after."""


@command.command(short_help="From a budget to noise, and what noise does.")
@click.option("--records", type=int, metavar="N", help="Records of every client, instead of the data's own.")
@overrides
def plan(records: int | None, words: tuple[str, ...]) -> None:
    """Go from a budget to noise, and to what noise does under several strategies; train nothing.

    KEY=VALUE are those of `fedlora run`.
    """
    from fedlora.config.composition import compose
    from fedlora.config.translate import run_spec
    from fedlora.runner.forecast import plan as forecast
    from fedlora.runner.spec import RunSpec

    private = any(word.startswith("privacy=") for word in words)
    said = [*words] if private else [*words, "privacy=dp_sgd"]
    spec = run_spec(compose(said))
    rest = [word for word in said if not word.startswith("strategy")]

    def other(name: str) -> RunSpec:
        return run_spec(compose([*rest, f"strategy={name}"]))

    for table in forecast(spec, other, records):
        table.show()


@command.command(short_help="The ledger of every client of a run.")
@click.argument("run", metavar="RUN")
def show(run: str) -> None:
    """Show what every client of a run has spent; RUN is its folder, finished or not."""
    from fedlora.saved_runs.ledgers import ledgers

    ledgers(Path(run)).show()


@command.command(short_help="Attack the training code on this machine.")
@click.option("--epsilon", type=float, default=1.0, show_default=True, metavar="E", help="What is claimed.")
@click.option("--rounds", type=int, default=5, show_default=True, metavar="N", help="Rounds of training.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Of the canaries' coins; noise has none."
)
def audit(epsilon: float, rounds: int, seed: int) -> None:
    """Train on canaries by the code that clients run, then guess which of them were in the data."""
    from fedlora.errors import PrivacyError
    from fedlora.runner.audit import audit as attack
    from fedlora.runner.audit import report

    found = attack(epsilon, rounds, seed=seed)
    print("\n".join(report(found)))
    if not found.passed:
        raise PrivacyError("privacy audit: private training here does not keep its word, see above")
