import pytest

from tests.support import small
from tests.support.caches import builder


@pytest.fixture(scope="module")
def rows(tok):
    return small.rows(tok)


@pytest.fixture
def build(tok, tmp_path):
    return builder(tok, tmp_path)
