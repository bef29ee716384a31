"""A process that measures: the first call is compared with the truth, the others are timed."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.declare import OK, Benchmark, Call, Case, Outputs, Provider, Result, is_bad
from benchmarks.machine import environment
from benchmarks.timing import AllocatorPeak, PeakMemory, Times, device_times, timed

PREPARE = ""  # stands for a provider: the worker that computes the truth
DEVICE_LOST = 3  # exit status: reported, but nothing can run here any more
STUCK = 60  # seconds after which a measurement with a time limit is given up, with its process
STUCK_CASE = 300  # the same of a case whose providers take turns, compiling included


def work(benchmark: Benchmark, task: dict[str, Any]) -> None:
    """Print, a JSON line each, the position of a measurement in the task's list and its result;
    begin none after `task["seconds"]`."""
    if task["in_turns"]:
        work_in_turns(benchmark, task)
        return
    start = time.monotonic()
    measure = benchmark.measure or measure_call
    for number, (values, provider) in enumerate(task["measurements"]):
        if task["seconds"] is not None:
            if time.monotonic() - start > task["seconds"]:
                return
            faulthandler.dump_traceback_later(STUCK, exit=True)
        case = Case(*values)
        try:
            if provider == PREPARE:
                (benchmark.prepare or prepare_truth)(benchmark, case, task)
                result = Result({}, OK)
            else:
                result = measure(benchmark, case, provider, task)
        except Exception as error:  # whatever it is, the others have their turn
            result = _failed(provider, error)
        print(json.dumps([number, result]), flush=True)
        if torch.device(task["device"]).type != "cpu":
            _go_on(torch.device(task["device"]))
    faulthandler.cancel_dump_traceback_later()


def _failed(provider: str, error: Exception) -> Result:
    logging.getLogger(__name__).error("%s failed", provider, exc_info=error)
    said = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return Result({}, f"failed: {said}"[:300])


def work_in_turns(benchmark: Benchmark, task: dict[str, Any]) -> None:
    """Do `work` case by case: the providers of a case, neighbours in the task's list, take turns
    call by call."""
    start, first = time.monotonic(), 0
    for values, keys in groupby(task["measurements"], lambda key: key[0]):
        names = [name for _, name in keys]
        if task["seconds"] is not None:
            if time.monotonic() - start > task["seconds"]:
                return
            faulthandler.dump_traceback_later(STUCK_CASE, exit=True)
        for number, result in enumerate(measure_in_turns(benchmark, Case(*values), names, task)):
            print(json.dumps([first + number, result]), flush=True)
        first += len(names)
        gc.collect()
    faulthandler.cancel_dump_traceback_later()


def _go_on(device: torch.device) -> None:
    """Give memory back; where a kernel has broken the device's context, end this process."""
    gc.collect()
    try:
        torch.accelerator.synchronize(device)
        torch.accelerator.empty_cache()
    except RuntimeError as failure:
        print(failure, file=sys.stderr)
        sys.exit(DEVICE_LOST)


def prepare_truth(benchmark: Benchmark, case: Case, task: dict[str, Any]) -> None:
    truth = benchmark.truth(case, benchmark.inputs(case, torch.device(task["device"])))
    tensors = {name: tensor.contiguous() for name, tensor in truth.items()}
    save_file(tensors, Path(task["folder"]) / "truth.safetensors")


_last_truth: dict[Case, Outputs] = {}


def _truth(benchmark: Benchmark, case: Case, inputs: Any, task: dict[str, Any]) -> Outputs:
    """The truth that another process left, or, in a process for all, one computed here."""
    if task["folder"] is not None:
        return load_file(Path(task["folder"]) / "truth.safetensors", device=task["device"])
    if case not in _last_truth:
        _last_truth.clear()
        _last_truth[case] = benchmark.truth(case, inputs)
    return _last_truth[case]


def measure_call(benchmark: Benchmark, case: Case, name: str, task: dict[str, Any]) -> Result:
    """Measure a provider in this process."""
    device = torch.device(task["device"])
    inputs = benchmark.inputs(case, device)
    call, result = first_call(benchmark, case, name, inputs, task)
    samples = result.samples
    if result.status.startswith("wrong"):
        return result
    run = call.ready()
    with PeakMemory(device) as peak:
        run()
    samples |= {"peak_bytes": [peak.extra], "bytes_before": [peak.before]}
    if device.type == "cpu" and task["repeat"] == 0:  # the same number every time
        samples["allocated_bytes"] = [allocated_by(call)]
    times = [timed(call.ready(), device)[1] for _ in range(task["calls"])]
    samples |= _seconds(times, device)
    if device.type != "cpu" and task["calls"]:
        of_device, of_host = device_times(call, device, task["calls"])
        samples |= {"device_seconds": of_device, "host_seconds": of_host}
    return result


