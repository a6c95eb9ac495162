"""One small bundle for all tests that only read it, and a private copy for those that spoil it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from edgecap.runtime import Captioner

from .graphs import write_gru_bundle


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gru_bundle(tmp_path_factory.mktemp("bundles") / "tiny.edgecap", seed=3).path


@pytest.fixture
def bundle_copy(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "copy.edgecap"))


@pytest.fixture(scope="session")
def captioner(bundle_path: Path) -> Captioner:
    return Captioner.load(bundle_path, threads=1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Photographs, which are no part of the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("EDGECAP_DATA", root.parent / "shared")) / "data"
    if not (folder / "photos").is_dir():
        pytest.skip(f"no photographs in {folder}; set EDGECAP_DATA to the folder that holds data/")
    return folder
