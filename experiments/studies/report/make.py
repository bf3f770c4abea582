"""A report about nine runs, three strategies over three seeds, whose picture is here."""

import shlex
import subprocess

COMMANDS = r"""
fedlora run -m strategy=flexlora,raflora,hetlora "ranks=[2,4,8,16]" client.steps=8 rounds=5 \
    data.test_rows=200 data.alpha=0.3 seed=0,1,2 out=runs/report
fedlora report runs/report
"""


def main() -> None:
    """Run the commands one after the other; the first that fails ends it."""
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        print(line, flush=True)
        subprocess.run(shlex.split(line), check=True)


if __name__ == "__main__":
    main()
