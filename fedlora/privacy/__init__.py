"""Differential privacy of a federated run, for single records or for whole clients.

A randomized mechanism M is (ε, δ)-differentially private if for all neighbouring datasets D and D′ and every
set S of outputs: P[M(D) ∈ S] ≤ e^ε · P[M(D′) ∈ S] + δ (Dwork and Roth, 2014, definition 2.4). What an epsilon
bounds depends on which datasets are neighbouring (the unit and the adjacency) and on what the observer sees
(M). Each ledger names its unit:

- record (`privacy=dp_sgd`). Neighbouring datasets differ by adding or removing one record of one client, and
  the client's number of records is public. M is all that this client sends in the whole run, so the bound
  holds against the server as well. Each client has an epsilon of its own; the largest is reported.
- client (`privacy=client_level`). Neighbouring datasets differ by adding or removing one client with all of
  its records, and the number of clients is public. M is every global model of the run. The bound holds
  against whoever sees the models, but not against the server, which sees the updates.
- contribution (`privacy=client_level secure_sum=true`). Neighbouring datasets differ by replacing all updates
  of one client by zeros (zero-out adjacency, Ponomareva et al., 2023, arXiv:2303.00654). Who takes part and
  who fails is public. M is every global model of the run. The server does not see single updates, but it sees
  the sum of a round before the noise is added.

Epsilon and delta are those of the whole run: all rounds, resumed and repeated ones included. What they do not
cover is listed by `fedlora.runner.privacy_report.not_covered`, and in each run's summary.
"""

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
