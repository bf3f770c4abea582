"""What a run left on disk, as tables, pictures and one HTML page; reads files only, never a model."""

from fedlora.report.html import write_report
from fedlora.report.read import Run, read_run
from fedlora.report.tables import Table, runs_table

__all__ = ["Run", "Table", "read_run", "runs_table", "write_report"]
