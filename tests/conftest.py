"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real image archives (cifar_fs_test.zip, ...), named by FASTRECYCLE_DATA."""
    folder = os.environ.get("FASTRECYCLE_DATA")
    if not folder:
        pytest.skip("FASTRECYCLE_DATA names no folder of real archives")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTRECYCLE_DATA is no folder: {folder}")
    return Path(folder)
