"""What a script declares: its benchmark, the providers of each kernel, and the cases."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.machine import not_installed
from benchmarks.tables import Row

# How far off a kernel may be, as `palu_kernels.check` has it: relative, in norm.
CAPS = {"bfloat16": 2**-6, "float16": 2**-9, "float32": 1e-4}
OK, NO_OPERATION, NO_TIME = "ok", "no such operation", "skipped: no time left"
Outputs = dict[str, Tensor]


class Case(NamedTuple):
    """What a provider is measured on; None where a kernel has no such size. `setting` holds what
    else there is to say, `name=value` separated by blanks."""

    kernel: str
    V: int | None  # entries of a row of logits
    D: int | None  # entries of a hidden row
    rows: int
    k: int | None
    dtype: str
    setting: str = ""

    def given(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.setting.split())


class Call(NamedTuple):
    """`run()`: forward plus backward -> what is compared with the truth. `reset()` is called before
    each run, unmeasured: it restores an input that the provider overwrites."""

    run: Callable[[], Outputs | None]
    reset: Callable[[], None] | None = None

    def ready(self) -> Callable[[], Outputs | None]:
        if self.reset is not None:
            self.reset()
        return self.run


@dataclass(frozen=True)
class Provider:
    """`make(case, inputs)` gives the call. `package`: the distribution it comes from;
    `lacks(device)`: why it cannot run there, or None. `rough` names outputs which it is known to
    compute less exactly than allowed: the status says how far they are off, and it is timed.
    `allowed` replaces the benchmark's."""

    make: Callable[[Case, Any], Call]
    package: str | None = None
    lacks: Callable[[torch.device], str | None] = lambda device: None
    rough: Sequence[str] = ()
    allowed: Callable[[Case, str], float] | None = None

    def why_not(self, device: torch.device) -> str | None:
        absent = None if self.package is None else not_installed(self.package)
        return absent or self.lacks(device)


def relative_errors(case: Case, inputs: Any, outputs: Outputs, truth: Outputs) -> dict[str, float]:
    """Return the errors in norm. Infinite where something is missing, too much, or not zero where
    the truth is. A truth that has `rows` is of these rows of the gradient alone."""
    truth = dict(truth)
    rows = truth.pop("rows", None)
    if rows is not None:
        outputs = {"gradient": outputs["gradient"][rows]} if "gradient" in outputs else {}
    errors = {}
    for name in dict.fromkeys([*truth, *outputs]):
        a, b = outputs.get(name), truth.get(name)
        if a is None or b is None or a.shape != b.shape:
            errors[name] = float("inf")
            continue
        off, size = float((a.double() - b).norm()), float(b.norm())
        errors[name] = off / size if size else (float("inf") if off else 0.0)
    return errors


def allowed(case: Case, name: str) -> float:
    return CAPS[case.dtype]


class Result(NamedTuple):
    """What a process measured: the samples of each metric."""

    samples: dict[str, list[float]]
    status: str
    environment: dict[str, Any] | None = None


@dataclass(frozen=True)
class Benchmark:
    """`kernels`: by name their providers, each a `Provider` or the reason why there is none. The
    first provider of a kernel is what the others' ratios are taken of. A benchmark that is no call
    on inputs brings its own `measure` and `prepare`."""

    name: str  # of the script
    description: str
    kernels: Mapping[str, Mapping[str, Provider | str]]
    add_options: Callable[[argparse.ArgumentParser], None]  # those that `cases` reads
    cases: Callable[[argparse.Namespace], list[Case]]
    inputs: Callable[[Case, torch.device], Any] | None = None  # the same every time
    truth: Callable[[Case, Any], Outputs] | None = None  # in float64
    errors: Callable[[Case, Any, Outputs, Outputs], dict[str, float]] = relative_errors
    allowed: Callable[[Case, str], float] = allowed  # for each of the errors
    dtypes: Sequence[str] = ("float32", "bfloat16")
    repeats: int = 3
    calls: int = 5
    axes: Sequence[str] = tables.AXES  # sizes that are an x-axis of the picture
    csv: str = ""  # default: the script's name
    default_kernels: Sequence[str] | None = None
    measure: Callable[[Benchmark, Case, str, dict[str, Any]], Result] | None = None
    prepare: Callable[[Benchmark, Case, dict[str, Any]], None] | None = None
    check: Callable[[list[Row]], list[str]] = lambda rows: []  # what is wrong with all rows
    summary: Callable[[list[Row]], str] = lambda rows: ""  # printed after the tables


def is_bad(status: str) -> bool:
    return status.startswith(("wrong", "failed"))
