"""The field's benchmarks beside TOFU, in their own file formats and by their own definitions."""

from palu.evaluation.benchmarks.benchmark import Benchmark
from palu.evaluation.benchmarks.meter import Meter
from palu.evaluation.benchmarks.muse import MUSE
from palu.evaluation.benchmarks.rwku import RWKU
from palu.evaluation.benchmarks.wmdp import WMDP

__all__ = ["BENCHMARKS", "MUSE", "RWKU", "WMDP", "Benchmark", "Meter"]

BENCHMARKS: dict[str, type[Benchmark]] = {one.name: one for one in (MUSE, WMDP, RWKU)}
"""What `--benchmark` names, TOFU left out."""
