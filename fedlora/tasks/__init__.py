"""What is learnt, one file a kind: from the columns of a file to losses, metrics and the model's head.

`LearningTask` is the interface. Wherever a task is asked for, an object of your own class does as well as the
name of one of these: see docs/task.md.
"""

from collections.abc import Collection

from fedlora.errors import ConfigError
from fedlora.tasks.base import LearningTask
from fedlora.tasks.classification import Classification
from fedlora.tasks.instruction import Instruction

__all__ = ["TASKS", "Classification", "Instruction", "LearningTask", "learning_task", "task_of_columns"]

TASKS: tuple[LearningTask, ...] = (Classification(), Instruction())


def learning_task(task: LearningTask | str) -> LearningTask:
    """The task of this name, such as "classification"; a task is returned as it is.

    Raises:
        ConfigError: there is none of this name.
    """
    if isinstance(task, LearningTask):
        return task
    for known in TASKS:
        if known.name == task:
            return known
    raise ConfigError(
        f"task: expected {' or '.join(known.name for known in TASKS)}, got {task!r}; an own LearningTask is "
        "given as an object, from Python"
    )


def task_of_columns(roles: Collection[str]) -> LearningTask | None:
    """The task whose columns are these, no more and no fewer; None if there is none."""
    return next((task for task in TASKS if {*task.columns} == {*roles}), None)
