"""Benchmarks without a new process for every measurement."""

import contextlib
import io
import json

import pytest

from benchmarks import declare, runner, tables, worker


@pytest.fixture
def in_process(monkeypatch):
    """A function that runs a benchmark in this process: it returns the exit status and the rows
    that were written. Drawing takes longer than a small measurement: `pictures` asks for it."""

    def run(benchmark, path, *options, pictures=False):
        def run_worker(module, task, threads, repo=None):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                worker.work(benchmark, json.loads(json.dumps(task)))
            for line in printed.getvalue().splitlines():
                number, result = json.loads(line)
                yield number, declare.Result(*result)

        monkeypatch.setattr(runner, "run_worker", run_worker)
        if not pictures:
            monkeypatch.setattr(runner.plot, "plot", lambda *given: [])
        given = ["--csv", str(path), "--threads", "1", "--device", "cpu", *options]
        status = runner.main(benchmark, given)
        return status, tables.read(path)

    return run
