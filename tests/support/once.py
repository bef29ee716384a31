"""What costs much is made by one of pytest-xdist's workers, and read by the others."""

import fcntl
import json
import os
import shutil


def once(factory, name, make):
    """Return a folder and what `make(folder)` returns (JSON), of all workers of a test run.

    Args:
        factory: pytest's `tmp_path_factory`.
        name: of the folder; one thing has one name in a run.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, result = base / name, base / f"{name}.json"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            text = json.dumps(make(folder))
            result.write_text(text, encoding="utf-8")
    return folder, json.loads(result.read_text(encoding="utf-8"))
