"""The run on a GPU machine, as far as it goes without one: arguments, plan, floors, what is left
out said, and what is wrong found."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_linear, bench_loss, bench_ops, gpu, runner, tables
from benchmarks.gpu import Rates, floor_seconds
from benchmarks.runner import Case
from benchmarks.static import traffic

SCRIPT = runner.ROOT / "benchmarks" / "gpu.sh"
RATES = Rates(3e12, 750e12)
without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")


def options(out, *words):
    return gpu.options([str(out), "--device", "cpu", "--tiny", "--commit", "abc", *words])


def a_run(out, *words):
    run = gpu.Run(options(out, *words))
    run.out.mkdir(exist_ok=True)
    return run


def row(kernel="kl_reverse", provider="palu", p50=1.0, status="ok", metric="seconds", **sizes):
    case = Case(kernel, 1000, None, 300, None, "bfloat16")._replace(**sizes)
    return tables.row(case._asdict(), provider, metric, [[p50]], status, {})


# ---- arguments -----------------------------------------------------------------------------------


def shell(*arguments, **environment):
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment
    return subprocess.run(
        [SCRIPT, *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@without_gpu
def test_without_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main([str(tmp_path / "out")])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "there is no GPU here" in said and "--device cpu --tiny" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "cpu"], "needs --tiny"),
        (["--device", "cpu", "--tiny", "--sections", "nothing"], "invalid choice: 'nothing'"),
        (["--device", "cuda:99", "--tiny"], "device 'cuda:99' cannot be used on this machine"),
        (["--device", "cpu", "--tiny", "--model", "m"], "--model and --data go together"),
    ],
)
def test_wrong_arguments(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.options([str(tmp_path), *words])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "gpu.csv").touch()
    with pytest.raises(SystemExit):
        options(tmp_path)
    assert "which is not empty; it must be new or empty" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--tiny"]])
def test_shell_without_a_folder(arguments):
    done = shell(*arguments)
    assert done.returncode == 2 and "benchmarks/gpu.sh OUT_DIR" in done.stderr


# ---- the plan ------------------------------------------------------------------------------------


def cases_of(part):
    module = {"bench_ops": bench_ops, "bench_linear": bench_linear, "bench_loss": bench_loss}.get(
        part.module.removeprefix("benchmarks.")
    )
    benchmark = gpu.CARD if module is None else module.BENCHMARK
    given = runner.options(benchmark, [*part.arguments, "--device", "cpu"])
    assert given.together and given.repeats == 1 and given.dtype == ["bfloat16"]
    return [
        (case, name)
        for case in runner.selected(benchmark, given)
        for name in runner.asked_for(benchmark, case, given)
    ]


@pytest.mark.parametrize("tiny", [False, True])
def test_the_plan_measures_every_operator(tiny, tmp_path):
    given = options(tmp_path, "--model", "m", "--data", "d")
    given.tiny = tiny
    parts = list(gpu.plan(given))
    assert list(dict.fromkeys(part.section for part in parts)) == list(gpu.SECTIONS)
    assert [part.end for part in parts] == sorted(part.end for part in parts)
    assert parts[-2].end < 540
    measured = {
        section: [pair for part in parts if part.section == section for pair in cases_of(part)]
        for section in ("card", "operators", "linear", "loss")
    }
    kernels = {name: {case.kernel for case, _ in pairs} for name, pairs in measured.items()}
    assert kernels["card"] == {"copy", "matmul"}
    assert kernels["operators"] == set(gpu.TRANSFERS)
    assert kernels["linear"] == {
        f"linear_{name}{trained}"
        for name in ("flatten", "kl_reverse", "cross_entropy")
        for trained in ("", "_trained")
    }
    providers = {name for _, name in measured["linear"]}
    assert providers == {"palu", "palu sparse", "palu dense", "eager"}
    vocabularies = {257, 1003} if tiny else {32000, 128256, 262144}
    for section in ("operators", "linear"):
        cases = [case for case, _ in measured[section]]
        assert {case.V for case in cases} == vocabularies
        assert max(vocabularies if tiny else {128256}) == cases[0].V  # first, should time be short
        rows = {5, 300} if tiny else {50, 226, 4096}
        assert {case.rows for case in cases} == rows
    ((case, _), *_) = measured["loss"]
    assert (1003 if tiny else 128256) == case.V
    assert list(gpu.plan(options(tmp_path)))[-1].section != "train_step"


def test_floors():
    def floor(kernel, rows, k=None, D=None, provider="palu"):
        return floor_seconds(row(kernel, provider, V=128256, D=D, rows=rows, k=k), RATES)

    assert floor("flatten_indices", 50, 1000) == pytest.approx(3.125 * 50 * 128256 * 2 / 3e12)
    flops = 4 * 2 * 4096 * 128256 * 4096
    assert floor("linear_kl_reverse_trained", 4096, D=4096) == pytest.approx(flops / 750e12)
    moved = 2 * 2 * (128256 * 4096 + 226 * 4096 + 226 * 128256)
    assert floor("linear_cross_entropy", 226, D=4096) == pytest.approx(moved / 3e12)
    sparse = floor("linear_flatten", 50, 1000, 4096, "palu sparse")
    assert sparse == pytest.approx(2 * 50 * 1000 * 4096 * 2 / 3e12)
    more = floor("linear_flatten_trained", 50, 1000, 4096, "palu sparse") - sparse
    assert more == pytest.approx(2 * 128256 * 4096 * 2 / 3e12)
    assert floor("copy", 1) is None


@without_gpu
def test_transfers_are_those_that_the_kernels_make():
    counted = {one.operator: one.transfers for one in traffic.measure(32768, 1, "bfloat16")}
    names = {
        "topk_indices": "topk_indices",
        "reverse kl": "kl_reverse",
        "forward kl": "kl_forward",
        "cross-entropy": "cross_entropy",
    }
    for name in ("flatten", "entropy"):
        names |= {f"{name}, S by reference": name, f"{name}, S by indices": f"{name}_indices"}
        names[f"{name}, S by current"] = f"{name}_current"
    assert set(names.values()) == set(gpu.TRANSFERS)
    for name, kernel in names.items():
        # beside it the histograms of two digits and a few numbers a row
        assert -0.01 < counted[name] - gpu.TRANSFERS[kernel] < 0.35, name


def test_rates():
    copy = row("copy", "torch", 0.5, rows=2**30, dtype="uint8")
    products = [
        row("matmul", "torch", 0.5, V=64, D=64, rows=64, dtype=d) for d in ("bfloat16", "float32")
    ]
    found = gpu.rates([copy, *products])
    assert found == (2 * 2**30 / 0.5, 2 * 64**3 / 0.5)
    assert gpu.rates([copy]) is None
    device = [one | {"metric": "device_seconds", "p50": 0.25} for one in (copy, *products)]
    assert gpu.rates([copy, *products, *device]).bytes_per_second == 2 * found.bytes_per_second


def test_shares_of_floor():
    # 3 million bytes: 1 microsecond
    rows = [row(p50=0.002), row(provider="eager", p50=0.004), row("copy"), row(metric="loss_error")]
    shares = gpu.shares_of_floor(rows, RATES)
    found = {one["provider"]: one["p50"] for one in shares}
    assert found == pytest.approx({"palu": 0.0005, "eager": 0.00025})
    assert {one["metric"] for one in shares} == {"of_floor"}
    assert "of floor" in tables.tables([*rows, *shares])


# ---- the run -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(tmp_path):
    """From another folder, into one that is new, with settings that must not matter."""
    out = tmp_path / "new" / "out"
    words = ["--device", "cpu", "--tiny", "--sections", "card", "loss"]
    done = shell(out, *words, PALU_BACKEND="nonsense", PALU_CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = tables.read(out / "gpu.csv")
    assert all(row["processor"] and row["commit"] and row["versions"] for row in rows)
    assert {row["status"] for row in rows if row["provider"] != "liger"} == {"ok"}
    assert {row["kernel"] for row in rows} == {"copy", "matmul", "loss_step"}
    files = {path.name for path in out.iterdir()}
    assert files >= {"gpu.csv", "gpu.log", "table.txt", "card.csv", "card.log", "loss_step.csv"}
    assert "GB/s" in done.stdout and "of released" in done.stdout
    assert done.stdout.strip() == (out / "gpu.log").read_text().strip()


def do(run, rows, status, monkeypatch):
    """A part whose command leaves these rows and this exit status."""
    part = gpu.Part("operators", "operators", 60, "benchmarks.bench_ops", [])

    def run_logged(command, seconds, log):
        if rows:
            tables.write(Path(command[command.index("--csv") + 1]), rows)
        return status

    monkeypatch.setattr(gpu, "run_logged", run_logged)
    run.do(part)
    return run.failures


WRONG = "wrong: loss off by 1.0e+00, more than 1.6e-02"


@pytest.mark.parametrize(
    ("rows", "status", "failures"),
    [
        ([row(), row("kl_forward", status=runner.NO_TIME)], 0, 0),  # time is no fault
        ([row(provider="eager", status=WRONG)], 1, 0),
        ([row(status=WRONG)], 1, 1),
        ([row(provider="palu sparse", status="failed: no kernel image")], 1, 1),
        ([row()], None, 0),
        ([row()], 2, 1),
        ([], 1, 1),
    ],
)
def test_only_this_library_s_failures_count(rows, status, failures, tmp_path, monkeypatch):
    run = a_run(tmp_path)
    assert len(do(run, rows, status, monkeypatch)) == failures
    if rows:
        assert len(tables.read(tmp_path / "gpu.csv")) == len(rows)
        skipped = sum(row["status"] == runner.NO_TIME for row in rows)
        said = f"{len(rows) - skipped} of {len(rows)} measurements, {skipped} skipped"
        assert said in (tmp_path / "gpu.log").read_text()


def test_a_part_without_time_is_not_tried(tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path)
    run.start -= 55
    assert do(run, [row()], 0, monkeypatch) == [] and run.rows == []
    assert "operators: skipped: no time left" in capsys.readouterr().out


def test_a_command_out_of_time_ends_with_all_it_started(tmp_path):
    log = (tmp_path / "log").open("w+")
    command = ["bash", "-c", "sleep 60 & echo $!; wait"]
    start = time.monotonic()
    assert gpu.run_logged(command, 0.5, log) is None
    assert time.monotonic() - start < 10
    child = int((tmp_path / "log").read_text().splitlines()[1])
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the command had started still runs")
    assert gpu.run_logged(["false"], 5, log) == 1


@pytest.mark.parametrize(
    ("lines", "status", "failures", "said"),
    [
        (["kl V=7 loss  1.0e-07  2.0e-07   0.50", "2 passed"], 0, 0, "2 passed"),
        (["kl V=7 loss  1.0e-07  2.0e-07   0.50"], None, 0, "1 comparisons before its time"),
        (["kl V=7 loss  1.0e-01  2.0e-07 500.00  FAILED"], None, 1, "1 of them failed"),
        (["kl V=7 loss  1.0e-01  2.0e-07 500.00  FAILED", "1 failed"], 1, 1, "1.0e-01"),
        (["Traceback"], 1, 1, "see check.log"),
    ],
)
def test_what_the_check_said(lines, status, failures, said, tmp_path, monkeypatch, capsys):
    commands = []

    def run_logged(command, seconds, log):
        commands.append(command)
        print(*lines, sep="\n", file=log, flush=True)
        return status

    monkeypatch.setattr(gpu, "run_logged", run_logged)
    run = a_run(tmp_path)
    run.do(list(gpu.plan(run.given))[1])
    assert len(run.failures) == failures and said in capsys.readouterr().out
    assert commands[0][2] == "palu_kernels.check" and "--quick" in commands[0]
    assert commands[0][-2:] == ["--json", str(tmp_path / "check.json")]
