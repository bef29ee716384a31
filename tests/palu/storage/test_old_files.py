"""Checkpoints, caches and `palu.json` that were written before the redesign are still read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.models.loading import load_model, load_tokenizer
from palu.reference.cache import CacheDamaged, ReferenceCache
from palu.reference.verify import verify_cache
from palu.run_record import choose_template, read_record
from tests.support.command import palu_in

OLD = Path(__file__).parents[2] / "data" / "before_redesign"
VERSION = json.loads((OLD / "whole/palu.json").read_text())["versions"]["transformers"]
# Fingerprints of a model and the settings of a run hold what that version names.
same_transformers = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"written with transformers {VERSION}"
)
COMMAND = """unlearn --model model --forget forget.jsonl --retain retain.jsonl --retain-loss kl
    --objective flatten --prefix-length 3 --forget-weight 1
    --reference cached --reference-cache cache --top-k 5 --batch-size 2 --epochs 3
    --learning-rate 1e-2 --save-steps 2 --device cpu --output out --resume"""


@pytest.fixture
def old(tmp_path):
    return shutil.copytree(OLD, tmp_path / "old")


@same_transformers
def test_a_run_goes_on_from_its_checkpoint_and_cache(old, monkeypatch, capsys):
    status, said, error = palu_in(old, monkeypatch, capsys)(*COMMAND.split())
    assert status == 0, error
    assert "Resuming from out-checkpoints/checkpoint-2" in said and "was read from cache" in said
    resumed, whole = (load_file(old / name / "model.safetensors") for name in ("out", "whole"))
    start = load_file(old / "model/model.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(start[name], value, rtol=1e-4, atol=1e-5), name
    curves = [read_record(old / name)["loss_curve"] for name in ("out", "whole")]
    assert len(curves[0]) == len(curves[1]) == 6
    for now, then in zip(*curves, strict=True):
        assert {name: now[name] for name in then} == pytest.approx(then, rel=1e-4, abs=1e-6)


def test_a_cache_is_opened_and_no_byte_of_it_may_differ(old):
    cache = ReferenceCache.open(old / "cache")
    assert cache.info()["rows"] == {"forget": 6, "preserve": 18, "retain": 10}
    assert cache.head.weight.equal(
        load_file(old / "model/model.safetensors")["model.embed_tokens.weight"]
    )
    path = old / "cache/manifest.json"
    path.write_text(path.read_text().replace('"top_k": 5', '"top_k": 4'))
    with pytest.raises(CacheDamaged, match=r"manifest\.json' is damaged"):
        ReferenceCache.open(old / "cache")


@same_transformers
def test_the_numbers_of_a_cache_are_the_models(old):
    tokenizer, template = load_tokenizer(old / "model"), choose_template(old / "whole")
    forget, retain = (
        tokenize_examples(
            load_examples(old / name, require_spans=False),
            tokenizer,
            max_length=64,
            template=template,
        )
        for name in ("forget.jsonl", "retain.jsonl")
    )
    given = {"dataset": forget, "retain_dataset": retain, "tokenizer": tokenizer}
    worst = verify_cache(old / "cache", model=load_model(old / "model"), **given)
    assert worst.keys() == {"hidden", "indices"}
