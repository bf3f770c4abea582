"""Seventeen tasks as clients, a file each: P3 templates in the form that `data=files` reads.

    python experiments/studies/instructions/make.py SOURCE TARGET

SOURCE holds one .jsonl file a task with `prompt` and `completion`, as data/finetuning/t0_train_50k/
data_per_template of https://github.com/yizhongw/self-instruct does; files of another form are left out.
TARGET gets train/TASK.jsonl and test/TASK.jsonl with `prompt` and `response`. Some tasks have a prompt more
than once, with other responses: no prompt of the test rows is in the training rows. What to run on it:
experiments/conf/experiment/instructions.yaml.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fedlora.seeds import generator

TEST, TRAIN = 20, 180  # rows of a task: so many for the test, and at most so many to train on
SEED = 0
END = "<|endoftext|>"  # which a completion ends in

Pairs = list[tuple[str, str]]


def read(path: Path) -> Pairs:
    """Prompts and responses of one task; none of a file that has another form."""
    records = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
    if not all({"prompt", "completion"} <= record.keys() for record in records):
        return []
    return [(r["prompt"].strip(), r["completion"].strip().removesuffix(END).strip()) for r in records]


def cut(pairs: Pairs, task: int) -> tuple[Pairs, Pairs]:
    """Training and test rows of the task with this number, drawn from its own generator."""
    order = [pairs[i] for i in generator(SEED, "instructions", task).permutation(len(pairs))]
    held = dict(list(dict(order).items())[:TEST])  # one response for each of so many prompts
    return [pair for pair in order if pair[0] not in held][:TRAIN], list(held.items())


def write(path: Path, pairs: Pairs) -> None:
    """A JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"prompt": a, "response": b}, ensure_ascii=False) + "\n" for a, b in pairs)
    path.write_text("".join(lines), "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the tasks' files, and say how many rows each has."""
    parser = argparse.ArgumentParser(description="P3 tasks as the files of natural clients.")
    parser.add_argument("source", type=Path, help="a folder of .jsonl files with prompt and completion")
    parser.add_argument("target", type=Path, help="the folder that gets train/ and test/")
    given = parser.parse_args(argv)
    for number, file in enumerate(sorted(given.source.glob("*.jsonl"))):
        pairs = read(file)
        if not pairs:
            print(f"{file.stem}: left out, it has no prompt and completion")
            continue
        train, test = cut(pairs, number)
        write(given.target / "train" / file.name, train)
        write(given.target / "test" / file.name, test)
        print(f"{file.stem}: {len(train)} training rows, {len(test)} test rows")


if __name__ == "__main__":
    main()
