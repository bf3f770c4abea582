"""A hundred, a thousand and ten thousand clients: runs in runs/scale, a curve here."""

import shlex
import subprocess

COMMANDS = r"""
fedlora run data=vader data.partition=iid data.min_rows=1 data.max_rows=null strategy=flexlora \
    "ranks=[2,4,8,16]" client.steps=4 clients_per_round=50 client.batch_size=1 rounds=10 \
    evaluate.every=10 clients=100 out=runs/scale/100
fedlora run data=vader data.partition=iid data.min_rows=1 data.max_rows=null strategy=flexlora \
    "ranks=[2,4,8,16]" client.steps=4 clients_per_round=50 client.batch_size=1 rounds=10 \
    evaluate.every=10 clients=1000 out=runs/scale/1000
fedlora run data=vader data.partition=iid data.min_rows=1 data.max_rows=null strategy=flexlora \
    "ranks=[2,4,8,16]" client.steps=4 clients_per_round=50 client.batch_size=1 rounds=10 \
    evaluate.every=10 clients=10000 out=runs/scale/10000
fedlora run data=vader data.partition=iid data.min_rows=1 data.max_rows=null strategy=flexlora \
    "ranks=[2,4,8,16]" client.steps=4 clients_per_round=50 client.batch_size=4 client.lr=2e-3 rounds=60 \
    evaluate.every=5 clients=1000 out=runs/scale/long
python experiments/studies/curves.py --to experiments/studies/scale \
    "1,000 clients, 50 a round=runs/scale/long"
"""


def main() -> None:
    """Run the commands one after the other; the first that fails ends it."""
    for line in COMMANDS.replace("\\\n", "").strip().splitlines():
        print(line, flush=True)
        subprocess.run(shlex.split(line), check=True)


if __name__ == "__main__":
    main()
