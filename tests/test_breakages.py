"""The deliberate faults of `breakages.py` have a place in the code as it is, and tests to notice
them: a fault that is not found would never be tried."""

from pathlib import Path

import pytest

from tests.breakages import FAULTS, noticing, place

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_it_has_a_place_and_tests(fault):
    path = place(ROOT, fault)
    assert path is not None and fault.broken != fault.text
    broken = path.read_text(encoding="utf-8").replace(fault.text, fault.broken)
    compile(broken, str(path), "exec")
    found = {test.stem.removeprefix("test_") for test in noticing(ROOT, fault)}
    assert found == set(fault.tests.split())
