"""Optimizers of the server: what is made of the change that a round's clients have brought."""

from fedlora.server_optimizers.base import ServerOptimizer
from fedlora.server_optimizers.fedadagrad import FedAdagrad
from fedlora.server_optimizers.fedadam import FedAdam
from fedlora.server_optimizers.fedavgm import FedAvgM
from fedlora.server_optimizers.fedyogi import FedYogi

__all__ = ["FedAdagrad", "FedAdam", "FedAvgM", "FedYogi", "ServerOptimizer"]
