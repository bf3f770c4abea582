"""The `fedlora` command: run, report, export, verify, privacy, deploy, demo.

A wrong key, value, file or column ends in one line on standard error and exit code 2; anything unexpected
leaves its traceback in a file, one line that names it, and exit code 1.
"""

import argparse
import atexit
import errno
import gc
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Set before torch and transformers are imported: no telemetry, no parallel tokenizers to warn about, and
# threads that wait asleep, so that two jobs on one machine slow each other by two and not by a hundred.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from rich.console import Console

from fedlora.errors import FedLoraError

USAGE = """fedlora: federated LoRA, in one process by default

  fedlora demo                          a first result on a packaged model and real text, under 4 minutes
  fedlora run [GROUP=CHOICE] [KEY=VALUE] ...   one federation; -m sweeps over comma-separated values
  fedlora run resume=DIR [rounds=N]     continue a run
  fedlora compare [--to DIR] [KEY=VALUE] ...   strategies at learning rates of their own, over seeds
  fedlora report DIR... [--to FILE]     one HTML page about a run, or several
  fedlora export RUN --to DIR [--merge] the adapter in PEFT's files, or a merged model
  fedlora verify RUN                    load a run's adapter with plain PEFT and compare
  fedlora replay RUN strategy=NAME      a run's recorded updates, aggregated by another strategy
  fedlora privacy plan|show|audit       what privacy costs, has cost, and whether training keeps its word
  fedlora deploy init DIR               what a server and its sites need to begin, on real machines

fedlora VERB --help says more about each.
"""


# What the operating system says of a path that is not there, or not what it is meant to be.
PATHS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError)

# Notices of one library about another are no business of the user's.
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def _notice(message: Warning | str, *where: Any, **more: Any) -> str:
    """A warning as a line for the user, without the line of source that raised it."""
    return f"fedlora: {message}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `fedlora` command."""
    words = list(sys.argv[1:] if argv is None else argv)
    # Modules, weights and tokens stay. Looking for garbage among them takes a fifth of the time until round 1
    # (Run.begin enables it again) and a second at the end.
    gc.disable()
    atexit.register(gc.freeze)
    warnings.formatwarning = _notice
    verbs = {
        "run": _run,
        "report": _report,
        "export": _export,
        "verify": _verify,
        "replay": _replay,
        "compare": _compare,
        "privacy": _privacy,
        "deploy": _deploy,
        "demo": _demo,
    }
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return
    if words[0] == "--version":
        import fedlora

        print(fedlora.__version__)
        return
    if words[0] not in verbs:
        _fail(f"unknown verb '{words[0]}'; there are {', '.join(verbs)} (fedlora --help)", 2)
    try:
        verbs[words[0]](words[1:])
    except FedLoraError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt as stop:  # a run that has begun says how it goes on
        _fail(str(stop) or "interrupted", 130)
    except PermissionError as error:
        _fail(f"'{error.filename}': {error.strerror}; name another folder, or let yourself write there", 2)
    except Exception as error:
        if isinstance(error, PATHS) and error.filename is not None:
            _fail(f"'{error.filename}': {error.strerror}; check the path", 2)
        if _disk_is_full(error):
            _fail(
                "the disk is full; make room and say it again; a run goes on by fedlora run resume=DIR",
                1,
            )
        log = Path("fedlora-error.log").absolute()
        try:
            log.write_text(traceback.format_exc(), encoding="utf-8")
        except OSError:
            log = Path(tempfile.mkdtemp(prefix="fedlora-")) / log.name
            log.write_text(traceback.format_exc(), encoding="utf-8")
        _fail(f"unexpected {type(error).__name__}: {error}; the traceback is in {log}", 1)
    finally:
        gc.enable()


