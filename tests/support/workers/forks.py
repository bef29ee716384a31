"""A process that has imported what workers need and done nothing else, and forks them on request.

Started by `tests/support/ranks.py`, which says why. A request is a line of JSON: processes (words,
environment, folder, log), how long they may take, and whether the end of one ends the others; the
answer is a line with their exit statuses.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import traceback

# what a worker asks for by name or inside functions, too
PRELOADED = (
    "peft",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "palu.cli.app",
    "palu.cli.evaluate",
    "palu.cli.unlearn",
    "palu.evaluation.evaluator",
    "tests.support.workers.in_head",
    "tests.support.workers.sharded",
    "tests.support.workers.vocabulary",
)


def work(words: list[str], environment: dict[str, str], folder: str, log: str, limit: int) -> None:
    """Be the process that `python WORDS` would be, and end."""
    signal.alarm(limit)
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    os.dup2(1, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    status = 1
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if not isinstance(end.code, int | None):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # gloo's threads abort now and then when Python takes the process down


def run(processes: list[dict], limit: int, together: bool) -> list[int]:
    """Return the exit statuses, negative where a signal ended a process."""
    running: dict[int, int] = {}
    for number, process in enumerate(processes):
        child = os.fork()
        if child == 0:
            work(**process, limit=limit)
        running[child] = number
    found = [0] * len(processes)
    while running:
        child, status = os.wait()
        number = running.pop(child)
        found[number] = os.waitstatus_to_exitcode(status)
        if together and found[number]:
            for other in running:
                os.kill(other, signal.SIGKILL)
    return found


def main() -> None:
    for name in PRELOADED:
        __import__(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
