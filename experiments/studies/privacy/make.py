"""Accuracy against epsilon: 36 runs into runs/epsilon and runs/no-privacy, and one report about them."""

import shlex
import subprocess

COMMANDS = r"""
fedlora run -m experiment=epsilon privacy.epsilon=1,3,8 seed=0,1,2 out=runs/epsilon
fedlora run -m experiment=epsilon privacy=none seed=0,1,2 out=runs/no-privacy
fedlora report runs/epsilon runs/no-privacy
"""


def main() -> None:
    """Run the commands one after the other; the first that fails ends it."""
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        print(line, flush=True)
        subprocess.run(shlex.split(line), check=True)


if __name__ == "__main__":
    main()
