"""Collators of the user's own: packed or padded anywhere they train to the numbers of palu's, what
they give reaches the model, and what cannot be right is refused by name."""

import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
)

from palu.data.collator import Collator
from palu.loss import PALULoss
from palu.methods import METHODS
from palu.models.inputs import joined, more_inputs, stacked
from palu.reference.cache import CacheError
from palu.training.batching import BatchBuilder, Sharding
from palu.training.collated import ExampleRows
from palu.training.trainer_checks import check_arguments
from tests.support import small
from tests.support.training import config, logged, trainer, weights


def gpt2(tok, seed=0):
    """Learned positions, and a type for every token: both show."""
    torch.manual_seed(seed)
    settings = {"vocab_size": len(tok), "n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**settings, **dropout, initializer_range=0.3)).eval()


def mamba(tok, seed=0):
    """Takes no positions, and reads on over the end of an example."""
    torch.manual_seed(seed)
    settings = {"vocab_size": len(tok), "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    return MambaForCausalLM(MambaConfig(**settings, initializer_range=0.3)).eval()


# ---- other layouts -------------------------------------------------------------------------------


def left(features, positions=True):
    longest = max(len(f["input_ids"]) for f in features)

    def pad(name, value):
        return torch.tensor([[value] * (longest - len(f[name])) + f[name] for f in features])

    mask = pad("attention_mask", 0)
    batch = {"input_ids": pad("input_ids", 0), "labels": pad("labels", -100)}
    batch["attention_mask"] = mask
    if positions:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


def left_without_positions(features):
    return left(features, positions=False)


def packed(features):
    """As packers of one's own do it: with the labels as they are, and a mask of ones."""
    names = ("input_ids", "labels", "attention_mask")
    batch = {n: torch.tensor([[x for f in features for x in f[n]]]) for n in names}
    positions = [i for f in features for i in range(len(f["input_ids"]))]
    return batch | {"position_ids": torch.tensor([positions])}


def numbered(features):
    """The mask says which example a token is of."""
    batch = packed(features)
    numbers = [i for i, f in enumerate(features, 1) for _ in f["input_ids"]]
    del batch["position_ids"]
    return batch | {"attention_mask": torch.tensor([numbers])}


def packed_and_padded(features):
    """Two packed rows, the shorter one padded, without a mask."""
    half = (len(features) + 1) // 2
    rows = [packed(part) for part in (features[:half], features[half:]) if part]
    longest = max(row["input_ids"].shape[1] for row in rows)
    return {
        name: torch.cat(
            [
                nn.functional.pad(
                    row[name],
                    (0, longest - row[name].shape[1]),
                    value=-100 if name == "labels" else 0,
                )
                for row in rows
            ]
        )
        for name in ("input_ids", "labels", "position_ids")
    }


LAYOUTS = {
    "left": left,
    "left_without_positions": left_without_positions,
    "packed": packed,
    "numbered": numbered,
    "packed_and_padded": packed_and_padded,
    "flattened": DataCollatorWithFlattening(),
    "flash": DataCollatorWithFlattening(return_position_ids=False, return_flash_attn_kwargs=True),
    "seq_idx": DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True),
}
SAME = ("numbered", "flash", "seq_idx")  # examples are told apart otherwise, and are the same then


def documents(rows):
    """Rows whose answer begins with the first token: its label is no reason for a loss."""
    return [{**row, "labels": [row["input_ids"][0], *row["labels"][1:]]} for row in rows]


def run(tok, folder, model, collator, **options):
    args = config(folder, per_device_train_batch_size=3, max_steps=2, **options)
    rows = documents(small.rows(tok))
    made = trainer(tok, args, model=model, forget=rows[:3], retain=rows[2:], data_collator=collator)
    made.train()
    return weights(made.model), logged(made), made.evaluate()


@pytest.fixture(scope="module")
def padded(tok, tmp_path_factory):
    """The runs with palu's own collator."""
    makers = (small.model, gpt2, mamba)
    return {
        make: run(tok, tmp_path_factory.mktemp("padded"), make(tok), None, retain_loss="kl")
        for make in makers
    }


# Beside a Llama: what other positions and a model without attention can get wrong.
MODELS = [
    pytest.param(
        *(layout, make),
        marks=[pytest.mark.slow] if make is not small.model and layout in SAME else [],
    )
    for layout in LAYOUTS
    for make in (small.model, gpt2, mamba)
]


@pytest.mark.parametrize(("layout", "make"), MODELS)
def test_any_layout_trains_to_the_numbers_of_padded_rows(tok, tmp_path, padded, make, layout):
    found = run(tok, tmp_path, make(tok), LAYOUTS[layout], retain_loss="kl")
    right = padded[make]
    assert (right[0] - weights(make(tok))).norm() > 0.01
    torch.testing.assert_close(found[0], right[0], rtol=1e-4, atol=1e-5)
    names = ("forget", "preserve", "retain", "num_forget", "num_preserve", "num_retain")
    for one, other in zip(found[1], right[1], strict=True):
        assert [one[n] for n in names] == pytest.approx([other[n] for n in names], rel=1e-4)
    assert found[2]["eval_loss"] == pytest.approx(right[2]["eval_loss"], rel=1e-4)
    assert found[2]["eval_num_forget"] == right[2]["eval_num_forget"] > 0


@pytest.mark.parametrize("options", [{"method": "npo", "beta": 0.5}, {"reference": "cached"}])
def test_packed_examples_stay_examples(tok, tmp_path, options):
    """A method that counts answers, and a cache that knows them by name."""
    options = options | {"max_steps": 2, "retain_loss": "kl"}
    rows = small.rows(tok)
    ends = []
    for name, collator in (("a", None), ("b", LAYOUTS["flash"])):
        args = config(tmp_path / name, **options)
        made = trainer(tok, args, forget=rows[:3], retain=rows[2:], data_collator=collator)
        made.train()
        ends.append(weights(made.model))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_packed_data_set(tok, tmp_path):
    """Rows that were packed beforehand, with palu's own collator."""
    rows = small.rows(tok)
    whole = {name: value[0].tolist() for name, value in packed(rows).items()}
    batch = trainer(tok, config(tmp_path)).data_collator([whole, rows[0]])
    right = Collator(tok)([*rows, rows[0]])
    for name, value in right.items():
        assert torch.equal(batch[name] * right["attention_mask"], value * right["attention_mask"])


def test_every_example_of_a_packed_data_set_counts(tok, tmp_path):
    """Two rows of the data set, of which the second batch is short, are five examples."""
    rows = small.rows(tok)
    whole = [
        {name: value[0].tolist() for name, value in packed(part).items()}
        for part in (rows[:2], rows[2:4], rows[4:])
    ]
    counts = []
    for name, data in (("a", rows), ("b", whole)):
        made = trainer(tok, config(tmp_path / name), forget=data, retain=data)
        made.train()
        counts.append(sum(entry["num_forget"] for entry in logged(made)))
        counts.append(made.evaluate()["eval_num_forget"])
    assert counts[0] == counts[1] == counts[2] == counts[3] > 0


def test_a_data_loader_of_another_process_gets_it(tok, tmp_path):
    """The collator is pickled where workers are spawned, without the trainer or the model."""
    made = trainer(tok, config(tmp_path))
    rows = [made.train_dataset[0]]
    pickled = pickle.dumps(made.data_collator)
    assert b"palu.training.trainer" not in pickled and b"modeling_llama" not in pickled
    collators = pickle.loads(pickled), made.data_collator
    assert torch.equal(*(collator(rows)["palu_roles"].at for collator in collators))


def test_repeats_of_packed_rows_cannot_be_told(tok):
    def builder(rank):
        return BatchBuilder(Sharding(3, 2, rank, 2), None, "step", METHODS["palu"]())

    batch = {"input_ids": torch.ones(5, 3), "labels": torch.ones(5, 3).long()}
    assert len(builder(0).evaluation(batch, 0)["input_ids"]) == 5
    few = {k: v[:2] for k, v in batch.items()}
    assert len(builder(1).evaluation(few, 0)["labels"]) == 1
    with pytest.raises(ValueError, match="3 rows must divide evenly into batches of 2 processes"):
        builder(1).evaluation(batch, 0)


@pytest.mark.parametrize(
    "more, message",
    [
        ({"attention_mask": torch.ones(1, 1, 6, 6)}, "beside packed examples"),
        ({"cu_seq_lens_q": torch.tensor([0, 9])}, "rise from 0 to the length"),
        ({"token_type_ids": torch.ones(2, 2)}, "token_type_ids has shape"),
    ],
)
def test_what_cannot_be_taken_apart(tok, more, message):
    ids = torch.arange(6)[None]
    batch = {"input_ids": ids, "labels": ids, "position_ids": ids % 3, **more}
    with pytest.raises(ValueError, match=message):
        ExampleRows(lambda features: batch, gpt2(tok))([])


# ---- what else the model takes -------------------------------------------------------------------


def with_more(features):
    """Positions that skip, and types: GPT-2 has an embedding for both."""
    batch = Collator(0)(features)
    places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    return batch | {"position_ids": 2 * places, "token_type_ids": 3 + places % 2}


def expected(model, ref, tok, rows, retain):
    batch, kept = with_more(rows), with_more(retain)
    labels, targets = batch.pop("labels"), kept.pop("labels")
    with torch.no_grad():
        ref_logits, ref_kept = ref(**batch).logits, ref(**kept).logits
    loss_fn = PALULoss(top_k=7, objective="entropy", eos_token_id=tok.eos_token_id)
    out = loss_fn(model(**batch).logits, labels, ref_logits)
    answer = targets[:, 1:] != -100
    log_p, log_ref = (x[:, :-1][answer].log_softmax(-1) for x in (model(**kept).logits, ref_kept))
    return out.loss + (log_ref.exp() * (log_ref - log_p)).sum(-1).mean()


@pytest.mark.parametrize("road", ["hidden", "logits"])
@pytest.mark.parametrize("turns", [True, False])
def test_more_inputs_reach_model_and_reference(tok, tmp_path, road, turns):
    rows = small.rows(tok)
    model, ref = gpt2(tok), gpt2(tok, seed=1)
    if road == "logits":
        model.lm_head.register_forward_hook(lambda *args: None)
    args = config(tmp_path, retain_loss="kl", per_device_train_batch_size=3)
    made = trainer(tok, args, model=model, ref_model=ref, data_collator=with_more)
    batch = dict(with_more(rows[:3]), palu_retain=with_more(rows[3:]))
    if turns:
        loss = made.training_step(made.model, batch, 1)
    else:
        loss = made.compute_loss(made.model, batch)
        loss.backward()
    assert made.step_loss.without_logits == (road != "logits")
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    want = expected(model, ref, tok, rows[:3], rows[3:])
    want.backward()
    torch.testing.assert_close(loss, want.detach() if turns else want)
    for one, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-5)


