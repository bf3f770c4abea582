"""Tables, pictures and an HTML page about finished runs, made from the files in their folders alone."""

from fedlora.report.clients import absences
from fedlora.report.files import write_files
from fedlora.report.page import write_report
from fedlora.report.read import Run, missing, read_run, read_runs
from fedlora.report.seeds import seeds_table
from fedlora.report.tables import Table, runs_table

__all__ = [
    "Run",
    "Table",
    "absences",
    "missing",
    "read_run",
    "read_runs",
    "runs_table",
    "seeds_table",
    "write_files",
    "write_report",
]
