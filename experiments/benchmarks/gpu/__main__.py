"""Many clients' adapters on one GPU: is it right, how fast is it, and how much memory does it take?

    python -m experiments.benchmarks.gpu [--minutes 8] [--out DIR] [--tiny] [--section NAME ...]

It runs unattended on one NVIDIA GPU. It needs torch, transformers, peft and fedlora's own dependencies, and
no network: all weights and tokens are random. fedlora must be installed, which a bare machine does without a
network by `pip install --no-deps --no-build-isolation -e .`. Every table is printed as soon as it is known,
row by row. All that is printed is also in DIR/gpu.txt, and after every section DIR/gpu.json has all numbers.

Each section has a share of the minutes. It leaves out what does not fit, says so, and is broken off if it
overruns. A section that fails says so in one line, its traceback is in the JSON, and the others go on. The
most telling come first. After each table it says which goals are met; they are numbered as below.

- card: the card and versions; what it can do at most, a large bf16 matrix product and a copy.
- parity (goal 4), on small BERT, Llama, Qwen3 and GPT-2 models, clients of three ranks, ten steps of SGD:
  float32 on the device equals the CPU's to 1e-4, and clients together equal one by one; in bfloat16 clients
  together are as near to float32 as one by one; plain PEFT gives the exported adapter's logits; a round
  repeated has the same hash, or torch names the operation that forbids it. A column says how fedlora feeds
  the model. Differences are relative to how far a tensor has moved.
- speed-1b, speed-8b (goals 2 and 3): a round of 8 clients at the shapes of Llama-3.2-1B and Llama-3.1-8B in
  bfloat16, rank 16 on all linear layers, beside a good sequential PEFT loop (`peft_loop.py`) in turns. A step
  of a client is 4 rows of 64 tokens, 4 chats (about 1,000 tokens) or 32 chats (about 8,000). Goal 2 is at
  least 1.5, 1.2 and 0.97 times the loop's tokens a second; goal 3 is 45 % of the card's peak at 1B and 55 %
  at 8B. Tokens are all real tokens of rows, never padding. The share of the peak counts 4 FLOP for each
  token and weight it meets; see `shapes.operations`.
- memory (goal 1): 64 clients of rank 16 at 8B need at most base, factors, gradients, optimizer state and
  activations, and 10 % more; and they fit 80 GB.
- step: a profile of one step at 1B: launches, waits of the host and their places, the operations that take
  most time. No wait inside a step is what goal 2 asks for.
- private (goal 5): DP-SGD takes at most 1.25 of the same steps without privacy.
- clients-1b, clients-8b (goal 2): 16, 1 and 4 clients, never below 0.97 times the loop; short questions.
- flower (goal 2): Flower's simulation at 1B, each client on a fraction of the GPU, where Flower and Ray are
  installed; elsewhere it says that it is left out.

Without a GPU, and with --tiny, the two large models have tiny shapes. That tries the same code. Parity is
judged then, too; speed and memory are not.
"""

import argparse
import os
import time
from pathlib import Path

STARTED = time.monotonic()
# Steps of different lengths leave gaps that no later tensor fits; for all systems alike.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from .bench import Bench  # noqa: E402
from .card import card  # noqa: E402
from .flower import flower  # noqa: E402
from .memory import memory  # noqa: E402
from .one_step import one_step  # noqa: E402
from .parity import parity  # noqa: E402
from .private import private  # noqa: E402
from .report import Report  # noqa: E402
from .sections import Section, run  # noqa: E402
from .throughput import clients_1b, clients_8b, speed_1b, speed_8b  # noqa: E402

# In order, with the share of the minutes.
SECTIONS: dict[str, tuple[Section, float]] = {
    "card": (card, 0.03),
    "parity": (parity, 0.13),
    "speed-1b": (speed_1b, 0.14),
    "speed-8b": (speed_8b, 0.22),
    "memory": (memory, 0.08),
    "step": (one_step, 0.07),
    "private": (private, 0.08),
    "clients-1b": (clients_1b, 0.08),
    "flower": (flower, 0.10),
    "clients-8b": (clients_8b, 0.07),
}


def main() -> None:
    """Run the sections."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all sections together")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="where gpu.txt and gpu.json go")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a GPU, too")
    parser.add_argument("--section", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    given = parser.parse_args()
    torch.set_float32_matmul_precision("highest")  # no TF32, also where a release makes it the default
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)  # a profile sees the main thread alone
    about = {"minutes": given.minutes, "device": device, "tiny": given.tiny or device == "cpu"}
    report = Report(given.out, about)
    bench = Bench(device, given.tiny or device == "cpu", report)
    chosen = {name: SECTIONS[name] for name in SECTIONS if name in {"card", *given.section}}
    run(bench, chosen, STARTED, STARTED + 60 * given.minutes)
    report.say(f"\n{time.monotonic() - STARTED:.0f} s in all; see {given.out}/gpu.json")


if __name__ == "__main__":
    main()
