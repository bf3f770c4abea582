"""Six strategies under three degrees of skew: comparisons in runs/heterogeneity, curves here."""

import shlex
import subprocess

COMMANDS = r"""
fedlora compare --to runs/heterogeneity/dirichlet-0.1 experiment=heterogeneity data.alpha=0.1
fedlora compare --to runs/heterogeneity/dirichlet-0.5 experiment=heterogeneity data.alpha=0.5
fedlora compare --to runs/heterogeneity/iid experiment=heterogeneity data.partition=iid
python experiments/studies/curves.py --to experiments/studies/heterogeneity \
    "Dirichlet 0.1=runs/heterogeneity/dirichlet-0.1/runs" \
    "Dirichlet 0.5=runs/heterogeneity/dirichlet-0.5/runs" iid=runs/heterogeneity/iid/runs
"""


def main() -> None:
    """Run the commands one after the other; the first that fails ends it."""
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        print(line, flush=True)
        subprocess.run(shlex.split(line), check=True)


if __name__ == "__main__":
    main()
