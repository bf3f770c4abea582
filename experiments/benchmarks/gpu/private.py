"""What differential privacy costs a round of several clients at 1B."""

from dataclasses import replace
from functools import partial

from fedlora.privacy import DPSGD

from .bench import Bench
from .rows import CHAT_1K, FIXED, QUESTIONS, ordinary, round_of, tokens

CLIENTS = 8
STEPS = 4
REPEATS = 3
SIZES = (FIXED, CHAT_1K, QUESTIONS)
MOST = 1.25
COLUMNS = ["clients", "a step", "tokens a step", "plain, tokens/s", "private, tokens/s", "private over plain"]
COLUMNS += ["plain, GB", "private, GB"]
# Noise that can be repeated keeps the runs alike. The quick accountant does, since none of it is in a step.
PRIVACY = DPSGD(epsilon=8.0, participations=1, accountant="rdp", insecure_test_seed=0)


def private(bench: Bench) -> None:
    """Section 5: DP-SGD against the same steps without privacy.

    A client has as many rows as a step, so that its Poisson sample is always all of them and both systems
    train on the same rows. Calibration and the test of the model's gradients are done once, in the warm-up.
    """
    base, adapter = bench.model("1B")
    table = bench.report.table(f"DP-SGD at 1B: {STEPS} steps of all clients together", COLUMNS)
    took = 0.0
    for batches in SIZES if bench.judged else SIZES[:1]:
        if bench.left < took:
            bench.report.note(f"{batches.name}: left out, the time is up")
            continue
        before = bench.left
        requests = round_of(base, [adapter] * CLIENTS, batches, 1, not bench.on_gpu)
        plain = ordinary(batches, STEPS)
        secret = replace(plain, privacy=PRIVACY)
        runs = {
            "plain": partial(plain.train, base, requests),
            "private": partial(secret.train, base, requests),
        }
        found = bench.take_turns(runs, REPEATS if bench.judged else 1)
        without, with_it = found["plain"], found["private"]
        count = tokens(requests)[0] * STEPS
        ratio = with_it.median / without.median
        step = round(count / CLIENTS / STEPS)
        rates = without.rates(count), with_it.rates(count)
        table.row(CLIENTS, batches.name, step, *rates, ratio, without.peak, with_it.peak)
        what = f"DP-SGD, {batches.name}: at most {MOST} of the plain step: {ratio:.2f}"
        bench.report.goal(5, what, ratio <= MOST if bench.judged else None)
        took = before - bench.left
