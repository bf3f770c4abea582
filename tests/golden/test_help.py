"""What `--help` of every verb prints, kept in help.json; `python tests/golden/test_help.py` writes it."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from fedlora.cli.main import main

KEPT = Path(__file__).with_name("help.json")
VERBS = ["", "run", "watch", "report", "export", "verify", "replay", "compare", "demo"]
VERBS += ["privacy", "privacy plan", "privacy show", "privacy audit", "deploy"]
VERBS += [f"deploy {verb}" for verb in ("init", "start", "status", "stop", "add-site", "check")]


def shown(verb: str) -> str:
    """What `fedlora VERB --help` prints on a terminal of a hundred columns."""
    with io.StringIO() as out, contextlib.redirect_stdout(out), mock.patch.dict(os.environ, COLUMNS="100"):
        with contextlib.suppress(SystemExit):
            main([*verb.split(), "--help"])
        return out.getvalue()


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="another argparse lays it out otherwise")
@pytest.mark.parametrize("verb", VERBS)
def test_help_is_what_it_was(verb: str) -> None:
    assert shown(verb).splitlines() == json.loads(KEPT.read_text())[verb]


if __name__ == "__main__":
    KEPT.write_text(json.dumps({verb: shown(verb).splitlines() for verb in VERBS}, indent=1) + "\n")
