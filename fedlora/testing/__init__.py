"""Checks for authors: does your own code keep the promises that the framework relies on?"""

from fedlora.testing.learning_task import check_learning_task
from fedlora.testing.parametrization import check_parametrization
from fedlora.testing.rule import check_rule
from fedlora.testing.strategy import check_strategy

__all__ = ["check_learning_task", "check_parametrization", "check_rule", "check_strategy"]
