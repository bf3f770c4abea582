from pathlib import Path

import pytest

pytest.register_assert_rewrite("zoo_claims")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the zoo's checkpoints are."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return tmp_path_factory.mktemp("zoo")
