import os

import pytest

from tests.support import small
from tests.support.caches import builder


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Waiting for the disk is most of the time of a small build."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@pytest.fixture(scope="module")
def rows(tok):
    return small.rows(tok)


@pytest.fixture
def build(tok, tmp_path):
    return builder(tok, tmp_path)
