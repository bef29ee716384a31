"""The reference cache: the live model's numbers, or an error that says why not."""

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import palu.reference.build
import palu.reference.rows
import palu.reference.store
from palu.data.collator import Collator
from palu.data.roles import FORGET, IGNORE, PRESERVE
from palu.data.template import Template
from palu.models.forward import model_hidden_states, shift_to_logits
from palu.reference.cache import CacheError, CacheMismatch, ReferenceCache
from palu.storage.fingerprint import example_id, example_ids, model_fingerprint
from palu_kernels import topk_indices
from tests.support import small
from tests.support.caches import builder, loss_of, padded


def live(model, batch, loss):
    """Indices of forget rows, by the model's own logits; hidden states of preserve rows and of
    answer rows."""
    roles = loss.roles(batch["labels"])
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        hidden = model_hidden_states(model, batch["input_ids"], batch["attention_mask"])
    return (
        topk_indices(logits[shift_to_logits(roles == FORGET)], loss.top_k),
        hidden[shift_to_logits(roles == PRESERVE)],
        hidden[shift_to_logits(batch["labels"] != IGNORE)],
    )


# ---- the numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "length", "left"),
    [([0, 1, 2, 3], 40, False), ([3, 1], 33, False), ([2, 0, 3], 48, True), ([3], 40, True)],
)
def test_the_rows_of_the_live_model(build, tok, rows, order, length, left):
    model, loss = small.model(tok), loss_of(tok)
    cache = build(model, retain_dataset=rows[2:])
    batch = padded([rows[i] for i in order], length, left)
    indices, preserve, _ = live(model, batch, loss)
    ids = example_ids(batch)
    assert ids.tolist() == [example_id(rows[i]) for i in order]
    found = cache.forget_indices(ids)
    assert found.dtype == torch.int32 and torch.equal(found, indices)
    assert found.shape == ((loss.roles(batch["labels"]) == FORGET).sum(), 7)
    # Other batches and other padding sum in another order: a float32 rounding or two.
    torch.testing.assert_close(cache.preserve_hidden(ids), preserve, rtol=1e-5, atol=1e-5)
    kept = padded([rows[4], rows[2]], length, left)
    answers, found = live(model, kept, loss)[2], cache.retain_hidden(example_ids(kept))
    torch.testing.assert_close(found, answers, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float64, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, None),
        (torch.float16, None),
    ],
)
def test_dtypes_and_autocast(build, tok, rows, dtype, autocast):
    model, loss = small.model(tok).to(dtype), loss_of(tok, top_k=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own takes no part
        cache = build(model, loss=loss, autocast_dtype=autocast, batch_size=1)
    for row in rows[:4]:
        batch = padded([row], len(row["labels"]))  # as it was at the build: nothing may differ
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            indices, preserve, _ = live(model, batch, loss)
        assert torch.equal(cache.forget_indices(example_ids(batch)), indices)
        found = cache.preserve_hidden(example_ids(batch))
        assert found.dtype == (autocast or dtype)
        assert torch.equal(found, preserve.to(found.dtype))  # as the head's product takes it
    ReferenceCache.open(cache.path, model=model, autocast_dtype=autocast)
    with pytest.raises(
        CacheMismatch, match=r"autocast is (none|bfloat16) in the cache and float16"
    ):
        ReferenceCache.open(cache.path, model=model, autocast_dtype=torch.float16)
    other = torch.float32 if dtype == torch.float64 else torch.float64
    with pytest.raises(CacheMismatch, match=f"dtype is {cache.manifest['dtype']} in the cache"):
        ReferenceCache.open(cache.path, model=model.to(other), autocast_dtype=autocast)


SIZES = {
    "vocab_size": 331,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=3.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
        lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    ],
    ids=["softcap, tied", "scale", "bias"],
)
def test_heads_with_bias_scale_and_cap(build, tok, rows, make):
    torch.manual_seed(0)
    model, loss = make().eval(), loss_of(tok, top_k=10**6)
    head = model.get_output_embeddings()
    if head.bias is not None:
        torch.nn.init.normal_(head.bias, std=3.0)
    all_of_it = build(model, "all", loss)
    cache = build(model)
    batch = padded(rows[:4], 40)
    indices, _, _ = live(model, batch, loss_of(tok))
    ids = example_ids(batch)
    assert torch.equal(cache.forget_indices(ids), indices)
    assert torch.equal(all_of_it.forget_indices(ids), torch.arange(331).expand(len(indices), -1))
    assert all_of_it.forget_indices(ids).dtype == torch.int32
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        roles = loss.roles(batch["labels"])
        preserved = cache.head.logits(cache.preserve_hidden(ids))
    expected = expected[shift_to_logits(roles == PRESERVE)]
    torch.testing.assert_close(preserved, expected, rtol=1e-4, atol=1e-4)
    ReferenceCache.open(all_of_it.path, loss=loss_of(tok, top_k=500))  # k >= V is all of V