def test_evaluation_and_early_stop_see_them(tok, tmp_path):
    rows = small.rows(tok)[:3]
    args = config(tmp_path, per_device_eval_batch_size=3, stop_at_forget_prob=0.01)
    made = trainer(tok, args, model=gpt2(tok), retain=None, data_collator=with_more)
    stop = next(c for c in made.callback_handler.callbacks if hasattr(c, "forget_probability"))
    batch = with_more(rows)
    labels = batch.pop("labels")
    made.evaluate()
    log_p = gpt2(tok)(**batch).logits.log_softmax(-1)[:, :-1]
    forget = made.method.roles(labels)[:, 1:] == 1
    of_token = log_p.gather(-1, labels[:, 1:, None].clamp(min=0))[..., 0].double()
    mean = torch.stack([p[f].mean().exp() for p, f in zip(of_token, forget, strict=True)]).mean()
    assert stop.forget_probability() == pytest.approx(mean.item(), rel=1e-4)


@pytest.mark.parametrize("method", [{"method": "npo"}, {"method": "rmu"}, {"method": "dpo"}])
def test_methods_see_them(tok, tmp_path, method):
    """A run with other types than 0 is another run: with dropped ones it would be the same."""
    rows = small.rows(tok)[:3]
    rows = [{**r, "alternate_input_ids": r["input_ids"][::-1]} for r in rows]
    rows = [{**r, "alternate_labels": r["alternate_input_ids"]} for r in rows]
    ends = []
    for name, types in (("a", 0), ("b", 5)):

        def collate(features, types=types):
            batch = Collator(tok)(features)
            return batch | {"token_type_ids": torch.full_like(batch["input_ids"], types)}

        args = config(tmp_path / name, max_steps=1, learning_rate=0.0, **method)
        others = {"ref_model": gpt2(tok, seed=1), "data_collator": collate}
        made = trainer(tok, args, model=gpt2(tok), forget=rows, **others)
        made.train()
        ends.append(logged(made)[0])
    assert ends[0]["forget"] != pytest.approx(ends[1]["forget"], rel=1e-3)
    assert ends[0]["retain"] != pytest.approx(ends[1]["retain"], rel=1e-3)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_pairs_of_tokens(tok, tmp_path, padded, kind):
    """`[B, 1, T, T]`: who sees whom."""

    def collate(features):
        batch = Collator(tok)(features)
        real = batch.pop("attention_mask").bool()
        length = real.shape[1]
        seen = real[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
        if kind == "float":
            seen = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return batch | {"attention_mask": seen}

    found, right = (
        run(tok, tmp_path, small.model(tok), collate, retain_loss="kl"),
        padded[small.model],
    )
    torch.testing.assert_close(found[0], right[0], rtol=1e-4, atol=1e-5)
    assert found[2]["eval_loss"] == pytest.approx(right[2]["eval_loss"], rel=1e-4)


def test_an_adapter_switched_off_sees_them(tok, tmp_path):
    peft = pytest.importorskip("peft")
    model = gpt2(tok)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    args = config(tmp_path, max_steps=1, learning_rate=0.0, reference="adapter_off")
    made = trainer(tok, args, model=adapted, data_collator=with_more)
    made.train()
    assert logged(made)[0]["preserve"] == pytest.approx(0, abs=1e-6)


def test_a_cache_knows_nothing_of_them(tok, tmp_path):
    args = config(tmp_path, reference="cached", max_steps=1)
    made = trainer(tok, args, model=gpt2(tok), data_collator=with_more)
    with pytest.raises(CacheError, match="gives the model position_ids, token_type_ids"):
        made.train()
    trainer(tok, args, model=gpt2(tok)).train()  # a cache that is there
    with pytest.raises(CacheError, match="gives the model position_ids, token_type_ids"):
        made.train()


@pytest.mark.parametrize(
    "make, name, value",
    [
        (mamba, "position_ids", lambda ids: torch.arange(ids.shape[1]).expand_as(ids) + 3),
        (small.model, "token_type_ids", torch.ones_like),
        (small.model, "author", torch.zeros_like),
        (small.model, "use_cache", torch.ones_like),
    ],
)
def test_what_the_model_does_not_take_is_named(tok, tmp_path, make, name, value):
    def collate(features):
        batch = Collator(tok)(features)
        return batch | {name: value(batch["input_ids"])}

    made = trainer(tok, config(tmp_path), model=make(tok), data_collator=collate)
    kind = type(make(tok)).__name__
    with pytest.raises(ValueError, match=f"data_collator collate .*{kind} does not take: '{name}'"):
        made.train()


def test_what_says_nothing_is_left_out(tok, tmp_path):
    def collate(features):
        batch = Collator(tok, keep_ids=True)(features)
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        batch["index"] = torch.arange(len(features))
        return transformers.BatchEncoding(batch | {"texts": ["a"] * len(features)})

    made = trainer(tok, config(tmp_path), data_collator=collate)
    assert not more_inputs(made.data_collator(small.rows(tok)))
    made.train()


def test_joining_rows_and_second_answers():
    names = ("input_ids", "labels", "token_type_ids")
    first = {name: torch.ones(1, 2) for name in names}
    second = {name: torch.ones(2, 3) for name in names}
    whole = joined(first, second)
    assert whole.keys() == {*names, "attention_mask"}
    assert all(list(value.shape) == [3, 3] for value in whole.values())
    assert whole["attention_mask"].sum() == 8 and whole["labels"][0, 2] == -100
    both = stacked(first | {f"alternate_{n}": v[:1] for n, v in second.items()})
    assert torch.equal(both["token_type_ids"], whole["token_type_ids"][:2])
    with pytest.raises(ValueError, match="'token_type_ids' is in one batch"):
        joined(first, {n: second[n] for n in ("input_ids", "labels")})
    with pytest.raises(ValueError, match="pixels has shape"):
        joined(first | {"pixels": torch.ones(4)}, second | {"pixels": torch.ones(4)})


# ---- labels --------------------------------------------------------------------------------------


def equal(tok):
    """Rows of one length: collators that cannot pad labels take them."""
    return [{n: v[:12] for n, v in row.items() if n != "example_id"} for row in small.rows(tok)]


def truncating(features):
    return {n: v[:, :10] for n, v in Collator(0)(features).items()}


def shifting(features):
    """Every label at the token before it, as losses without a shift want them."""
    batch = Collator(0)(features)
    return batch | {"labels": nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)}