def _disk_is_full(error: Exception) -> bool:
    """Whether this is an operating system's refusal for want of room; safetensors tells it in words."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {code})" in str(error) for code in full)


def _fail(message: str, code: int) -> None:
    print(f"fedlora: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def _run(words: list[str]) -> None:
    """Compose the configuration and run it; Hydra itself takes over for its own flags, such as -m."""
    from fedlora.config import composition

    if {"-h", "--help"}.intersection(words):
        from fedlora.config.explain import explained

        print(explained([word for word in words if not word.startswith("-")]), end="")
        return
    resume = next((composition.path_said(word) for word in words if word.startswith("resume=")), None)
    many = {"-m", "--multirun"}.intersection(words)
    if many or (resume and _of_sweep(Path(resume))):
        from fedlora.cli.sweep import sweep

        sweep(words if many else ["-m", *words])
        return
    if any(word.startswith("-") for word in words):
        from fedlora.cli.sweep import hydra_s_own

        hydra_s_own(words)
        return
    from fedlora.cli.run_job import run_job
    from fedlora.config.resume import continued
    from fedlora.runner.results import closing

    config = continued(Path(resume), words) if resume else composition.compose(words)
    path = run_job(config, Console())
    print(closing(path))


def _of_sweep(folder: Path) -> bool:
    from fedlora.report.read import SWEEP  # imports matplotlib, half a second that few commands need

    return (folder / SWEEP).is_file()


def _report(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora report",
        description="One HTML page about a run or several, PNG and CSV beside it.",
    )
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folders of finished runs, or of sweeps")
    default = "where to write; default: report.html in DIR, or in this folder if there are several DIRs"
    parser.add_argument("--to", type=Path, metavar="FILE", help=default)
    given = parser.parse_args(words)
    from fedlora.config.defaults import defaults
    from fedlora.report import missing, read_runs, runs_table, seeds_table, write_files, write_report

    for path, jobs in ((path, jobs) for path in given.runs if (jobs := missing(path))):
        shown = ", ".join(jobs[:3]) + (", ..." if len(jobs) > 3 else "")
        print(f"{len(jobs)} runs of the sweep in {path} are missing: {shown}; fedlora run -m resume={path}")
    runs = [*{run.path: run for path in given.runs for run in read_runs(path)}.values()]
    to = given.to or Path(given.runs[0] if len(given.runs) == 1 else ".")  # a run's page is about that run
    if to.is_dir() or not to.suffix:  # beside the page lies a folder of its name
        to = to / "report.html"
    written = write_report(runs, to, defaults())
    beside = write_files(runs, written.with_suffix(""))
    (seeds_table(runs) or runs_table(runs)).show()
    print(f"{written}\npictures and numbers: {beside}")


def _export(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="fedlora export", description="A run's adapter, or a merged model.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--merge", action="store_true", help="the whole model with ΔW added to its weights")
    parser.add_argument(
        "--client", type=int, metavar="N", help="a client's own adapter (personal strategies)"
    )
    from fedlora.config.instantiate import Trust
    from fedlora.saved_runs.export import export, export_own

    trust, words = Trust.said(words)
    given = parser.parse_args(words)
    if given.client is not None and given.merge:
        _fail("--merge: a client's own model is exported as an adapter; leave --merge out", 2)
    if given.client is not None:
        print(export_own(given.run, given.client, given.to, trust))
    else:
        print(export(given.run, given.to, given.merge, trust))


def _verify(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora verify",
        description="Check a run's hash, and that plain PEFT gives its logits and accuracy.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished run")
    from fedlora.config.instantiate import Trust
    from fedlora.saved_runs.export import verify

    trust, words = Trust.said(words)
    print(verify(parser.parse_args(words).run, trust))


def _compare(words: list[str]) -> None:
    from fedlora.cli.compare import main as compare

    compare(words)


def _replay(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora replay",
        description="Aggregate the updates of a run with record_updates=true by another strategy.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of the run")
    parser.add_argument(
        "strategy", nargs="*", metavar="strategy=NAME", help="and its settings, strategy.KEY=VALUE"
    )
    from fedlora.config.instantiate import Trust
    from fedlora.saved_runs.replay import replay

    trust, words = Trust.said(words)
    given = parser.parse_args(words)
    replay(given.run, given.strategy, trust).show()


def _privacy(words: list[str]) -> None:
    from fedlora.cli.privacy import privacy

    privacy(words)


def _deploy(words: list[str]) -> None:
    from fedlora.cli.deploy import deploy

    deploy(words)


def _demo(words: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="fedlora demo",
        description="TREC questions over 8 clients: frozen encoder, best single client, FedIT, FlexLoRA.",
    )
    parser.add_argument("--out", type=Path, default=None, metavar="DIR", help="default: runs/demo-<time>")
    given = parser.parse_args(words)
    from fedlora.cli.demo import demo

    demo(given.out, Console())


if __name__ == "__main__":
    main()