def test_logits_that_a_softcap_makes_ties_are_ranked_before_it(build, tok, rows):
    torch.manual_seed(0)
    sizes = SIZES | {"head_dim": 8, "initializer_range": 4.0}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=3.0)).bfloat16().eval()
    loss = loss_of(tok)
    cache = build(model, batch_size=1)
    for row in rows[:4]:
        batch = padded([row], len(row["labels"]))
        at = shift_to_logits(loss.roles(batch["labels"]) == FORGET)
        with torch.no_grad():
            hidden = model_hidden_states(model, batch["input_ids"], batch["attention_mask"])[at]
            logits = hidden @ model.lm_head.weight.T
        assert torch.equal(cache.forget_indices(example_ids(batch)), topk_indices(logits, 7))


def test_what_is_not_needed_is_not_stored(build, tok, rows):
    model, ids = small.model(tok), [example_id(row) for row in rows[:4]]
    current = build(model, "current", loss_of(tok, select_from="current"))
    only = build(model, "only", loss_of(tok, preserve=None))
    retain = build(
        model, "retain", loss_of(tok, select_from="current", preserve=None), retain_dataset=rows[3:]
    )
    nll = build(model, "nll", loss_of(tok, preserve="nll"))
    roles = loss_of(tok).roles(padded(rows[:4], 40)["labels"])
    forget, preserve = (roles == FORGET).sum(), (roles == PRESERVE).sum()
    answers = (padded(rows[3:], 40)["labels"] != IGNORE).sum()
    assert current.info()["rows"] == {"forget": 0, "preserve": preserve, "retain": 0}
    assert only.info()["rows"] == {"forget": forget, "preserve": 0, "retain": 0}
    assert retain.info()["rows"] == {"forget": 0, "preserve": 0, "retain": answers}
    assert nll.info()["rows"] == {"forget": forget, "preserve": preserve, "retain": 0}
    for read, words in [
        (current.forget_indices, "no top-k indices"),
        (only.preserve_hidden, "no forget rows"),
        (retain.preserve_hidden, "no forget rows"),
        (nll.retain_hidden, "no retain rows"),
    ]:
        with pytest.raises(CacheMismatch, match=words):
            read(ids)
    with pytest.raises(CacheError, match="nothing to store"):
        build(model, "none", loss_of(tok, select_from="current", preserve=None))


def test_no_rows_and_duplicates(build, tok, rows):
    model = small.model(tok)
    cache = build(model, data=[rows[3], rows[0], rows[3], rows[3]])
    assert cache.info()["examples"] == {"forget": 2}
    silent, other = example_id(rows[3]), example_id(rows[0])  # rows[3] has no span
    assert cache.forget_indices([silent]).shape == (0, 7)
    assert cache.forget_indices([silent]).dtype == torch.int32
    assert cache.preserve_hidden([]).shape == (0, 16)
    twice = cache.forget_indices(torch.tensor([other, silent, other]))
    assert torch.equal(twice, cache.forget_indices([other]).repeat(2, 1)) and len(twice) == 4
    without = build(model, "without", data=[rows[3]])
    assert without.forget_indices([silent]).shape == (0, 7)


