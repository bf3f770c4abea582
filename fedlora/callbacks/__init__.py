"""What watches a run and shows it."""

from fedlora.callbacks.base import Callback, RunHandle
from fedlora.callbacks.best_checkpoint import BestCheckpoint
from fedlora.callbacks.csv import CSV
from fedlora.callbacks.early_stopping import EarlyStopping
from fedlora.callbacks.mlflow import MLflow
from fedlora.callbacks.tensorboard import TensorBoard
from fedlora.callbacks.wandb import WandB

__all__ = [
    "CSV",
    "BestCheckpoint",
    "Callback",
    "EarlyStopping",
    "MLflow",
    "RunHandle",
    "TensorBoard",
    "WandB",
]
