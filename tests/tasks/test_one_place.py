"""What is learnt is told apart in fedlora/tasks alone; all else asks the task."""

import ast
from pathlib import Path

import pytest

from fedlora.errors import ConfigError
from fedlora.tasks import TASKS, Classification, Instruction, learning_task, task_of_columns

ROOT = Path(__file__).parents[2]
ROOTS = ("fedlora", "strategies", "clients", "experiments")
FILES = [
    p for root in ROOTS for p in sorted((ROOT / root).rglob("*.py")) if "fedlora/tasks" not in p.as_posix()
]
NAMES = {task.name for task in TASKS}
CLASSES = {type(task).__name__ for task in TASKS}


def suspects(node: ast.AST) -> bool:
    """Whether code tells tasks apart here: by a comparison, a pattern, a look-up or a class."""
    inside = [*ast.walk(node)]
    strings = {n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    if isinstance(node, ast.Compare | ast.match_case):
        return bool(strings & NAMES)
    if isinstance(node, ast.Dict):
        keys = {k.value for k in node.keys if isinstance(k, ast.Constant)}
        return len(keys & NAMES) == len(NAMES)
    called = (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("isinstance", "issubclass")
    )
    return called and any(isinstance(n, ast.Name) and n.id in CLASSES for n in inside)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_other_file_compares_what_is_learnt(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"))
    found = [node.lineno for node in ast.walk(tree) if suspects(node)]
    assert not found, f"{path.relative_to(ROOT)} tells tasks apart at lines {found}: ask the task itself"


@pytest.mark.parametrize(
    "code",
    [
        "kind == 'instruction'",
        "x in ('classification',)",
        "isinstance(task, Classification)",
        "{'classification': 1, 'instruction': 2}[kind]",
        "match x:\n case 'instruction': pass",
    ],
)
def test_the_test_above_sees_a_comparison(code: str) -> None:
    assert any(suspects(node) for node in ast.walk(ast.parse(code)))


def test_a_name_is_looked_up_and_a_task_stays_as_it_is() -> None:
    assert [learning_task(task.name) for task in TASKS] == [Classification(), Instruction()]
    task = Instruction()
    assert learning_task(task) is task
    with pytest.raises(ConfigError, match="expected classification or instruction, got 'chat'"):
        learning_task("chat")


def test_columns_decide_where_they_leave_no_doubt() -> None:
    assert task_of_columns(("label", "text")) == Classification()
    assert task_of_columns(["prompt", "response"]) == Instruction()
    assert task_of_columns(["text"]) is task_of_columns(["text", "label", "prompt"]) is None


def test_equal_tasks_share_what_a_process_loads() -> None:
    assert Classification() == Classification() != Instruction()
    assert hash(Classification()) == hash(Classification())