def measure_in_turns(
    benchmark: Benchmark, case: Case, names: Sequence[str], task: dict[str, Any]
) -> list[Result]:
    """Measure the providers `names` of a case in this process: of each the first call, then
    `task["calls"]` rounds in which every provider has one call, each round starting with the next
    provider."""
    device = torch.device(task["device"])
    results, calls = {}, {}
    try:
        inputs = benchmark.inputs(case, device)
    except Exception as error:
        return [_failed(name, error) for name in names]
    for name in names:
        try:
            if task["warm_up"]:
                benchmark.kernels[case.kernel][name].make(case, inputs).ready()()
                results[name] = Result({}, OK)
                continue
            call, results[name] = first_call(benchmark, case, name, inputs, task)
            if is_bad(results[name].status):
                continue
            if device.type == "cpu" and task["repeat"] == 0:
                results[name].samples["allocated_bytes"] = [allocated_by(call)]
            calls[name] = call
        except Exception as error:
            results[name] = _failed(name, error)
    times: dict[str, list[Times]] = {name: [] for name in calls}
    for _, name in turns(list(calls), task["calls"]):
        times[name].append(timed(calls[name].ready(), device)[1])
    for name, own in times.items():
        results[name].samples.update(_seconds(own, device))
    return [results[name] for name in names]


def first_call(
    benchmark: Benchmark, case: Case, name: str, inputs: Any, task: dict[str, Any]
) -> tuple[Call, Result]:
    """Return a provider's call, and what its first run shows: how far off it is."""
    device = torch.device(task["device"])
    provider = benchmark.kernels[case.kernel][name]
    call = provider.make(case, inputs)
    with _logged_choice() as samples:
        outputs = call.ready()()
    status = OK
    if outputs is not None:  # a floor has none
        errors = benchmark.errors(case, inputs, outputs, _truth(benchmark, case, inputs, task))
        samples |= {f"{output}_error": [error] for output, error in errors.items()}
        samples |= {key: [float(t)] for key, t in outputs.items() if t.ndim == 0}
        status = _judge(errors, case, provider, provider.allowed or benchmark.allowed)
    return call, Result(samples, status, environment(device, provider.package))


def allocated_by(call: Call) -> int:
    run = call.ready()
    with AllocatorPeak() as peak:
        run()
    return peak.extra


def _seconds(times: Sequence[Times], device: torch.device) -> dict[str, list[float]]:
    samples = {"seconds": [one.wall for one in times]}
    if device.type == "cpu":
        samples["cpu_seconds"] = [one.process for one in times]
    return samples


def _judge(
    errors: dict[str, float],
    case: Case,
    provider: Provider,
    limit_of: Callable[[Case, str], float],
) -> str:
    limits = {name: limit_of(case, name) for name in errors}
    wrong = {
        name: f"{name} off by {error:.1e}, more than {limits[name]:.1e}"
        for name, error in errors.items()
        if not error <= limits[name]  # a NaN too
    }
    if not wrong:
        return OK
    kind = "rough" if set(wrong) <= set(provider.rough) else "wrong"
    return f"{kind}: {'; '.join(wrong.values())}"


@contextlib.contextmanager
def _logged_choice() -> Iterator[dict[str, list[float]]]:
    """Collect `sparse`, 1 or 0, where the kernels log which implementation their cost model chose
    for a loss on hidden rows."""
    samples: dict[str, list[float]] = {}

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            words = record.getMessage().split()
            if words and words[0] in ("sparse", "dense"):
                samples["sparse"] = [float(words[0] == "sparse")]

    logger, handler = logging.getLogger("palu_kernels"), Handler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield samples
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def turns(providers: Sequence[str], repeats: int) -> Iterator[tuple[int, str]]:
    """Yield (repeat, provider): in every repeat all providers, starting with the next one each
    time."""
    for repeat in range(repeats):
        first = repeat % max(len(providers), 1)
        for provider in [*providers[first:], *providers[:first]]:
            yield repeat, provider
