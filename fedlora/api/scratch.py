"""A folder for the files of a run that nobody has asked to keep."""

import shutil
import tempfile
import weakref
from pathlib import Path


class Scratch:
    """A temporary folder that is removed with the last object that holds it, or when Python ends."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fedlora-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)