def from_the_longest(features):
    return Collator(0)(sorted(features, key=lambda row: -len(row["input_ids"])))


@pytest.mark.parametrize(
    "collator, counts",
    [
        (DataCollatorForLanguageModeling, "22 token ids and 0 times -200"),
        (truncating, r"\d+ token ids and \d+ times -200; it"),
        (shifting, "others, elsewhere or in another order"),
    ],
)
@pytest.mark.parametrize("where", ["train", "retain", "eval"])
def test_collators_that_change_labels(tok, tmp_path, collator, counts, where):
    rows = equal(tok)
    name = collator.__name__
    if where != "train":  # they do so on one set alone
        counts = ""
    change = collator(tok, mlm=False) if collator is DataCollatorForLanguageModeling else collator

    class Choosing:
        def __call__(self, features):
            return change(features) if "wrong" in features[0] else Collator(tok)(features)

    wrong = [{**row, "wrong": 1} for row in rows]
    sets = {where: wrong} if where != "train" else {}
    made = trainer(
        tok,
        config(tmp_path, eval_strategy="epoch" if where == "eval" else "no"),
        forget=rows,
        retain=sets.get("retain", rows),
        eval_dataset={"some": sets.get("eval", rows)},
        data_collator=change if where == "train" else Choosing(),
    )
    before, state = weights(made.model), torch.get_rng_state()
    name = name if where == "train" else "Choosing"
    with pytest.raises(
        ValueError, match=rf"data_collator {name} changes labels: \d examples .*{counts}"
    ):
        made.train()
    assert torch.equal(before, weights(made.model))
    if where == "eval":
        assert torch.equal(state, torch.get_rng_state())
        with pytest.raises(ValueError, match="changes labels"):
            made.evaluate()


