"""Fixtures that several tests of data sets and of the bench share."""

from __future__ import annotations

from pathlib import Path

import pytest

from .lineage import write_two
from .small_data import WRITERS


@pytest.fixture(params=WRITERS)
def any_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A good small data set of each kind: (spec, folder)."""
    reader, write = WRITERS[request.param]
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder)
    return f"{reader}:{folder}", folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with runs/first.edgecap and, written later, runs/second.edgecap."""
    return write_two(tmp_path_factory.mktemp("bench"))
