"""The run on a GPU machine, as far as it goes without one: arguments, sizes, floors, every provider
on the CPU, what is left out said, and what is wrong found."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_loss as loss_step
from benchmarks import gpu, gpu_cases, gpu_ops, gpu_timing
from benchmarks import runner as harness
from benchmarks.gpu_cases import Case, Rates, floor_seconds
from benchmarks.static import traffic
from palu_kernels.check import __main__ as check

CPU = torch.device("cpu")
SCRIPT = harness.ROOT / "benchmarks" / "gpu.sh"
TINY_CASES = [*gpu_cases.logits_cases(True), *gpu_cases.linear_cases(True)]
RATES = Rates(3e12, 750e12)
without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU here")


def read(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def a_run(tmp_path, *options):
    return gpu.Run(
        gpu.options([str(tmp_path), "--device", "cpu", "--tiny", "--commit", "abc", *options])
    )


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
    ("options", "message"),
    [
        (["--device", "cpu"], "needs --tiny"),
        (["--device", "cpu", "--tiny", "--sections", "nothing"], "invalid choice: 'nothing'"),
        (["--device", "cuda:99", "--tiny"], "device 'cuda:99' cannot be used on this machine"),
    ],
)
def test_wrong_arguments(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.options([str(tmp_path), *options])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_that_is_not_empty(tmp_path, capsys):
    (tmp_path / "gpu.csv").touch()
    with pytest.raises(SystemExit):
        gpu.options([str(tmp_path), "--device", "cpu", "--tiny"])
    assert "which is not empty; it must be new or empty" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--tiny"]])
def test_shell_without_a_folder(arguments):
    done = shell(*arguments)
    assert done.returncode == 2 and "benchmarks/gpu.sh OUT_DIR" in done.stderr


# ---- sizes and floors ----------------------------------------------------------------------------


def test_size_tables():
    logits, linear = list(gpu_cases.logits_cases(False)), list(gpu_cases.linear_cases(False))
    for cases in (logits, linear):
        assert {case.vocab for case in cases} == {32000, 128256, 262144}
        assert cases[0].vocab == 128256  # first, should the time not do for all
        assert len(set(cases)) == len(cases)
        for vocab in (32000, 128256, 262144):
            rows = {case.rows for case in cases if case.vocab == vocab}
            assert rows == {50, 226, 4096}
    names = {(case.operator, case.option) for case in logits}
    assert names == {
        ("topk_indices", ""),
        *((name, by) for name in ("flatten", "entropy") for by in ("reference", "indices")),
        *((name, "current") for name in ("flatten", "entropy")),
        ("kl", "reverse"),
        ("kl", "forward"),
        ("cross_entropy", ""),
    }
    assert {case.head for case in linear} == {"frozen", "trained"}
    roads = {case.option for case in linear if case.operator == "linear_flatten"}
    assert roads == {"dense", "sparse"}
    # the tiny run has every kernel that the whole one has
    assert {case.kernel for case in TINY_CASES} == {case.kernel for case in [*logits, *linear]}


def test_floors():
    case = Case("flatten", "indices", 128256, 50, 1000)
    assert floor_seconds(case, RATES) == pytest.approx(3.125 * 50 * 128256 * 2 / 3e12)
    many = Case("linear_kl", "reverse", 128256, 4096, 0, 4096, "trained")
    flops = 4 * 2 * 4096 * 128256 * 4096
    assert floor_seconds(many, RATES) == pytest.approx(flops / 750e12)
    few = Case("linear_cross_entropy", "", 128256, 226, 0, 4096, "frozen")
    moved = 2 * 2 * (128256 * 4096 + 226 * 4096 + 226 * 128256)
    assert floor_seconds(few, RATES) == pytest.approx(moved / 3e12)
    sparse = Case("linear_flatten", "sparse", 128256, 50, 1000, 4096, "frozen")
    assert floor_seconds(sparse, RATES) == pytest.approx(2 * 50 * 1000 * 4096 * 2 / 3e12)
    trained = sparse._replace(head="trained")
    more = floor_seconds(trained, RATES) - floor_seconds(sparse, RATES)
    assert more == pytest.approx(2 * 128256 * 4096 * 2 / 3e12)


@without_gpu
def test_transfers_are_those_that_the_kernels_make():
    counted = {one.operator: one.transfers for one in traffic.measure(32768, 1, "bfloat16")}
    names = {
        "topk_indices": ("topk_indices", ""),
        "reverse kl": ("kl", "reverse"),
        "forward kl": ("kl", "forward"),
        "cross-entropy": ("cross_entropy", ""),
    }
    for name in ("flatten", "entropy"):
        names |= {f"{name}, S by {by}": (name, by) for by in ("reference", "indices", "current")}
    assert set(names.values()) == set(gpu_cases.TRANSFERS)
    for name, key in names.items():
        # beside it the histograms of two digits and a few numbers a row
        assert -0.01 < counted[name] - gpu_cases.TRANSFERS[key] < 0.35, name


# ---- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TINY_CASES, ids=lambda case: f"{case.kernel} {case.vocab}")
def test_every_provider_is_right(case):
    errors = {}
    for provider in gpu_ops.providers(case):
        x = gpu_ops.inputs_of(case, CPU)
        out = gpu_ops.caller(case, provider, x)()
        errors[provider] = gpu_ops.error(case, x, out)
    row = {"kernel": case.kernel, "D": case.hidden, "metric": "error", "status": "ok"}
    assert not gpu.is_wrong(row | {"p50": errors["palu"]}, errors.get("eager"))
    assert errors.get("sort", 0) == 0
    # eager's S has other ones of equal entries
    ties = case.operator == "topk_indices" or case.option in ("reference", "current")
    assert errors.get("eager", 0) < (0.5 if ties else 0.04 if case.hidden else gpu.LIMIT)


def half_a_gradient(case, x):
    loss = gpu_ops.ours(case, x)
    return loss / 2 + loss.detach() / 2


def no_gradient_of_the_head(case, x):
    head = x.head.detach()
    return gpu_ops.ours(case._replace(head="frozen"), x._replace(head=head)) + 0 * (
        x.head.weight.sum()
    )


def other_rows(case, x):
    order = list(range(case.rows))
    order[0], order[-1] = order[-1], order[0]
    return gpu_ops.ours(case, x._replace(reference=x.reference[order], labels=x.labels[order]))


def one_index_off(case, x):
    found = gpu_ops.ours(case, x)
    found[0, 0] += 1
    return found


@pytest.mark.parametrize(
    ("break_it", "operators"),
    [
        (half_a_gradient, ("flatten", "entropy", "kl", "cross_entropy", "linear_kl")),
        (other_rows, ("kl", "cross_entropy", "linear_kl", "linear_cross_entropy")),
        (no_gradient_of_the_head, ("linear_flatten", "linear_kl", "linear_cross_entropy")),
        (one_index_off, ("topk_indices",)),
    ],
)
def test_a_wrong_result_is_found(break_it, operators, monkeypatch):
    monkeypatch.setitem(gpu_ops.PROVIDERS, "palu", break_it)
    for case in TINY_CASES:
        few = case.rows == gpu_cases.TINY_ROWS[0]  # all rows and the head's gradient compared
        if case.operator in operators and few and case.head != "frozen":
            rows = gpu_ops.measure(case, "palu", CPU, 0.0)
            rows = gpu.described(case, "palu", rows, RATES)
            wrong = [gpu.is_wrong({"status": "ok"} | row, None) for row in rows]
            assert wrong.count(True) == 1, case


def test_three_rows_of_many_are_compared():
    case = Case("kl", "reverse", 257, 300)
    assert case.rows > gpu_ops.ALL_ROWS
    x = gpu_ops.inputs_of(case, CPU)
    out = gpu_ops.caller(case, "palu", x)()
    right = gpu_ops.error(case, x, out)
    x.current.grad[-1] *= 1.1
    assert gpu_ops.error(case, x, out) > 0.04 > gpu.LIMIT > right


def test_a_frozen_head_keeps_its_mean_row_and_a_trained_one_does_not(monkeypatch):
    made = []
    original = gpu_ops.LMHead.mean_row

    def mean_row(head):
        made.append(head)
        return original(head)

    monkeypatch.setattr(gpu_ops.LMHead, "mean_row", mean_row)
    for head in ("frozen", "trained"):
        case = Case("linear_flatten", "sparse", 257, 5, 9, 16, head)
        call = gpu_ops.caller(case, "palu", gpu_ops.inputs_of(case, CPU))
        call(), call()
    frozen, trained = made[:2], made[2:]
    assert frozen[0] is frozen[1] and trained[0] is not trained[1]


# ---- timing --------------------------------------------------------------------------------------


def test_times_on_the_cpu():
    taken = gpu_timing.times(lambda: time.sleep(0.002), CPU, 0.02)
    assert 5 <= len(taken.device) <= 10 and min(taken.device) >= 0.002
    assert len(gpu_timing.times(lambda: None, CPU, 1.0).device) == gpu_timing.MOST


def test_times_on_a_device(monkeypatch):
    """The road that a GPU takes, its clock and memory played by the CPU."""
    events = []

    class Event:
        def __init__(self, device, enable_timing):
            assert device.type == "cuda" and enable_timing

        def record(self):
            events.append(time.perf_counter())
            self.at = events[-1]

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    make = torch.empty
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: make(4, dtype=dtype))
    taken = gpu_timing.times(lambda: time.sleep(0.003), torch.device("cuda"), 0.1)
    assert len(events) == 2 * len(taken.device) and gpu_timing.FEWEST <= len(taken.device) <= 33
    assert min(taken.device) >= 0.003 and min(taken.host) >= 0.003


def test_rates(monkeypatch):
    rows = gpu_timing.rates(CPU, tiny=True)
    named = [(row["kernel"], row["dtype"], row["metric"]) for row in rows]
    products = [("matmul", dtype, "TFLOP/s") for dtype in ("bfloat16", "float32")]
    assert named == [("copy", "uint8", "GB/s"), *products]
    assert all(0 < row["p20"] <= row["p50"] <= row["p80"] for row in rows)
    half = gpu_timing.Times([0.5] * 5, [0.5] * 5)
    monkeypatch.setattr(gpu_timing, "times", lambda *_, **__: half)
    rows = gpu_timing.rates(CPU, tiny=True)
    products = 2 * 64**3 / 0.5 / 1e12
    assert [row["p50"] for row in rows] == pytest.approx([2 * 2**16 / 0.5 / 1e9, *[products] * 2])


# ---- the run -------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    """From another folder, into one that is new, with settings that must not matter."""
    out = tmp_path / "new" / "out"
    options = ["--device", "cpu", "--tiny", "--sections", "card", "operators", "linear"]
    done = shell(out, *options, PALU_BACKEND="nonsense", PALU_CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(out / "gpu.csv")
    assert list(rows[0]) == list(gpu.COLUMNS)
    assert all(row["hardware"] and row["commit"] and "torch=" in row["versions"] for row in rows)
    assert all(row["status"] == "ok" for row in rows)
    found = {(r["kernel"], r["V"], r["rows"], r["provider"], r["metric"]) for r in rows}
    for case in TINY_CASES:
        for provider in gpu_ops.providers(case):
            for metric in ("ms", "host ms", "peak MiB", "error", "share of floor"):
                assert (case.kernel, str(case.vocab), str(case.rows), provider, metric) in found
    sizes = {(row["V"], row["D"]) for row in rows if row["kernel"].startswith("linear")}
    assert sizes == {(str(vocab), str(hidden)) for vocab, hidden in gpu_cases.TINY}
    files = {path.name for path in out.iterdir()}
    assert files == {"gpu.csv", "gpu.log", "table.txt", "workers.log"}
    assert "V = 1003" in done.stdout and "V = 257" not in done.stdout
    assert "V = 257" in (out / "table.txt").read_text()
    assert done.stdout.strip() == (out / "gpu.log").read_text().strip()


def test_share_of_floor():
    case = Case("kl", "reverse", 1000, 300)  # 3 million bytes: 1 microsecond
    times = [{"metric": "ms", "p20": 0.002, "p50": 0.004, "p80": 0.01}, {"metric": "error"}]
    row = gpu.described(case, "eager", times, RATES)[-1]
    shares = {"p20": 0.5, "p50": 0.25, "p80": 0.1}
    assert row["metric"] == "share of floor" and row["provider"] == "eager"
    assert {name: row[name] for name in shares} == pytest.approx(shares)
    assert len(gpu.described(case, "eager", times, None)) == 2  # without the card's rates


class FakeWorker:
    """Stands for `gpu.work`: (how many measurements it ends, status) a call."""

    def __init__(self, *script):
        self.script, self.lists = list(script), []

    def __call__(self, run, section, measurements):
        self.lists.append(measurements)
        done, status = self.script.pop(0)
        done = len(measurements) if done is None else done
        right = [{"metric": "ms", "p20": 1.0, "p50": 2.0, "p80": 4.0}]
        return dict.fromkeys(range(done), right), status


def statuses(run):
    return [row["status"] for row in run.rows if row["metric"] == "ms"]


@pytest.mark.parametrize("status", [0, None])
def test_what_was_not_measured_in_time_is_said(status, tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path)
    monkeypatch.setattr(gpu, "work", FakeWorker((3, status)))
    gpu.linear(run)
    found = statuses(run)
    assert found[:3] == ["ok"] * 3 and set(found[3:]) == {"skipped: no time left"}
    assert len(found) == sum(len(gpu_ops.providers(c)) for c in gpu_cases.linear_cases(True))
    assert len(read(tmp_path / "gpu.csv")) == len(run.rows)
    assert f"3 of {len(found)} measurements" in capsys.readouterr().out
    assert run.failures == []  # time is no fault
    assert "skipped" in gpu.table(run.rows, 257)


def test_a_process_that_dies_is_followed_by_another(tmp_path, monkeypatch):
    run = a_run(tmp_path)
    worker = FakeWorker((2, 1), (4, gpu_ops.DEVICE_LOST), (0, -11), (None, 0))
    monkeypatch.setattr(gpu, "work", worker)
    gpu.operators(run)
    found = statuses(run)
    died = [number for number, status in enumerate(found) if status != "ok"]
    assert died == [2, 7]  # not the one after the process that reported before it ended
    assert "ended with status -11" in found[7]
    assert [len(found) - len(one) for one in worker.lists] == [0, 3, 7, 8]
    measured = [row for row in run.rows if row["metric"] == "ms"]
    assert len(run.failures) == sum(measured[number]["provider"] == "palu" for number in died)


def test_what_cannot_run_is_reported(tmp_path):
    """By the process that measures: the others have their turn."""
    run = a_run(tmp_path)
    case = Case("kl", "reverse", 257, 3)
    todo = [(case, "palu"), (case._replace(option="sideways"), "palu"), (case, "nobody")]
    found, status = gpu.work(run, "operators", [*todo, (case, "eager")])
    assert status == 0 and sorted(found) == [0, 1, 2, 3]
    assert [len(rows) for rows in found.values()] == [4, 1, 1, 4]
    assert found[1][0]["status"].startswith("ValueError: direction is 'sideways'")
    run.add(gpu.described(*todo[1], found[1], RATES))
    assert gpu.is_wrong(run.rows[-1], None)
    assert "ValueError" in gpu.table(run.rows, 257)


def test_a_measurement_that_never_ends_is_given_up():
    task = {"device": "cpu", "tiny": True, "seconds": 60}
    task["measurements"] = [(tuple(TINY_CASES[0]), "forever")]
    code = (
        "import time\nfrom benchmarks import gpu_ops\ngpu_ops.STUCK = 0.5\n"
        f"gpu_ops.PROVIDERS['forever'] = lambda *_: time.sleep(60)\ngpu_ops.work({task})"
    )
    start = time.monotonic()
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=harness.ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert done.stdout == "" and "in <lambda>" in done.stderr  # where it was


def test_a_lost_device_ends_the_process(monkeypatch):
    def lost(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.accelerator, "synchronize", lost)
    with pytest.raises(SystemExit) as stopped:
        gpu_ops._go_on(torch.device("cuda"))
    assert stopped.value.code == gpu_ops.DEVICE_LOST


def test_no_measurement_after_the_end(tmp_path, monkeypatch, capsys):
    task = {"device": "cpu", "tiny": True, "seconds": -1}
    gpu_ops.work(task | {"measurements": [(tuple(TINY_CASES[0]), "palu")]})
    assert capsys.readouterr().out == ""
    run = a_run(tmp_path)
    monkeypatch.setitem(gpu.ENDS, "operators", -1)
    gpu.operators(run)
    assert set(statuses(run)) == {"skipped: no time left"}


def test_a_command_out_of_time_ends_with_all_it_started(tmp_path):
    log = (tmp_path / "log").open("w+")
    command = ["bash", "-c", "sleep 60 & echo $!; wait"]
    start = time.monotonic()
    assert gpu.run_logged(command, 0.5, log, log) is None
    assert time.monotonic() - start < 10
    child = int((tmp_path / "log").read_text().splitlines()[1])
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the command had started still runs")
    assert gpu.run_logged(["false"], 5, log, log) == 1
    assert gpu.run_logged(["touch", str(tmp_path / "late")], 0, log, log) is None
    assert not (tmp_path / "late").exists()


def test_loss_step_takes_what_it_is_given(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run_logged", lambda command, *_: commands.append(command) or 0)
    for tiny in (True, False):
        run = a_run(tmp_path / str(tiny))
        run.out.mkdir(exist_ok=True)
        run.tiny = tiny
        gpu.loss_step(run)
        assert run.failures == []
    tiny, whole = (loss_step.options(command[3:]) for command in commands)
    assert (tiny.vocab, whole.vocab) == (1003, 128256)
    assert whole.calls == 20 and whole.dtype == ["bfloat16"] and whole.device == "cpu"
    assert whole.csv == tmp_path / "False" / "loss_step.csv"
    sizes = loss_step.Shape(*(getattr(tiny, name) for name in loss_step.Shape._fields[:6]))
    loss_step.make_labels(sizes)  # they fit
    run = a_run(tmp_path / "late")
    run.out.mkdir()
    run.start -= gpu.ENDS["loss_step"] - 10
    gpu.loss_step(run)
    assert len(commands) == 2
    assert "skipped: no time left" in (run.out / "gpu.log").read_text()


# ---- the check -----------------------------------------------------------------------------------


def test_the_check_takes_what_it_is_given(tmp_path, monkeypatch, capsys):
    """Run in this process, with fewer cases; a wrong kernel is found."""

    def run_logged(command, seconds, stdout, stderr):
        assert command[1:3] == ["-m", "palu_kernels.check"]
        status = check.main(command[3:])
        print(capsys.readouterr().out, end="", file=stdout, flush=True)
        return status

    cases = list(check.cases(quick=True))[::9]
    monkeypatch.setattr(check, "cases", lambda quick: cases)
    monkeypatch.setattr(check, "triton_runs_on", lambda device: False)  # interpreting takes long
    monkeypatch.setattr(gpu, "run_logged", run_logged)
    run = a_run(tmp_path / "right")
    run.out.mkdir()
    gpu.check(run)
    assert run.failures == [] and (run.out / "check.json").exists()
    original = check.loss_of
    monkeypatch.setattr(check, "loss_of", lambda *given: original(*given) * 1.01)
    run = a_run(tmp_path / "wrong")
    run.out.mkdir()
    gpu.check(run)
    log = (run.out / "check.log").read_text()
    failed = [line for line in log.splitlines() if line.endswith("FAILED")]
    assert len(failed) > 10 and len(run.failures) == 1
    assert run.failures[0].startswith(f"check: {len(failed)} failed")
    assert all(map(gpu.COMPARISON.search, failed))


@pytest.mark.parametrize(
    ("lines", "status", "failures", "said"),
    [
        (
            ["kl V=7 loss  1.0e-07  2.0e-07   0.50", "2 passed, 0 failed"],
            0,
            0,
            "2 passed, 0 failed",
        ),
        (
            ["kl V=7 loss  1.0e-07  2.0e-07   0.50"],
            None,
            0,
            "1 comparisons before its time was up, 0 of",
        ),
        (["kl V=7 loss  1.0e-01  2.0e-07 500.00  FAILED"], None, 1, "1 of them failed"),
        (["kl V=7 loss  1.0e-01  2.0e-07 500.00  FAILED", "1 passed, 1 failed"], 1, 1, "1.0e-01"),
        (["Traceback"], 1, 1, "see check.log"),
    ],
)
def test_what_the_check_said(lines, status, failures, said, tmp_path, monkeypatch, capsys):
    def run_logged(command, seconds, stdout, stderr):
        print(*lines, sep="\n", file=stdout, flush=True)
        return status

    monkeypatch.setattr(gpu, "run_logged", run_logged)
    run = a_run(tmp_path)
    gpu.check(run)
    assert len(run.failures) == failures and said in capsys.readouterr().out
