"""Epsilon by the ledger against Google's dp-accounting, for ten histories.

    pip install dp-accounting && python experiments/studies/privacy/accountants.py

The ledger's bounds are Opacus' PRV and Renyi accountants; dp-accounting's are its privacy loss distribution,
the tightest that there is, and its own Renyi accountant.
"""

import logging

import dp_accounting  # type: ignore[import-not-found,import-untyped]
from dp_accounting import pld, rdp

from fedlora.privacy import Entry, epsilon

DELTA = 1e-5
HISTORIES = [
    [(1.0, 0.01, 1000)],
    [(1.0, 0.1, 100)],
    [(0.7, 0.05, 300)],
    [(2.0, 0.25, 400)],
    [(4.0, 1.0, 50)],
    [(1.0, 1.0, 1)],
    [(1.1, 256 / 60000, 14062)],
    [(1.0, 0.05, 200), (1.5, 0.08, 300)],
    [(0.99, 0.125, 60)],
    [(2.363, 0.05, 1000)],
]


def main() -> None:
    """Compute and print a table in Markdown."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    print("| sigma, q, steps | ledger (PRV) | dp-accounting (PLD) | ledger (RDP) | dp-accounting (RDP) |")
    print("|---|--:|--:|--:|--:|")
    for history in HISTORIES:
        events = [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), steps
            )
            for sigma, q, steps in history
        ]
        theirs = []
        for accountant in (pld.PLDAccountant(), rdp.RdpAccountant()):
            accountant.compose(dp_accounting.ComposedDpEvent(events))
            theirs.append(accountant.get_epsilon(DELTA))
        entries = tuple(Entry(*step) for step in history)
        ours = [epsilon(entries, DELTA, "prv"), epsilon(entries, DELTA, "rdp")]
        steps_text = "; ".join(f"{sigma:g}, {q:.4g}, {steps}" for sigma, q, steps in history)
        print(
            f"| {steps_text} | {ours[0]:.4f} | {theirs[0]:.4f} | {ours[1]:.4f} | {theirs[1]:.4f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
