"""Tables, slopes, comparisons and pictures say what is in the rows."""

import pytest

from benchmarks import machine, plot, tables

PLACE = {"device": "cpu", "processor": "P", "threads": "2", "versions": "torch=1", "commit": "c"}


def row(provider="palu", metric="seconds", p50=1.0, spread=0.0, status="ok", **sizes):
    case = {"kernel": "kl", "V": 100, "D": None, "rows": 10, "k": None, "dtype": "float32"}
    case |= {"setting": "", **sizes}
    low, high = (None, None) if p50 is None else (p50 - spread, p50 + spread)
    quantiles = {"p20": low, "p50": p50, "p80": high, "samples": "0" if p50 is None else "3"}
    names = {"provider": provider, "metric": metric, "values": "", "status": status}
    return {**case, **names, **quantiles, **PLACE}


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_quantiles():
    found = tables.quantiles([5, 1, 4, 2, 3, 6])
    assert list(found.values()) == pytest.approx([2, 3.5, 5])
    assert tables.quantiles([7]) == {"p20": 7, "p50": 7, "p80": 7}
    assert tables.quantiles([]) == {"p20": None, "p50": None, "p80": None}


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    processes = [[0.1, 1 / 3], [2.0], []]
    rows = [row(k=3), row("peer", p50=None, status="needs a GPU")]
    rows.append(tables.row(row(setting="batch=8"), "palu", "seconds", processes, "ok", PLACE))
    tables.write(path, rows)
    rows[-1]["samples"] = "3"
    assert tables.read(path) == rows
    assert tables.by_process(rows[-1]) == processes
    assert [tables.by_process(one) for one in rows[:2]] == [[[1.0]], []]
    assert tables.mean_seconds(rows[0]) == 1
    assert [one.name for one in path.parent.iterdir()] == ["rows.csv"]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    for call in (lambda: tables.read(path), lambda: tables.write(path, [row()])):
        with pytest.raises(ValueError, match="has no column kernel"):
            call()
    assert path.read_text() == "a,b\n1,2\n"
    tables.write(path, [{"a": 3, "b": 4}], ("a", "b"))
    assert path.read_text() == "a,b\n3,4\n"


def test_table_has_ratios_and_reasons():
    rows = [row("liger", p50=None, status="not installed"), row(p50=0.002, spread=0.001)]
    rows += [row("eager", p50=0.005), row("eager", "reference_bytes", 2**21)]
    rows += [row("eager", "peak_bytes", 3 * 2**20), row("eager", "gradient_error", 2e-3)]
    rows += [row("eager", "loss_error", 1e-3)]
    tokens = {"real_tokens": [[6.0, 9.0], [1.0]], "positions": [[10.0, 10.0], [1.0]]}
    rows += [tables.row(row(), "eager", m, v, "ok", PLACE) for m, v in tokens.items()]
    text = tables.tables(rows)
    assert "kl V=100 rows=10 float32" in text and "torch=1" in text
    palu = ["palu", "2.000", "1.000", "3.000", "2.000", "1.00", "-", "-", "-", "-", "ok"]
    assert line_of(text, "palu") == palu and "of palu" in text
    wanted = ["eager", *["5.000"] * 4, "2.50", "3.0", "2.0", "25.0%", "2.0e-03", "ok"]
    assert line_of(text, "eager") == wanted
    assert line_of(text, "liger")[-2:] == ["not", "installed"]
    assert "growth" not in text


def test_a_mean_is_of_a_process_and_the_median_over_them():
    processes = [[1.0, 5.0], [2.0, 2.0], [10.0, 0.0]]
    one = tables.row(row(), "palu", "seconds", processes, "ok", PLACE)
    assert tables.mean_seconds(one) == 3 and one["p50"] == 2


def test_slopes():
    rows = []
    for n in (10, 20, 40):
        rows += [
            row(rows=n, p50=0.5 + 0.003 * n),
            row(rows=n, metric="allocated_bytes", p50=2**12 * n),
        ]
        rows += [row("lone", p50=1.0)] if n == 10 else []
    growth = tables.tables(rows).split("growth")[1].splitlines()
    assert len(growth) == 2  # a provider at one size has no slope
    cells = growth[1].split()
    assert cells[:5] == ["kl", "V=100", "float32", "palu", "rows"]
    assert cells[5:8] == ["10..40", "3", "4"]
    assert float(cells[8]) < 0.2 and cells[9] == "1.00"


def test_compare():
    old = [row(p50=1.0, spread=0.1), row("b", p50=1.0, spread=0.1), row("c", p50=1.0, spread=0.1)]
    new = [row(p50=1.15, spread=0.1), row("b", p50=1.5, spread=0.1), row("c", p50=0.5)]
    old += [row("d"), row("e", p50=None, status="needs a GPU"), row("g", "loss", 1.0)]
    new += [row("e"), row("f"), row("g", "loss", 2.0)]
    text, worse = tables.compare(old, new)
    assert worse == 1
    last = {line.split()[3]: line for line in text.splitlines() if line.startswith("kl")}
    last |= {line.split()[4]: line for line in text.splitlines() if line.startswith("kl")}
    assert last["palu"].endswith("1.150") and last["b"].split()[-1] == "worse"
    assert last["c"].endswith("better") and last["g"].endswith("2.000")
    assert last["d"].endswith("only in the old") and last["f"].endswith("only in the new")
    assert last["e"].endswith("was: needs a GPU; is: ok")
    assert tables.compare(old, old)[1] == 0


NAMES = ("ops*", "logits_ops", "topk", "scaling", "loss_step*", "train_step*")
RESULTS = sorted(path for name in NAMES for path in machine.RESULTS.glob(f"{name}.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_rows_are_read(path):
    rows = tables.read(path)
    metrics = {row["metric"] for row in rows}
    assert metrics & set(tables.MEMORY) and len(tables.tables(rows)) > 200
    assert all(row["commit"] and row["processor"] and row["versions"] for row in rows)
    assert tables.compare(rows, rows)[1] == 0


def test_readme_s_numbers_are_in_the_rows():
    """Of the loss and of a training step, as the tables print them."""
    wanted = {
        "loss_step": {"released": ("4369", "3245.9"), "sparse+cached": ("564", "136.2")},
        "train_step": {"released": ("6929", "4271.7"), "cached": ("3873", "2449.4")},
    }
    for name, providers in wanted.items():
        text = tables.tables(tables.read(machine.RESULTS / f"{name}.csv")).split("bfloat16")[-1]
        for provider, (mean, peak) in providers.items():
            line = line_of(text, provider)
            assert mean in line[4].split(".") and peak in line


@pytest.mark.parametrize("varied", ["rows", "V", None])
def test_pictures(varied, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    rows = []
    for n in (10, 100, 1000) if varied else (10,):
        for dtype in ("float32", "bfloat16"):
            size = {varied: n} if varied else {}
            rows += [row(name, p50=n * 1e-3, dtype=dtype, **size) for name in ("palu", "eager")]
            rows += [row("eager", "allocated_bytes", n * 2**20, dtype=dtype, **size)]
            rows += [row("fla", p50=None, status="needs a GPU", dtype=dtype, **size)]
    pictures = plot.plot(rows, tmp_path / "kl.csv")
    assert [p.name for p in pictures] == ["kl-float32.png", "kl-bfloat16.png"]
    assert sorted(tmp_path.iterdir()) == sorted(pictures)
    for picture in pictures:
        pixels = pyplot.imread(picture)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05
    missing = [row(p50=None, status="needs a GPU")]
    assert plot.plot(missing, tmp_path / "none.csv") == []
