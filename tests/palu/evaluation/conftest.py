import pytest

from tests.support import tofu_small


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder with a model, TOFU's files and a holdout file."""
    return tofu_small.build(tmp_path_factory.mktemp("tofu"))


@pytest.fixture
def palu(work, monkeypatch, capsys):
    """Runs `palu evaluate` there: (exit status, stdout, stderr)."""
    return tofu_small.evaluate_in(work, monkeypatch, capsys)
