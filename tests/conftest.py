"""Shared fixtures. Shape annotations of the whole package are enforced while tests run."""

from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook("enfilade", "beartype.beartype")

torch.set_num_threads(1)  # xdist runs one worker per core

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real frames beside the project; tests that need it are skipped elsewhere."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the real frames in ../shared/data")
    return SHARED / "data"
