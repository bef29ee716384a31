"""Processes of their own, several at once or one, without the seconds that each spends on imports.

One process imports what they need and forks them (`workers/forks.py`); it lives as long as the
test run. What `torchrun` tells its processes they are told here, and their store is this process's
as it is `torchrun`'s. (The launchers themselves: test_readme.py and test_sharding.py.)
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore

from tests.support import ROOT, WORKERS

LOCAL = "127.0.0.1"


@functools.cache
def _forks() -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment |= {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment["TRITON_INTERPRET"] = "1"  # is read by imports, and its processes see no GPU
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    words = [sys.executable, str(WORKERS / "forks.py")]
    started = subprocess.Popen(words, env=environment, cwd=ROOT, **pipes)
    atexit.register(_end, started)
    return started


def _end(started: subprocess.Popen) -> None:
    started.stdin.close()  # it reads to the end
    started.wait(timeout=60)


def run(
    processes: list[tuple[list, dict]], folder: Path, *, limit: int = 400, together: bool = True
) -> tuple[list[int], list[str]]:
    """Run processes at once; return their exit statuses and what each said.

    Args:
        processes: of each the words after `python`, a file or `-m` and a module first, and its own
            variables of the environment.
        folder: where they run.
        limit: seconds after which they are ended, for tests that hang.
        together: end the others where one ends with an error, as launchers do.
    """
    started = _forks()
    common = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    asked, logs = [], []
    for number, (words, own) in enumerate(processes):
        log = Path(folder, f"said-{number}.log")
        log.write_text("", encoding="utf-8")
        logs.append(log)
        one = {"words": [*map(str, words)], "environment": common | own}
        asked.append(one | {"folder": str(folder), "log": str(log)})
    request = {"processes": asked, "limit": limit, "together": together}
    started.stdin.write(json.dumps(request) + "\n")
    started.stdin.flush()
    answer = started.stdout.readline()
    assert answer, "the process that forks others has ended"
    said = [log.read_text(encoding="utf-8", errors="replace") for log in logs]
    for log in logs:
        log.unlink()
    return json.loads(answer), said


def launch(words: list, count: int, folder: Path, **own: str) -> list[str]:
    """Run `python WORDS` as a launcher does, in `count` processes; return what each said."""
    store = TCPStore(LOCAL, 0, is_master=True, wait_for_workers=False)
    common = {"MASTER_ADDR": LOCAL, "MASTER_PORT": str(store.port), "LOCAL_WORLD_SIZE": str(count)}
    common |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    common |= {"WORLD_SIZE": str(count), **own}
    ranks = [common | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(count)]
    status, said = run([(words, rank) for rank in ranks], folder)
    assert not any(status), f"{status}\n" + "\n".join(text[-4000:] for text in said)
    return said
