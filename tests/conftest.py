"""Fixtures that several test files use."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # before any kernel is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# the smallest machine of the checks has two processors, and `-n 2` gives each process one
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

# The same examples in every run, few enough for each change; `--hypothesis-profile=deep` searches.
_ANY = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
settings.register_profile("fast", max_examples=100, derandomize=True, database=None, **_ANY)
settings.register_profile("deep", max_examples=20_000, **_ANY)
settings.load_profile("fast")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of real image archives (cifar_fs_test.zip, ...), named by FASTRECYCLE_DATA."""
    folder = os.environ.get("FASTRECYCLE_DATA")
    if not folder:
        pytest.skip("FASTRECYCLE_DATA names no folder of real archives")
    if not Path(folder).is_dir():
        pytest.skip(f"FASTRECYCLE_DATA is no folder: {folder}")
    return Path(folder)


@pytest.fixture
def poison_empty():
    """Memory that PyTorch hands out uninitialised holds NaN, so that reading it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def one_thread():
    """For networks so small that threads cost more than they save, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_tf32():
    """Full fp32 products and convolutions on a GPU, for comparisons between machines and code."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