def test_the_build_leaves_the_model_and_the_random_state(build, tok):
    model = small.model(tok, attention_dropout=0.5).train()
    model.model.layers[1].eval()
    model.model.embed_tokens.requires_grad_(False)
    modes = [m.training for m in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    cache = build(model)
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(
        build(model.eval(), "eval").preserve_hidden(cache._pieces["forget", "hidden"]),
        cache.preserve_hidden(cache._pieces["forget", "hidden"]),
    )


@pytest.mark.parametrize("tied", [False, True])
def test_the_frozen_head(build, tok, tied):
    model = small.model(tok, tie_word_embeddings=tied)
    before = model.lm_head.weight.detach().clone()
    cache = build(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert torch.equal(cache.head.weight, before) and cache.head.bias is None
    assert not cache.head.requires_grad and cache.to("cpu").head.weight.equal(before)
    with torch.no_grad():
        model.lm_head.weight.copy_(before)
    # Frozen: there is nothing to keep. Tied: the head trains when the embedding does.
    model.requires_grad_(False)
    model.model.embed_tokens.requires_grad_(True)
    assert (build(model, "frozen").head is not None) == tied
    assert build(model, "asked", train_head=True).head is not None
    assert build(model, "refused", train_head=False).head is None


def test_logits_are_never_held_for_all_rows(build, tok, monkeypatch):
    sizes = []
    monkeypatch.setattr(palu.reference.rows, "LOGITS_BYTES", 3 * 4 * len(tok))
    monkeypatch.setattr(
        palu.reference.rows,
        "topk_indices",
        lambda logits, *a, **k: sizes.append(len(logits)) or topk_indices(logits, *a, **k),
    )
    cache = build(small.model(tok), batch_size=4)
    assert sizes == [3, 3, 2]  # of eight rows
    monkeypatch.undo()
    ids = list(cache._pieces["forget", "hidden"])
    assert torch.equal(cache.forget_indices(ids), build(small.model(tok), "b").forget_indices(ids))


def test_peft_models_are_taken_as_they_are(build, tok, rows):
    from peft import LoraConfig, get_peft_model

    base = small.model(tok)
    plain = build(base, "plain")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], lora_alpha=64))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    cache = build(model, "lora")
    assert cache.head is None  # LoRA leaves the head alone
    batch = padded(rows[:4], 40)
    indices = live(model, batch, loss_of(tok))[0]
    assert torch.equal(cache.forget_indices(example_ids(batch)), indices)
    assert not torch.equal(plain.forget_indices(example_ids(batch)), indices)
    assert ReferenceCache.open(cache.path, model=model).starting_model == cache.starting_model
    with model.disable_adapter(), pytest.raises(CacheMismatch, match="model is"):
        ReferenceCache.open(cache.path, model=model)
    model.peft_config["default"].lora_alpha = 32  # not in any tensor
    with pytest.raises(CacheMismatch, match="model is"):
        ReferenceCache.open(cache.path, model=model)
    headed = get_peft_model(small.model(tok), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(CacheError, match="cannot be cached, use reference='live'"):
        build(headed, "headed")


def test_hidden_states_that_are_not_finite(build, tok, rows):
    model = small.model(tok)
    with torch.no_grad():
        token = (set(rows[2]["input_ids"]) - set(rows[0]["input_ids"])).pop()
        model.model.embed_tokens.weight[token] = float("inf")
    with pytest.raises(FloatingPointError, match=r"hidden states are not finite in the forget set"):
        build(model)


# ---- what does not fit ---------------------------------------------------------------------------


def test_an_open_that_fits(build, tok, rows):
    model, data = small.model(tok), rows[:4]
    cache = build(model, retain_dataset=rows[3:])
    other_loss = loss_of(tok, objective="entropy", preserve="nll", eos_token_id=[tok.eos_token_id])
    opened = ReferenceCache.open(
        cache.path,
        model=torch.nn.DataParallel(model),
        dataset=[*data[::-1], data[0]],  # neither order nor repetition matters
        retain_dataset=rows[3:],
        loss=other_loss,
        tokenizer=tok,
        template=Template(),
    )
    assert opened.manifest == cache.manifest
    needs_less = loss_of(tok, top_k=3, select_from="current", preserve=None)
    ReferenceCache.open(cache.path, loss=needs_less)
    tok(["a b", "c"], padding=True, truncation=True, max_length=9)  # state of a call, no rule
    model.config.use_cache = False  # as the Trainer does
    model.config.pad_token_id = 7
    ReferenceCache.open(cache.path, model=model, tokenizer=tok)


def changed(change):
    """The model, after something is done to it."""

    @torch.no_grad()
    def given(model, tok, rows):
        change(model)
        return {"model": model}

    return given


def a_tokenizer(model, tok, rows):
    other = small.tokenizer()
    other.chat_template = "{{ messages }}"
    return {"tokenizer": other}


MISMATCHES = {
    "weight": (
        changed(lambda m: m.model.layers[1].mlp.down_proj.weight[3, 4].add_(1e-3)),
        r"model is [0-9a-f]{12} in the cache and [0-9a-f]",
    ),
    "setting": (changed(lambda m: setattr(m.config, "rms_norm_eps", 1e-3)), "model is"),
    "buffer": (changed(lambda m: m.model.rotary_emb.inv_freq.mul_(1.01)), "model is"),
    "head": (changed(lambda m: m.lm_head.weight[1, 1].zero_()), "model is"),
    "dtype": (changed(lambda m: m.half()), "dtype is float32 in the cache and float16"),
    "autocast": (
        lambda m, t, r: {"model": m, "autocast_dtype": torch.bfloat16},
        "autocast is none in the cache and bfloat16",
    ),
    "fewer rows": (
        lambda m, t, r: {"dataset": r[:3]},
        r"forget data is [0-9a-f]{12} \(4 examples\) .* \(3 examples\)",
    ),
    "more rows": (lambda m, t, r: {"dataset": r}, r"forget data .*\(5 examples\) here"),
    "one label": (
        lambda m, t, r: {"dataset": [*r[:3], {**r[3], "labels": [*r[3]["labels"][:-1], -100]}]},
        "forget data",
    ),
    "no retain": (lambda m, t, r: {"retain_dataset": r[4:]}, "built without a retain set"),
    "k": (lambda m, t, r: {"loss": loss_of(t, top_k=8)}, "top_k is 7 in the cache and 8 here"),
    "prefix": (
        lambda m, t, r: {"loss": loss_of(t, prefix_length=3)},
        "prefix_length is 2 in the cache and 3 here",
    ),
    "eos": (
        lambda m, t, r: {"loss": loss_of(t, eos_token_id=[5, 4])},
        r"eos_token_id is \[1\] in the cache and \[4, 5\] here",
    ),
    "tokenizer": (a_tokenizer, "tokenizer is"),
    "template": (
        lambda m, t, r: {"template": Template(date_string="1 May 2020")},
        "template is Template.*10 Apr 2025.* in the cache and Template.*1 May 2020",
    ),
    "starting model": (
        lambda m, t, r: {"model": m, "starting_model": "ab" * 32},
        "model is .* and abababababab here",
    ),
    "two things": (
        lambda m, t, r: {"dataset": r, "loss": loss_of(t, top_k=8)},
        "top_k is 7 .*; forget data .* name another folder, or delete this one",
    ),
}


@pytest.fixture(scope="module")
def known(tok, tmp_path_factory):
    """A cache that no test changes."""
    return builder(tok, tmp_path_factory.mktemp("known"))(small.model(tok)).path


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_is_named(known, tok, rows, name):
    change, words = MISMATCHES[name]
    with pytest.raises(CacheMismatch, match=words) as caught:
        ReferenceCache.open(known, **change(small.model(tok), tok, rows))
    assert str(known) in str(caught.value) and "palu cache build" in str(caught.value)


def test_a_cache_that_holds_too_little(build, tok):
    model = small.model(tok)
    current = build(model, "current", loss_of(tok, select_from="current"))
    with pytest.raises(CacheMismatch, match="select_from is current in the cache and reference"):
        ReferenceCache.open(current.path, loss=loss_of(tok))
    only = build(model, "only", loss_of(tok, preserve=None))
    with pytest.raises(CacheMismatch, match="preserve is None in the cache and reverse_kl here"):
        ReferenceCache.open(only.path, loss=loss_of(tok))
    frozen = build(model, "frozen", train_head=False)
    with pytest.raises(CacheMismatch, match="training may change the output head"):
        ReferenceCache.open(frozen.path, model=model)
    ReferenceCache.open(frozen.path, model=model, train_head=False)
    ReferenceCache.open(frozen.path, model=model.requires_grad_(False))


def test_a_resumed_run_accepts_its_cache(build, tok, rows, tmp_path):
    model = small.model(tok)
    cache = build(model)
    started = cache.starting_model
    assert started == model_fingerprint(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01)
    with pytest.raises(CacheMismatch, match="model is"):
        ReferenceCache.open(cache.path, model=model)
    options = {"loss": loss_of(tok), "tokenizer": tok, "train_head": True}
    ReferenceCache.open(cache.path, model=model, dataset=rows[:4], starting_model=started)
    ReferenceCache.open_or_build(model, rows[:4], cache.path, starting_model=started, **options)
    with pytest.raises(CacheMismatch, match="it is not the starting model"):
        ReferenceCache.open_or_build(
            model, rows[:4], tmp_path / "none", starting_model=started, **options
        )
    # Where the model's own head stands in for the reference's, it must not have been trained.
    frozen = build(model, "frozen", train_head=False)
    options = {"train_head": False, "starting_model": frozen.starting_model}
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)
    ReferenceCache.open(frozen.path, model=model, **options)
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    with pytest.raises(CacheMismatch, match="head is"):
        ReferenceCache.open(frozen.path, model=model, **options)


