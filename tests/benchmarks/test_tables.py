"""Tables, slopes, comparisons and pictures say what is in the rows."""

import csv

import pytest

from benchmarks import runner as harness
from benchmarks import suite
from benchmarks import tables as report

PLACE = {"device": "cpu", "processor": "P", "threads": 2, "versions": "torch=1", "commit": "c"}


def row(provider="palu", metric="seconds", p50=1.0, spread=0.0, status="ok", **sizes):
    case = {"kernel": "kl", "V": 100, "D": None, "rows": 10, "k": None, "dtype": "float32"} | sizes
    low, high = (None, None) if p50 is None else (p50 - spread, p50 + spread)
    quantiles = {"p20": low, "p50": p50, "p80": high, "samples": 0 if p50 is None else 3}
    return {**case, "provider": provider, "metric": metric, **quantiles, "status": status, **PLACE}


def line_of(text, start):
    return next(line for line in text.splitlines() if line.startswith(start)).split()


def test_quantiles():
    found = report.quantiles([5, 1, 4, 2, 3, 6])
    assert list(found.values()) == pytest.approx([2, 3.5, 5])
    assert report.quantiles([7]) == {"p20": 7, "p50": 7, "p80": 7}
    assert report.quantiles([]) == {"p20": None, "p50": None, "p80": None}


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [row(k=3), row("peer", p50=None, status="needs a GPU")]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, suite.COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    read = report.read(path)
    as_text = [
        one | {"threads": str(one["threads"]), "samples": str(one["samples"])} for one in rows
    ]
    assert read == as_text
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="has no column kernel"):
        report.read(path)


def test_table_has_ratios_and_reasons():
    rows = [row(p50=0.002, spread=0.001), row("eager", p50=0.005)]
    rows += [row("eager", "peak_bytes", 3 * 2**20), row("eager", "gradient_error", 2e-3)]
    rows += [row("eager", "loss_error", 1e-3), row("fla", p50=None, status="needs a GPU")]
    text = report.tables(rows)
    assert "kl V=100 rows=10 float32" in text and "torch=1" in text
    assert line_of(text, "palu") == ["palu", "2.000", "1.000", "3.000", "1.00", *"---", "ok"]
    wanted = ["eager", "5.000", "5.000", "5.000", "2.50", "3.0", "-", "2.0e-03", "ok"]
    assert line_of(text, "eager") == wanted
    assert line_of(text, "fla")[-3:] == ["needs", "a", "GPU"]
    assert "growth" not in text


def test_slopes():
    rows = []
    for n in (10, 20, 40):
        rows += [
            row(rows=n, p50=0.5 + 0.003 * n),
            row(rows=n, metric="allocated_bytes", p50=2**12 * n),
        ]
        rows += [row("lone", p50=1.0)] if n == 10 else []
    growth = report.tables(rows).split("growth")[1].splitlines()
    assert len(growth) == 2  # a provider at one size has no slope
    cells = growth[1].split()
    assert cells[:5] == ["kl", "V=100", "float32", "palu", "rows"]
    assert cells[5:8] == ["10..40", "3", "4"]
    assert float(cells[8]) < 0.2 and cells[9] == "1.00"


def test_compare():
    old = [row(p50=1.0, spread=0.1), row("b", p50=1.0, spread=0.1), row("c", p50=1.0, spread=0.1)]
    new = [row(p50=1.15, spread=0.1), row("b", p50=1.5, spread=0.1), row("c", p50=0.5)]
    old += [row("d"), row("e", p50=None, status="needs a GPU")]
    new += [row("e"), row("f")]
    text, worse = report.compare(old, new)
    assert worse == 1
    last = {line.split()[4]: line for line in text.splitlines() if line.startswith("kl")}
    assert last["palu"].endswith("1.150")
    assert last["b"].endswith("1.500  worse") or last["b"].split()[-1] == "worse"
    assert last["c"].endswith("better")
    assert last["d"].endswith("only in the old") and last["f"].endswith("only in the new")
    assert last["e"].endswith("was: needs a GPU; is: ok")
    assert report.compare(old, old)[1] == 0


RAW = {
    "loss_step": "provider,dtype,seconds,peak_bytes,forget_loss,vocab,hidden,positions,top_k,"
    "device,processor,threads,versions,commit\n"
    + "".join(f"linear,float32,{s},{p},3,50,8,16,4,cpu,P,2,v,c\n" for s, p in [(1, 9), (3, 7)])
    + "floor,float32,2,,,50,8,16,4,cpu,P,2,v,c\n",
    "train_step": "provider,dtype,grouped,seconds,peak_bytes,gradient_norm,batch_size,top_k,"
    "device,processor,threads,versions,commit\n"
    "live,float32,True,,9,1,8,4,cpu,P,2,v,c\nlive,float32,True,2,9,1,8,4,cpu,P,2,v,c\n",
}


@pytest.mark.parametrize("name", RAW)
def test_rows_of_processes_are_summarised(name, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(RAW[name])
    found = {(r["provider"], r["metric"]): r for r in report.read(path)}
    if name == "loss_step":
        assert found["linear", "seconds"]["p50"] == 2 and found["linear", "peak_bytes"]["p50"] == 8
        assert (found["linear", "seconds"]["V"], found["floor", "seconds"]["p50"]) == (50, 2)
        assert ("floor", "peak_bytes") not in found and len(found) == 3
    else:
        assert found["live, grouped", "seconds"]["samples"] == 1
        assert found["live, grouped", "peak_bytes"]["p50"] == 9 and len(found) == 2
    assert all(r["kernel"] == name for r in found.values())
    assert report.tables(list(found.values())) and report.compare(list(found.values()), [row()])[0]


RESULTS = sorted(harness.RESULTS.glob("*_step*.csv"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_rows_are_read(path):
    rows = report.read(path)
    assert {"peak_bytes"} <= {row["metric"] for row in rows} and len(report.tables(rows)) > 200
    assert report.compare(rows, rows)[1] == 0


def test_rows_of_a_card_have_other_units(tmp_path):
    path = tmp_path / "gpu.csv"
    path.write_text(
        "kernel,provider,V,D,rows,k,dtype,metric,p20,p50,p80,status,versions,hardware,commit\n"
        "kl,palu,9,,4,,bfloat16,ms,1,2,3,,v,H100,c\n"
        "kl,palu,9,,4,,bfloat16,peak MiB,1,1,1,,v,H100,c\n"
    )
    seconds, peak = report.read(path)
    assert (seconds["metric"], seconds["p50"]) == ("seconds", 0.002)
    assert (peak["metric"], peak["p50"]) == ("peak_bytes", 2**20)
    assert "H100 | v | c" in report.tables([seconds, peak])


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
    pictures = report.plot(rows, tmp_path / "kl.csv")
    assert [p.name for p in pictures] == ["kl-float32.png", "kl-bfloat16.png"]
    assert sorted(tmp_path.iterdir()) == sorted(pictures)
    for picture in pictures:
        pixels = pyplot.imread(picture)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.05
    missing = [row(p50=None, status="needs a GPU")]
    assert report.plot(missing, tmp_path / "none.csv") == []
