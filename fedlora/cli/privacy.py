"""`fedlora privacy`: plan a private run, look at what one has spent, audit the code that trains."""

import argparse
from pathlib import Path

from fedlora.errors import ConfigError, PrivacyError

USAGE = """fedlora privacy: what a private run costs, before and after

  fedlora privacy plan [--records N] [GROUP=CHOICE] [KEY=VALUE] ...   for the words of `fedlora run`
  fedlora privacy show RUN        the ledger of every client of a run
  fedlora privacy audit           attack the training code on this machine
"""


def privacy(words: list[str]) -> None:
    """The verb, with its own verbs.

    Raises:
        ConfigError: another verb.
        PrivacyError: an audit found that training does not keep its word.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    verbs = {"plan": _plan, "show": _show, "audit": _audit}
    if words[0] not in verbs:
        raise ConfigError(f"unknown verb 'privacy {words[0]}'; there are {', '.join(verbs)}")
    verbs[words[0]](words[1:])


def _plan(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora privacy plan",
        description="From a budget to noise, and what it does under several strategies; trains nothing.",
    )
    parser.add_argument("--records", type=int, metavar="N", help="of every client, instead of the data's own")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="as for fedlora run")
    given = parser.parse_args(words)
    from fedlora.config.composition import compose
    from fedlora.config.translate import run_spec
    from fedlora.runner.forecast import plan
    from fedlora.runner.spec import RunSpec

    said = [word for word in given.words if word.startswith("privacy=")] or ["privacy=dp_sgd"]
    rest = [word for word in given.words if not word.startswith("privacy=")]

    def other(name: str) -> RunSpec:
        plain = [word for word in rest if not word.startswith("strategy")]
        return run_spec(compose([*plain, *said, f"strategy={name}"]))

    for table in plan(run_spec(compose([*rest, *said])), other, given.records):
        table.show()


def _show(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora privacy show", description="What every client of a run has spent."
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, finished or not")
    given = parser.parse_args(words)
    from fedlora.saved_runs.ledgers import ledgers

    ledgers(given.run).show()


def _audit(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora privacy audit",
        description="Train on canaries by the code that clients run, then guess which were in the data.",
    )
    parser.add_argument("--epsilon", type=float, default=1.0, metavar="E", help="that is claimed; default: 1")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of training; default: 5")
    parser.add_argument("--seed", type=int, default=0, help="of the canaries' coins; noise has none")
    given = parser.parse_args(words)
    from fedlora.runner.audit import audit, report

    found = audit(given.epsilon, given.rounds, seed=given.seed)
    print("\n".join(report(found)))
    if not found.passed:
        raise PrivacyError("privacy audit: private training here does not keep its word, see above")
