from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, and no network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