def test_the_order_of_the_rows_is_free(tok, tmp_path):
    """As packers change it; not where second answers are collated apart."""
    rows = small.rows(tok)
    made = trainer(tok, config(tmp_path), data_collator=from_the_longest)
    found, right = made.data_collator(rows), Collator(tok)(rows)
    assert sorted(found["labels"].tolist()) == sorted(right["labels"].tolist())
    made.train()
    rows = [{**r, "alternate_input_ids": [1, 2, 3], "alternate_labels": [-100, 2, 3]} for r in rows]
    pairs = trainer(
        tok, config(tmp_path, method="dpo"), forget=rows, data_collator=from_the_longest
    )
    with pytest.raises(ValueError, match="from_the_longest changes labels"):
        pairs.data_collator(rows)


def test_a_collator_of_transformers_that_fails_is_named(tok, tmp_path):
    made = trainer(
        tok, config(tmp_path), data_collator=DataCollatorForLanguageModeling(tok, mlm=False)
    )
    with pytest.raises(ValueError, match="data_collator DataCollatorForLanguageModeling cannot"):
        made.train()


@pytest.mark.parametrize("side", ["right", "left"])
def test_collators_that_pad_labels(tok, tmp_path, side, monkeypatch):
    """DataCollatorForSeq2Seq as it is, with ids that are texts; and rounded up."""
    monkeypatch.setattr(tok, "padding_side", side)
    rows = small.rows(tok)
    collator = DataCollatorForSeq2Seq(tok, pad_to_multiple_of=16)
    made = trainer(tok, config(tmp_path), data_collator=collator)
    made.train()
    right = Collator(tok)(rows)
    batch = made.data_collator(rows)
    length = right["labels"].shape[1]
    assert torch.equal(batch["labels"][:, :length], right["labels"])
    assert not (batch["labels"][:, length:] != -100).any()


