"""Differential privacy of records and of clients: what is spent, how much noise it takes, whence it comes."""

from fedlora.privacy.ledger import ADJACENCY, Entry, Ledger, epsilon, worst
from fedlora.privacy.plan import Mechanism, Plan, calibrate
from fedlora.privacy.random import Source
from fedlora.privacy.selftest import self_test
from fedlora.privacy.settings import DPSGD, ClientLevel, Privacy

__all__ = [
    "ADJACENCY",
    "DPSGD",
    "ClientLevel",
    "Entry",
    "Ledger",
    "Mechanism",
    "Plan",
    "Privacy",
    "Source",
    "calibrate",
    "epsilon",
    "self_test",
    "worst",
]
