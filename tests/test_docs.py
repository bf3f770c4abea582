"""Every Python block of the pages runs as it is printed, in the order of its page, on the tiny model."""

import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow  # whole runs

DOCS = Path(__file__).parents[1] / "docs"
WITH_CODE = [path for path in sorted(DOCS.glob("*.md")) if "```python" in path.read_text("utf-8")]
ELSEWHERE = {"data"}  # loads an adapter from a folder that the reader has


@pytest.mark.parametrize("page", [p for p in WITH_CODE if p.stem not in ELSEWHERE], ids=lambda p: p.stem)
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    module = ModuleType("page")  # as a reader's own file, whose classes can be named
    monkeypatch.setitem(sys.modules, "page", module)
    for block in re.findall(
        r"^```python\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL
    ):
        exec(compile(block, str(page), "exec"), vars(module))


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    notebook = nbformat.read(DOCS / "first.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jupyter about itself
        client.execute()
    said = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("<table>" in str(output.get("data", {}).get("text/html", "")) for output in said)
    assert any("PeftModel" in output.get("text", "") for output in said)


def test_pages_to_extend_fedlora_are_short() -> None:
    for name in (
        "strategy",
        "engine",
        "python",
        "rule",
        "parametrization",
        "scheduler",
        "callback",
        "task",
        "step",
    ):
        assert len((DOCS / f"{name}.md").read_text("utf-8").splitlines()) <= 100