def test_rows_that_are_padded_already_keep_their_masks(tok, tmp_path):
    """By palu's own collator; one without a mask, as a table has it, is all tokens."""
    bare = small.rows(tok)[:3]
    batch = {name: value.tolist() for name, value in left(bare).items()}
    padded = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    made = trainer(tok, config(tmp_path))
    found, right = made.data_collator(padded), made.data_collator(bare)
    real = right["attention_mask"].bool()
    assert torch.equal(found["attention_mask"].bool(), real)
    for name in ("input_ids", "labels"):
        assert torch.equal(found[name][real], right[name][real])
    absent = [{**row, "attention_mask": None} for row in bare]
    assert torch.equal(Collator(tok)(absent)["attention_mask"], right["attention_mask"])
    with pytest.raises(ValueError, match=r"example 1 of the batch has .* but 1 att"):
        Collator(tok)([bare[0], {**bare[1], "attention_mask": [1]}])


def test_a_collator_that_makes_the_labels(tok, tmp_path):
    rows = [{n: row[n] for n in ("input_ids", "attention_mask")} for row in equal(tok)]
    collator = DataCollatorForLanguageModeling(tok, mlm=False)
    made = trainer(tok, config(tmp_path), forget=rows, retain=rows, data_collator=collator)
    made.train()
    assert logged(made)


