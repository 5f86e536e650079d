"""Shared by all tests: where the local data lie, and a machine that behaves the same everywhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests import NIGHTLY
from vitregs import paths

settings.register_profile("steady", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("steady")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep a module's tests on one worker, as they share fixtures, and those of a chapter; leave out the nightly ones."""
    for item in items:
        if item.get_closest_marker("nightly") and not NIGHTLY:
            item.add_marker(pytest.mark.skip(reason="at night: VITREGS_NIGHTLY=1"))
        chapter = getattr(item, "callspec", None) and item.callspec.params.get("chapter")
        group = chapter if "test_notebooks" in item.nodeid and chapter else item.nodeid.partition("::")[0]
        if not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real weights and images; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("VITREGS_SHARED_DATA", paths.ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real weights and images here: set VITREGS_SHARED_DATA to their folder")
    return folder


@pytest.fixture(scope="module")
def little_to_watch() -> Iterator[None]:
    """Fewer held-out images, so that a look at a network in training takes no time."""
    from vitregs.train import evaluation, loop

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WATCHED", "SCORED", "QUERIES", "BANK"):
            patch.setattr(loop, name, 16)
        patch.setattr(evaluation, "PROBED", 48)
        yield
