"""A folder with two tiny models and two data files, and `palu` run in it."""

import pytest

from tests.support import small
from tests.support.command import palu_in, write_data, write_model


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    for seed, name in enumerate(("model", "other")):
        write_model(folder / name, small.model(small.tokenizer(), seed=seed))
    write_data(folder)
    return folder


@pytest.fixture
def palu(monkeypatch, capsys, work):
    return palu_in(work, monkeypatch, capsys)
