"""`fedlora privacy`: plan a private run, show what a run has spent, audit the training code."""

from pathlib import Path

import click

from .words import overrides


@click.group(short_help="Plan, show and audit differential privacy.")
def command() -> None:
    """Plan, show and audit differential privacy."""


@command.command(short_help="The noise for a budget, and its effect on strategies.")
@click.option(
    "--records",
    type=int,
    metavar="N",
    help="Number of records of every client, instead of those of the data.",
)
@overrides
def plan(records: int | None, words: tuple[str, ...]) -> None:
    """Compute the noise that a budget needs, and estimate its effect on several strategies.

    Nothing is trained.

    KEY=VALUE are the settings of `fedlora run`.
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

    asked = next((word.partition("=")[2] for word in words if word.startswith("strategy=")), "")
    for table in forecast(spec, other, records, asked):
        table.show()


@command.command(short_help="The privacy ledger of every client of a run.")
@click.argument("run", metavar="RUN")
def show(run: str) -> None:
    """Show what every client of a run has spent. RUN is the folder of a run, finished or not."""
    from fedlora.saved_runs.ledgers import ledgers

    ledgers(Path(run)).show()


@command.command(short_help="Attack the training code on this machine, to test it.")
@click.option(
    "--epsilon",
    type=float,
    default=1.0,
    show_default=True,
    metavar="E",
    help="The epsilon that training claims.",
)
@click.option(
    "--rounds", type=int, default=5, show_default=True, metavar="N", help="Number of training rounds."
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed that decides which canaries are included; the noise has none.",
)
def audit(epsilon: float, rounds: int, seed: int) -> None:
    """Train on canaries with the clients' code, then guess which of them were in the data.

    The share of right guesses gives a lower bound on epsilon, which must not exceed the claimed one.
    """
    from fedlora.errors import PrivacyError
    from fedlora.runner.audit import audit as attack
    from fedlora.runner.audit import report

    found = attack(epsilon, rounds, seed=seed)
    print("\n".join(report(found)))
    if not found.passed:
        raise PrivacyError(
            "privacy audit: training on this machine is not as private as it claims, see above"
        )
