"""Shared by all tests: where the local data lie, and a machine that behaves the same everywhere."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

from vitregs import results

settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("steady")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real weights and pictures; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("VITREGS_SHARED_DATA", results.ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real weights and pictures here: set VITREGS_SHARED_DATA to their folder")
    return folder
