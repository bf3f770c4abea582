"""Every strategy on one job, over three seeds: 51 runs in runs/algorithms, and a report about them."""

import shlex
import subprocess

COMMANDS = r"""
fedlora run -m strategy=ffalora,rolora,fedsvd,flexlora,hetlora,raflora,flora,fedfold 'ranks=[2,4,8,16]' \
    seed=0,1,2 client.steps=10 evaluate.every=5 hydra.sweep.dir=runs/algorithms/mixed
fedlora run -m strategy=fedit,fedrotlora,fedexlora,federa,slora,fedsalora,fedms,pfedlora seed=0,1,2 \
    client.steps=10 evaluate.every=5 hydra.sweep.dir=runs/algorithms/one
fedlora run -m strategy=privatelora ranks=64 seed=0,1,2 client.steps=10 evaluate.every=5 \
    hydra.sweep.dir=runs/algorithms/private
fedlora report runs/algorithms
"""


def main() -> None:
    """Run the commands one after the other; the first that fails ends it."""
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        print(line, flush=True)
        subprocess.run(shlex.split(line), check=True)


if __name__ == "__main__":
    main()
