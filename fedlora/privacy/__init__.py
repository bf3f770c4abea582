"""Differential privacy of a client's records: what is spent, how much noise it takes, whence it comes."""

from fedlora.privacy.ledger import ADJACENCY, UNIT, Entry, Ledger, epsilon, worst
from fedlora.privacy.random import Source
from fedlora.privacy.selftest import self_test
from fedlora.privacy.settings import DPSGD, Mechanism, Plan, calibrate

__all__ = [
    "ADJACENCY",
    "DPSGD",
    "UNIT",
    "Entry",
    "Ledger",
    "Mechanism",
    "Plan",
    "Source",
    "calibrate",
    "epsilon",
    "self_test",
    "worst",
]
