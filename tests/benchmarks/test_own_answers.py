"""What a share of a model's own answers is made of."""

import numpy as np
import pytest

from benchmarks import tables
from benchmarks.quality.own_answers import kept


def test_the_share_of_sure_answers_and_of_sure_tokens():
    before = [-np.log([0.95, 0.95]), -np.log([0.99, 0.2])]
    after = [-np.log([0.76, 0.76]), -np.log([0.495, 0.1])]
    assert kept(before, after, 0.9, "answers") == pytest.approx((1, 0.95, 0.8))
    assert kept(before, after, 0.9, "tokens") == pytest.approx((2, 0.97, 1.255 / 1.94))
    assert kept(before, after, 0.999, "tokens")[0] == 0


def test_rows_of_other_columns_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    for number in (1, 2):
        tables.append(path, [{"a": number, "more": 0}], ["a"])
    assert path.read_text().split() == ["a", "1", "2"]
    with pytest.raises(ValueError, match="has other columns: a"):
        tables.check_header(path, ["a", "b"])
