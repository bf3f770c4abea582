"""Runs sections one after the other, each within its share of the time, whatever becomes of the others."""

import time
from collections.abc import Callable, Mapping

from .bench import GRACE, Bench, broken_off

Section = Callable[[Bench], None]


def run(bench: Bench, sections: Mapping[str, tuple[Section, float]], began: float, end: float) -> None:
    """Run the sections in their order.

    A section that needs less than its share leaves the rest to those that follow. One that begins late has
    half its share all the same, if there is so much. One that overruns by `GRACE` seconds is broken off.

    Args:
        bench: what they share; its report says what becomes of each.
        sections: name -> the section, and its share of the time, in any unit.
        began: when the time began, on the clock of `time.monotonic`.
        end: when it ends.
    """
    whole, due = sum(share for _, share in sections.values()), began
    for name, (section, share) in sections.items():
        seconds = (end - began) * share / whole
        due += seconds
        bench.report.begin(name)
        now = time.monotonic()
        if now >= end:
            bench.report.note(f"{name}: left out, the time is up")
            bench.report.end()
            continue
        bench.until = min(end, max(due, now + seconds / 2))
        try:
            with broken_off(bench.left + GRACE):
                section(bench)
            bench.report.end()
        except Exception as error:
            bench.report.end(error)
        bench.free()
