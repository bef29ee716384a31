"""`benchmarks.static`: what is counted without a clock."""

import re

import pytest

from benchmarks.static import calls


def test_calls_of_a_training_step_are_counted(capsys):
    with pytest.raises(SystemExit, match="0"):
        calls.main(["--help"])
    assert "usage: " in capsys.readouterr().out
    assert calls.main([]) == 0
    numbers = [int(n) for n in re.findall(r"(\d+) \w", capsys.readouterr().out)]
    total, named, functions, files, depth, _, reads = numbers
    assert 300 >= total >= named >= functions > files > 3
    assert depth > 3
    assert reads <= 3
