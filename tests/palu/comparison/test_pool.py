"""Processes of runs: they import what the process that starts them imports."""

import colorsys  # any module that nothing has imported yet
import os
import subprocess
import sys

SCRIPT = """
import importlib.util, os
from palu.comparison import pool
pool.PRELOADED = ("colorsys",)
if __name__ == "__main__":
    print(pool.call(importlib.util.find_spec, "colorsys").origin)
    print(pool.call(os.getcwd), pool.call(os.getenv, "PYTHONPATH") == os.getenv("PYTHONPATH"))
"""


def test_nothing_is_imported_from_the_current_folder(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    (tmp_path / "here" / "colorsys.py").write_text("")
    script = tmp_path / "there" / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split("\n")[:2] == [colorsys.__file__, f"{tmp_path / 'here'} True"], done
