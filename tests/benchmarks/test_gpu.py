"""The run on a GPU machine, as far as it goes without one: arguments, plan, what ran out of time
said, and what is wrong found."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import (
    bench_linear,
    bench_loss,
    bench_ops,
    declare,
    gpu,
    gpu_kernels,
    machine,
    runner,
    tables,
)
from benchmarks.declare import Case

SCRIPT = machine.ROOT / "benchmarks" / "gpu.sh"
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
    modules = {"bench_ops": bench_ops, "bench_linear": bench_linear, "bench_loss": bench_loss}
    benchmark = modules[part.module.removeprefix("benchmarks.")].BENCHMARK
    given = runner.options(benchmark, [*part.arguments, "--device", "cpu"])
    assert given.together and given.repeats == 1 and given.dtype == ["bfloat16"]
    return [
        (case, name)
        for case in runner.selected(benchmark, given)
        for name in runner.asked_for(benchmark, case, given)
    ]


@pytest.mark.parametrize("tiny", [False, True])
def test_the_plan(tiny, tmp_path):
    given = options(tmp_path, "--model", "m", "--data", "d")
    given.tiny = tiny
    parts = list(gpu.plan(given))
    assert list(dict.fromkeys(part.section for part in parts)) == list(gpu.SECTIONS)
    assert [part.end for part in parts] == sorted(part.end for part in parts)
    assert parts[-2].end <= 580  # of the 600 seconds of a call
    for part in parts:
        if part.module == "benchmarks.gpu_kernels":
            assert part.arguments[0] in ("compile", *gpu_kernels.PARTS)
    shards = [part for part in parts if part.section == "check"]
    assert len({part.end for part in shards}) == 1  # at once
    if not tiny:
        numbers = [part.arguments[-1] for part in shards]
        assert numbers == [f"{n}/{len(shards)}" for n in range(len(shards))]
    measured = {
        section: [pair for part in parts if part.section == section for pair in cases_of(part)]
        for section in ("operators", "linear", "loss")
    }
    kernels = {name: {case.kernel for case, _ in pairs} for name, pairs in measured.items()}
    assert kernels["operators"] == set(gpu_kernels.FLOORS) and kernels["linear"] == set(gpu.LINEAR)
    assert kernels["loss"] == {bench_loss.LOSS, bench_loss.TRAINED_LOSS}
    for section in ("operators", "linear"):
        names = {name for _, name in measured[section]}
        assert {"palu", "eager", "liger"} <= names and ("compile" in names) == (not tiny)
        rows = {5, 300} if tiny else {226, 4096}
        assert {case.rows for case, _ in measured[section]} == rows
    assert list(gpu.plan(options(tmp_path)))[-1].section != "train_step"


# ---- the run -------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    """From another folder, into one that is new, with settings that must not matter; without `ncu`
    that section says so."""
    out = tmp_path / "new" / "out"
    words = ["--device", "cpu", "--tiny", "--sections", "head", "ncu", "--commit", "abc"]
    done = shell(out, *words, PALU_BACKEND="nonsense", PALU_CHECK="1")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = tables.read(out / "gpu.csv")
    assert all(row["processor"] and row["versions"] for row in rows)
    assert {row["commit"] for row in rows} == {"abc"}
    assert {row["kernel"] for row in rows} == {"head_gradient"}
    files = {path.name for path in out.iterdir()}
    assert files >= {"gpu.csv", "gpu.log", "table.txt", "head.csv", "head.log", "ncu.log"}
    assert (
        "V = 257, D = 16, N = 5: one product" in done.stdout
        and "nothing was counted" in done.stdout
    )
    assert done.stdout.strip() == (out / "gpu.log").read_text().strip()


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    done = shell(tmp_path / "out", "--device", "cpu", "--tiny", "--commit", "abc")
    assert done.returncode in (0, 3), done.stdout + done.stderr
    for section in gpu.SECTIONS[:-1]:
        assert f"-- {section} over after" in done.stdout or f"{section}: its time" in done.stdout


def do(run, rows, status, monkeypatch, section="operators", text=""):
    """A part whose command leaves these rows, this text and this exit status."""
    part = gpu.Part(section, section, 60, "benchmarks.bench_ops", [])

    def run_logged(commands, seconds, logs):
        for command, log in zip(commands, logs, strict=True):
            print("$", file=log)
            print(text, file=log, flush=True)
            if rows:
                tables.write(Path(command[command.index("--csv") + 1]), rows)
        return [status] * len(commands)

    monkeypatch.setattr(gpu, "run_logged", run_logged)
    run.do([part])
    return run.failures


WRONG = "wrong: loss off by 1.0e+00, more than 1.6e-02"


@pytest.mark.parametrize(
    ("rows", "status", "failures", "late"),
    [
        ([row(), row("kl_forward", status=declare.NO_TIME)], 0, 0, 1),
        ([row(provider="eager", status=WRONG)], 1, 0, 0),
        ([row(status=WRONG)], 1, 1, 0),
        ([row(provider="palu sparse", status="failed: no kernel image")], 1, 1, 0),
        ([row()], None, 0, 1),
        ([row()], 2, 1, 0),
        ([], 1, 1, 0),
    ],
)
def test_what_is_wrong_and_what_is_late(rows, status, failures, late, tmp_path, monkeypatch):
    run = a_run(tmp_path)
    assert len(do(run, rows, status, monkeypatch)) == failures and len(run.late) == late
    if rows:
        assert len(run.rows) == len(rows)
        skipped = sum(row["status"] == declare.NO_TIME for row in rows)
        said = f"{len(rows) - skipped} of {len(rows)} measurements, {skipped} skipped"
        assert said in (tmp_path / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("status", "failures", "late"), [(0, 0, 0), (3, 0, 1), (None, 0, 1), (1, 1, 0)]
)
def test_a_part_of_kernels(status, failures, late, tmp_path, monkeypatch, capsys):
    """What it printed is printed, what it measured kept, however it ended."""
    run = a_run(tmp_path)
    found = do(run, [row()], status, monkeypatch, "kernels", "kl_reverse: 3 kernels")
    assert (len(found), len(run.late)) == (failures, late) and len(run.rows) == 1
    assert "kl_reverse: 3 kernels" in capsys.readouterr().out


def test_a_section_without_time_is_not_tried(tmp_path, monkeypatch, capsys):
    run = a_run(tmp_path)
    run.start -= 57
    assert do(run, [row()], 0, monkeypatch) == [] and run.rows == []
    assert run.late == ["operators"] and "operators: its time was up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("late", "failures", "status"), [([], [], 0), (["a"], [], 3), (["a"], ["b"], 1)]
)
def test_the_exit_status(late, failures, status, tmp_path, monkeypatch):
    """Other sections still run after one that was late."""
    seen = []

    def do(run, parts):
        seen.append(parts[0].section)
        run.late, run.failures = late, failures

    monkeypatch.setattr(gpu.Run, "do", do)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    words = [str(tmp_path / "out"), "--device", "cpu", "--tiny", "--commit", "abc"]
    assert gpu.main(words) == status
    assert seen == list(gpu.SECTIONS[:-1])


def test_what_the_sweep_wrote_is_used_from_there_on(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr(gpu.tuned, "FOLDER", folder)
    for tiny, wanted in ((True, []), (False, ["sm_90.json"])):
        run = a_run(tmp_path / f"out-{tiny}")
        run.given.tiny = tiny
        run.tuned.parent.mkdir()
        run.tuned.write_text("{}")
        do(run, [row()], 0, monkeypatch, "sweep")
        assert [path.name for path in folder.iterdir()] == wanted


def test_a_command_out_of_time_ends_with_all_it_started(tmp_path):
    logs = [(tmp_path / name).open("w+") for name in ("first", "second", "third")]
    commands = [["bash", "-c", "sleep 60 & echo $!; wait"], ["false"], ["surely-not-here"]]
    start = time.monotonic()
    assert gpu.run_logged(commands, 1.0, logs) == [None, 1, 127]
    assert time.monotonic() - start < 10
    child = int((tmp_path / "first").read_text().splitlines()[1])
    state = Path(f"/proc/{child}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the command had started still runs")


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
    run = a_run(tmp_path)
    assert len(do(run, [], status, monkeypatch, "check", "\n".join(lines))) == failures
    assert said in capsys.readouterr().out and (status is None) == bool(run.late)


def test_what_the_profiler_counted():
    lines = ["==PROF== Connected", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
    lines += ['"0","_kl_stats_kernel","dram__throughput.avg.pct","%","71.2"']
    lines += ['"0","_kl_stats_kernel","gpu__time_duration.sum","us","35.1"']
    wanted = ["0 _kl_stats_kernel: dram__throughput 71.2 %, gpu__time_duration 35.1 us"]
    assert gpu.profile(lines) == wanted
    assert gpu.profile(["==ERROR== ERR_NVGPUCTRPERM"]) == ["==ERROR== ERR_NVGPUCTRPERM"]
