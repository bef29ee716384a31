"""The compiled loops of the CPU path, where there is a C compiler; and what serves without them."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from palu_kernels import cpu, kl_loss, local_entropy_loss, reference, topk_indices, torch_backend
from palu_kernels.check.__main__ import KINDS, cases, compare
from palu_kernels.cpu import build, extension, verify
from tests.palu_kernels import test_eager, test_masked_rows, test_offset, test_operators

CPU = torch.device("cpu")
CASES = list(cases(quick=True))
compilers = [name for name in ("cc", "gcc", "clang") if shutil.which(name)]
needs_compiler = pytest.mark.skipif(not compilers, reason="there is no C compiler")


def fresh(patch, **environment):
    """Let the next operator decide anew what serves."""
    for name, value in environment.items():
        patch.setenv(name, value)
    extension._open.cache_clear()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A cache in which the loops lie."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        fresh(patch, PALU_CPU_EXTENSION="1", XDG_CACHE_HOME=str(folder))
        assert cpu.served_by().startswith("compiled loops")
        yield folder
    extension._open.cache_clear()


@pytest.fixture
def loops(built, monkeypatch):
    """Compiled loops serve."""
    fresh(monkeypatch, PALU_CPU_EXTENSION="1", XDG_CACHE_HOME=str(built))
    yield extension._open()[0]
    extension._open.cache_clear()


@pytest.fixture
def again(monkeypatch):
    """Whatever a test sets in the environment is read, and forgotten after it."""
    monkeypatch.delenv("PALU_CPU_EXTENSION", raising=False)
    extension._open.cache_clear()
    yield monkeypatch
    extension._open.cache_clear()


@needs_compiler
@pytest.mark.parametrize("kind", KINDS)
def test_accuracy(loops, kind):
    for case in CASES:
        if case.kind == kind:
            for result in compare(case, CPU, "torch"):
                assert result.passed, result


@needs_compiler
def test_the_operators_use_them(loops, monkeypatch):
    used = []
    monkeypatch.setattr(
        extension.Loops, "__call__", lambda self, kind, **_: used.append(kind) or 1 / 0
    )
    for name in test_operators.NAMES:
        with pytest.raises(ZeroDivisionError):
            test_operators.losses(*test_operators.inputs(3)[1:])[name](
                test_operators.inputs(3)[0], "torch"
            )
    with pytest.raises(ZeroDivisionError):
        topk_indices(torch.randn(2, 9), 3, backend="torch")
    assert set(used) == set(extension.Loops.KINDS)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_indices_are_checked(loops, dtype):
    z = torch.randn(2, 30)
    for last, message in ((30, "holds 30"), (-1, "holds -1"), (4, "unique")):
        indices = torch.tensor([[7, 4, 29], [3, 4, last]], dtype=dtype)
        with pytest.raises(ValueError, match=message):
            local_entropy_loss(z, indices=indices, top_k=3)
    local_entropy_loss(z, indices=indices[:1].repeat(2, 1), top_k=3)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cap", [None, test_eager.CAP])
def test_in_place(loops, cap, dtype):
    for kind in test_eager.KINDS:
        test_eager.test_losses_and_gradients(kind, cap, dtype)
    test_eager.test_without_gradient_the_chunk_stays()


@needs_compiler
@pytest.mark.parametrize("name", test_operators.NAMES)
def test_what_operators_owe(loops, name):
    for shape, columns in test_operators.SHAPES:
        test_operators.test_rows_of_any_stride(name, "torch", shape, columns)
    for shape in ((0,), (2, 0)):
        test_operators.test_no_rows(name, "torch", shape)
    test_operators.test_nothing_of_the_callers_is_overwritten(name, "torch")
    for reduction in ("mean", "sum"):
        test_operators.test_reductions(name, "torch", reduction)


@needs_compiler
def test_masked_rows_and_nan(loops):
    test_masked_rows.test_on_logits("torch", torch.float32)


@needs_compiler
def test_rows_far_from_0(loops):
    """Backward reads a mean in two numbers."""
    test_offset.test_an_offset_changes_nothing("global_mean", "torch")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_topk_is_exact(loops, dtype):
    for k in (1, 7, 256, 257, 300):
        if dtype != torch.float16:
            test_eager.test_topk_is_exact(dtype, k)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 9001, generator=generator).mul(300).to(dtype)
    scores[1] = scores[1].div(100).round()
    scores[2, ::2] = -torch.inf
    scores[3, 8999:] = torch.nan
    for k in (1, 50, 280, 290, 5000, 9000):  # few and many, beside the number of maxima
        found = topk_indices(scores, k, backend="torch")
        assert torch.equal(found, reference.topk_indices(scores, k))


@needs_compiler
@pytest.mark.parametrize("name", test_operators.NAMES)
def test_the_number_of_threads_changes_nothing(loops, name):
    """Rows are handed out one by one."""
    z, ref, labels, indices = test_operators.inputs(40, columns=3001)
    made, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            x = z.clone().requires_grad_()
            rows = test_operators.losses(ref, labels, indices)[name](x, "torch")
            rows.sum().backward()
            made.append((rows.detach(), x.grad))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])


@needs_compiler
def test_threads_are_those_of_pytorch(loops):
    runtimes = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        if os.path.basename(line.split()[-1]).startswith(("libgomp", "libomp", "libiomp"))
    }
    assert loops.parallel and len(runtimes) == 1


@needs_compiler
def test_float64_is_left_to_pytorch(loops):
    z = torch.randn(3, 50, dtype=torch.float64)
    assert cpu.loops_for(z) is None and cpu.loops_for(z.float()) is loops
    assert cpu.loops_for(z.float().t()) is None
    with torch._subclasses.FakeTensorMode():
        assert cpu.loops_for(torch.empty(3, 50)) is None


@needs_compiler
@pytest.mark.parametrize("kind", extension.Loops.KINDS)
def test_loops_that_differ_are_refused(again, built, kind):
    """One number that is not right in one operator."""
    again.setenv("XDG_CACHE_HOME", str(built))
    true = extension.Loops.__call__

    def wrong(self, called, **values):
        true(self, called, **values)
        if called == kind and kind == "topk":
            values["chosen"][4, 3] += 1
        elif called == kind and kind == "indices":
            values["bad"][0] = 1
        elif called == kind and values.get("grad") is not None:
            values["grad"][4, 7] = 0.5

    again.setattr(extension.Loops, "__call__", wrong)
    with pytest.warns(RuntimeWarning, match="differ from the definition"):
        assert cpu.served_by().startswith("plain PyTorch")
    assert cpu.loops_for(torch.randn(2, 9)) is None


@needs_compiler
def test_a_broken_library_is_built_again(again, built, tmp_path):
    again.setenv("XDG_CACHE_HOME", str(tmp_path))
    (library,) = (built / "palu_kernels").glob("*.so")
    compiled = []

    def put(path, content):
        path.unlink()  # or what is loaded would change too
        path.write_bytes(content)

    def compile_(compiler, folder):
        compiled.append(folder)
        return shutil.copy(library, folder / "rows.so") and folder / "rows.so"

    again.setattr(build, "_compile", compile_)
    assert cpu.served_by().startswith("compiled loops") and len(compiled) == 1
    (cached,) = (tmp_path / "palu_kernels").iterdir()
    assert cached.name == library.name
    extension._open.cache_clear()
    assert cpu.served_by().startswith("compiled loops") and len(compiled) == 1
    put(cached, cached.read_bytes()[:5000])
    extension._open.cache_clear()
    assert cpu.served_by().startswith("compiled loops") and len(compiled) == 2
    assert cached.read_bytes() == library.read_bytes()
    # a folder that others may write to is neither read nor written
    put(cached, b"")
    cached.parent.chmod(0o777)
    extension._open.cache_clear()
    assert cpu.served_by().startswith("compiled loops") and len(compiled) == 3
    assert cached.parent not in compiled[-1].parents and not cached.read_bytes()


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PALU_CPU_EXTENSION": "0"}, "PALU_CPU_EXTENSION is 0"),
        ({"CC": "false"}, "failed"),
        ({"CC": "/nowhere/cc"}, "does not run"),
        ({"CC": "/home/o'neil/cc"}, "No closing quotation"),
        ({"CC": "", "PATH": ""}, "no C compiler"),
    ],
    ids=str,
)
def test_without_them_pytorch_serves(again, tmp_path, recwarn, environment, reason):
    fresh(again, XDG_CACHE_HOME=str(tmp_path), **environment)
    z, r = torch.randn(2, 40), torch.randn(2, 40)
    found = kl_loss(z, r, reduction="none", backend="torch")
    torch.testing.assert_close(found, reference.kl_loss(z, r))
    assert cpu.served_by().startswith("plain PyTorch") and reason in cpu.served_by()
    assert not [str(warning.message) for warning in recwarn]
    assert not list(tmp_path.rglob("*.so"))


def test_topk_by_maxima_in_pytorch(monkeypatch):
    """Without loops, of long rows: those entries alone that reach a bound are looked at."""
    monkeypatch.setenv("PALU_CPU_EXTENSION", "0")
    extension._open.cache_clear()
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2005, generator=generator).mul(3).round()
    for k in (1, 5, 31, 32):
        found = torch_backend.topk_indices(scores, k)
        assert torch.equal(found, reference.topk_indices(scores, k))
    extension._open.cache_clear()


def test_rows_that_verify_holds_are_hard():
    z, r, labels = verify.rows()
    assert z.isnan().any() and r.isnan().any() and z.isposinf().any()
    assert (z == -torch.inf).any() and (r == -torch.inf).all(-1).any() and (labels == -100).any()
