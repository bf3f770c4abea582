"""Checks for authors: does an own strategy or task keep the promises that the framework relies on?"""

from fedlora.testing.learning_task import check_learning_task
from fedlora.testing.strategy import check_strategy

__all__ = ["check_learning_task", "check_strategy"]