def test_open_or_build(build, tok, rows, tmp_path):
    model, path = small.model(tok), tmp_path / "deep" / "cache"
    made = ReferenceCache.open_or_build(model, rows, path, loss=loss_of(tok), tokenizer=tok)
    when = (path / "manifest.json").stat().st_mtime_ns
    again = ReferenceCache.open_or_build(model, rows, path, loss=loss_of(tok), tokenizer=tok)
    assert again.manifest == made.manifest and (path / "manifest.json").stat().st_mtime_ns == when
    with pytest.raises(CacheMismatch, match="top_k is 7 in the cache and 8 here"):
        ReferenceCache.open_or_build(model, rows, path, loss=loss_of(tok, top_k=8))


def test_an_example_that_is_not_there(build, tok, rows):
    cache = build(small.model(tok), retain_dataset=rows[3:])
    ids = [example_id(row) for row in rows]
    for read in (cache.forget_indices, cache.preserve_hidden):
        with pytest.raises(CacheMismatch, match=r"example 1 of the batch \(id \d+\) is not in the"):
            read([ids[0], ids[4]])
    with pytest.raises(CacheMismatch, match="is not in the retain set"):
        cache.retain_hidden([ids[0]])


def test_ids(tok, rows):
    ids = example_ids(Collator(tok)(rows))
    assert ids.dtype == torch.int64 and ids.min() >= 0 and len(set(ids.tolist())) == len(rows)
    assert ids.tolist() == [example_id(row) for row in rows]
    for left in (False, True):
        assert torch.equal(example_ids(padded(rows, 50, left)), ids)
    tensors = {key: torch.tensor(rows[0][key]) for key in ("input_ids", "labels")}
    assert example_id(tensors) == ids[0]
    before = [{k: [0, 0, *v] for k, v in rows[0].items() if k != "example_id"}]
    assert example_id(before[0]) == ids[0]  # padded beforehand, as its mask says
    for key in ("input_ids", "labels"):
        other = dict(rows[0], **{key: [7, *rows[0][key][1:]]})
        assert example_id(other) != ids[0]


