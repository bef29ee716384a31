"""The calls of other libraries compute the same task; each is skipped where it is not installed.

Without a GPU their kernels run under Triton's interpreter (`tests/conftest.py`), which
cut-cross-entropy's do not survive.
"""

from importlib import util

import pytest
import torch

from benchmarks import bench_linear as scaling
from benchmarks import bench_ops as logits_ops
from benchmarks import providers as peers
from benchmarks.declare import Case

MODULES = {peers.LIGER: "liger_kernel", peers.CCE: "cut_cross_entropy", peers.FLA: "fla"}
CALLS = [
    (script, name, kernel)
    for script, table in ((logits_ops, peers.ON_LOGITS), (scaling, peers.ON_HIDDEN))
    for name, kernels in table.items()
    for kernel in kernels
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("script", "name", "kernel"), CALLS)
def test_a_peer_computes_the_same(script, name, kernel):
    table = peers.ON_LOGITS if script is logits_ops else peers.ON_HIDDEN
    provider = table[name][kernel]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if provider.package is None:
        if why := provider.why_not(device):
            pytest.skip(why)
    elif util.find_spec(MODULES[provider.package]) is None:
        pytest.skip(f"{provider.package} is not installed")
    elif provider.package == peers.CCE and device.type == "cpu":
        pytest.skip("needs a GPU")
    benchmark = script.BENCHMARK
    case = Case(kernel, 300, 32 if script is scaling else None, 16, None, "float32")
    given = benchmark.inputs(case, device)
    truth = benchmark.truth(case, given)
    call = provider.make(case, given)
    for _ in range(2):  # the second one finds what the first one left
        errors = benchmark.errors(case, given, call.ready()(), truth)
        assert errors.keys() == truth.keys() and max(errors.values()) < 1e-5
