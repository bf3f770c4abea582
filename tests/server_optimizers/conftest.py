"""Two clients' updates of FedIT, and messages for Flower's own strategies."""

from server_lab import identity, lab, noise