def test_two_examples_with_one_id(build, tok, rows, monkeypatch):
    monkeypatch.setattr(palu.reference.build, "example_id", lambda row: 5)
    with pytest.raises(CacheError, match=r"rows 0 and 1 of the forget set are different .* id 5"):
        build(small.model(tok))


def test_bad_arguments(build, tok, rows, tmp_path):
    model = small.model(tok)
    ragged, no_labels = {"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1]}
    for error, words, changes in [
        (ValueError, "batch_size is 0", {"batch_size": 0}),
        (ValueError, "shard_bytes is 0", {"shard_bytes": 0}),
        (ValueError, "autocast_dtype is torch.int8", {"autocast_dtype": torch.int8}),
        (CacheError, "the forget set must have at least one row", {"data": []}),
        (CacheError, "row 1 of the forget set has no 'labels'", {"data": [rows[0], no_labels]}),
        (CacheError, "row 0 of the forget set has 2 input_ids but 1 labels", {"data": [ragged]}),
        (CacheError, "the collator changes examples", {"collator": lambda b: Collator(0)(b[::-1])}),
    ]:
        with pytest.raises(error, match=words):
            build(model, **changes)
    wrong = dict(rows[0], labels=[*rows[0]["labels"][:-1], 330])
    with pytest.raises(CacheError, match="forget set: labels holds 330"):
        build(model, data=[wrong])
    for odd, words in ((330, "input_ids holds 330"), (-1, "input_ids holds -1"), (2.0, "float32")):
        wrong = dict(rows[1], input_ids=[*rows[1]["input_ids"][:-1], odd])
        with pytest.raises(CacheError, match=f"row 1 of the forget set.*{words}"):
            build(model, data=[rows[0], wrong])
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_not_empty(build, tok, tmp_path):
    model = small.model(tok)
    (tmp_path / "cache").mkdir()
    old = build(model)  # an empty folder is none
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    for name in ("cache", "other"):
        with pytest.raises(FileExistsError, match="is not empty"):
            build(model, name, loss_of(tok, top_k=3))
    assert ReferenceCache.open(old.path).manifest["top_k"] == 7
    build(model, loss=loss_of(tok, top_k=3), overwrite=True)
    assert ReferenceCache.open(old.path).manifest["top_k"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "other"]
