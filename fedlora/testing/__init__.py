"""Checks for authors: does an own strategy keep the promises that the framework relies on?"""

from fedlora.testing.strategy import check_strategy

__all__ = ["check_strategy"]
