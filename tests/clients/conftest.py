"""The packaged tiny model, and rows for it."""

from pathlib import Path
from typing import Any

import pytest

from fedlora.models import Base, load
from fedlora.models.packaged import tiny


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        folder: Any = Path(tiny())
    return load(folder, "classification", ("x", "y"))
