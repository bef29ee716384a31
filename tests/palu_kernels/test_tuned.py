"""Settings that were measured on a card: which launch takes which, and what is refused."""

import json

import pytest
import torch

from palu_kernels import kl_loss, reference, tuned
from palu_kernels.triton.row_io import RowLaunch
from palu_kernels.tuned import Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ENTRY = {"reads": 1, "writes": 0, "bytes": 2, "columns": 128256, "rows": 256}
ENTRY |= {"block": 1024, "warps": 4, "programs": 8, "microseconds": 12.5}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files that are read as if this machine were an sm_90."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    tuned._nearest.cache_clear()
    tuned.read.cache_clear()
    yield tmp_path
    tuned._nearest.cache_clear()
    tuned.read.cache_clear()


def put(folder, *entries):
    content = {"card": "a card", "settings": [ENTRY | entry for entry in entries]}
    (folder / "sm_90.json").write_text(json.dumps(content))


def rows(columns, count=2, dtype=torch.bfloat16):
    return torch.zeros(count, columns, dtype=dtype)


def test_without_a_file_the_launcher_s_own_settings_hold(folder):
    launch = RowLaunch.of(rows(128256))
    assert (launch.block, launch.warps) == (4096, 8)


def test_a_launch_takes_what_was_measured_nearest_to_it(folder):
    put(
        folder,
        {"columns": 128256, "rows": 1, "block": 8192},
        {"columns": 128256, "rows": 256, "warps": 16},
        {"columns": 32000, "rows": 256, "block": 512},
        {"writes": 1, "block": 256},
        {"bytes": 4, "block": 2048, "warps": 2},
    )
    wide, out = rows(128256), rows(128256)
    assert (RowLaunch.of(wide[:1]).block, RowLaunch.of(wide[:1]).warps) == (8192, 4)
    assert RowLaunch.of(rows(100000, 4096)).warps == 16  # columns first, then rows
    assert RowLaunch.of(rows(20000, 1)).block == 512
    assert RowLaunch.of(wide, out=out).block == 256
    assert RowLaunch.of(rows(128256, dtype=torch.float32)).warps == 2
    assert RowLaunch.of(wide, wide).block == 4096  # two reads were not measured
    assert RowLaunch.of(rows(4096)).block == 4096 and RowLaunch.of(rows(99)).block == 256


def test_programs_a_multiprocessor(folder):
    put(folder, {"block": 1024, "programs": 1})
    assert RowLaunch.of(rows(128256, 132)).splits == 1  # of 132 multiprocessors
    put(folder, {"block": 1024, "programs": 4})
    tuned.read.cache_clear()
    tuned._nearest.cache_clear()
    assert RowLaunch.of(rows(128256, 132)).splits == 4


def test_a_sweep_gives_every_launch_its_settings(folder):
    put(folder, {})
    with tuned.trying(Settings(2048, 2, 3)):
        launch = RowLaunch.of(rows(128256))
    assert (launch.block, launch.warps) == (2048, 2)
    assert RowLaunch.of(rows(128256)).block == 1024


def test_results_are_the_same_under_other_settings():
    generator = torch.Generator().manual_seed(0)
    logits, reference_logits = (torch.randn(3, 9001, generator=generator) for _ in range(2))
    logits, reference_logits = logits.to(DEVICE), reference_logits.to(DEVICE)
    truth = reference.kl_loss(logits.double(), reference_logits.double(), direction="reverse")
    for settings in (Settings(512, 2, 1), Settings(1024, 4, 16)):
        with tuned.trying(settings):
            losses = kl_loss(logits, reference_logits, reduction="none", backend="triton")
        torch.testing.assert_close(losses.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "list indices must be integers"),
        ("{}", "has no 'settings'"),
        ({"rows": 0}, r"settings\[0\].rows is 0; it must be at least 1"),
        ({"rows": "1"}, r"settings\[0\].rows is '1'; it must be a number of things"),
        ({"block": 3000}, r"settings\[0\].block is 3000; it must be a power of two from 256 to"),
        ({"block": 128}, r"settings\[0\].block is 128; it must be a power of two from 256"),
        ({"warps": 64}, r"settings\[0\].warps is 64; it must be a power of two from 1 to 32"),
        ({"programs": True}, r"settings\[0\].programs is True"),
        (["programs"], "has no 'programs'"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_name(folder, content, message):
    path = folder / "sm_90.json"
    if isinstance(content, str):
        path.write_text(content)
    elif isinstance(content, list):
        entry = {name: value for name, value in ENTRY.items() if name not in content}
        path.write_text(json.dumps({"settings": [entry]}))
    else:
        put(folder, content)
    with pytest.raises(ValueError, match=message) as raised:
        RowLaunch.of(rows(128256))
    assert str(path) in str(raised.value)


def test_committed_files_are_read():
    for path in tuned.FOLDER.glob("*.json"):
        assert tuned.read(path), path
