"""Environment of the tests: set before torch and triton are imported, which read it once."""

import gc
import os

# Threads that spin while they wait make a busy machine many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# what a compiler makes of the CPU path's loops has tests of its own (test_cpu_extension.py)
os.environ.setdefault("PALU_CPU_EXTENSION", "0")
if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # Triton's interpreter runs the kernels
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """Let `-n auto` be one process where there is a GPU: some tests fill its memory."""
    return 0 if torch.cuda.is_available() else None


def pytest_collection_finish() -> None:
    """Keep what imports have made out of Python's collector of garbage: the Trainer calls it at the
    start of every training, where it took half of a test's time."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let everything be collected again: extensions complain of what is left at exit."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium; without one the test is skipped, and says so."""
    from tests.support.browser import CHROMIUM, MISSING, chromium

    if CHROMIUM is None:
        pytest.skip(MISSING)
    with chromium() as started:
        yield started