@pytest.mark.parametrize(
    "made, message",
    [
        ([1], "returns a list"),
        ({"input_ids": torch.ones(1, 2)}, "gives labels as a NoneType"),
        ({"input_ids": [[1]], "labels": [[1]]}, "gives input_ids as a list"),
        ({"input_ids": torch.ones(1, 2), "labels": torch.ones(1, 3)}, "must be the same"),
    ],
)
def test_what_is_no_batch(tok, tmp_path, made, message):
    with pytest.raises((TypeError, ValueError), match=message):
        trainer(tok, config(tmp_path), data_collator=lambda features: made).train()


def test_workers(tok, tmp_path):
    """The collator goes to processes of their own."""
    args = config(tmp_path, max_steps=1, dataloader_num_workers=1)
    made = trainer(tok, args, data_collator=LAYOUTS["flattened"])
    made.train()
    assert logged(made)


# ---- streams, and rows left out ------------------------------------------------------------------


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_streams(tok, tmp_path):
    rows = small.rows(tok)[:3]
    args = config(
        tmp_path, max_steps=1, per_device_train_batch_size=3, per_device_eval_batch_size=3
    )
    found = []
    for data in (rows, Stream(rows)):
        collator = DataCollatorWithFlattening()
        found.append(trainer(tok, args, forget=data, data_collator=collator).evaluate())
    names = [name for name in found[0] if name.endswith(("forget", "preserve", "retain", "loss"))]
    assert [found[0][n] for n in names] == pytest.approx([found[1][n] for n in names])
    with pytest.raises(TypeError, match="retain_dataset is a Stream without a length"):
        trainer(tok, config(tmp_path), retain=Stream(rows))
    made = trainer(tok, config(tmp_path, reference="cached", max_steps=1), forget=Stream(rows))
    with pytest.raises(CacheError, match="the forget set is a Stream without a length"):
        made.train()


def test_a_stream_that_would_be_dealt_out_by_one_process_is_refused(tmp_path, monkeypatch):
    """accelerate's default for streams: the main process cuts up batches, of tensors alone."""
    args, stream = config(tmp_path), Stream([])
    monkeypatch.setattr(type(args), "world_size", 2)
    for forget, evaluation in ((stream, None), ([{}], stream)):
        with pytest.raises(ValueError, match="'dispatch_batches': False"):
            check_arguments(args, forget, None, evaluation, {})
    args.accelerator_config.dispatch_batches = False
    check_arguments(args, stream, None, stream, {})


def test_evaluation_leaves_no_row_out(tok, tmp_path):
    """`dataloader_drop_last` with a batch that the evaluation set does not fill."""
    args = config(tmp_path, dataloader_drop_last=True, per_device_eval_batch_size=4)
    found = trainer(tok, args).evaluate()
    assert found["eval_num_forget"] > 0 and args.dataloader_drop_last
