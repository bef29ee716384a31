"""`PALUTrainer` with names of models, adapters to be made, and records that are no tokens yet."""

import json

import datasets
import pandas
import pytest
import torch
from peft import LoraConfig
from transformers import DataCollatorWithFlattening, PrinterCallback

from palu.data.examples import tokenize_examples
from palu.data.files import load_examples
from palu.data.template import Template
from palu.reference.model import AdapterOffReference
from palu.training.trainer import PALUTrainer
from tests.support import small
from tests.support.command import write_model
from tests.support.training import config

RECORDS = [
    {"prompt": q, "completion": a, "spans": [{"start": s, "end": e} for s, e in spans]}
    for q, a, spans in small.FACTS
]
KEPT = [{"question": q, "answer": a} for q, a, _ in small.FACTS[3:]]
OTHER = Template(question="Q {question} A:")


@pytest.fixture(scope="module")
def tok():
    return small.tokenizer()


def made(model, args, forget, retain=KEPT, **options):
    trainer = PALUTrainer(model, args, train_dataset=forget, retain_dataset=retain, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.texts_compared = True
    return trainer


def trained(*args, **options):
    trainer = made(*args, **options)
    trainer.train()
    return {name: value.detach() for name, value in trainer.model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_records_train_as_their_tokens_do(tok, tmp_path):
    how = {"max_length": 64, "template": OTHER}
    forget = tokenize_examples(load_examples(RECORDS[:3], require_spans=True), tok, **how)
    retain = tokenize_examples(load_examples(KEPT, require_spans=False), tok, **how)

    def run(forget, retain, **options):
        options["processing_class"] = tok
        return trained(small.model(tok), config(tmp_path), forget, retain, **options)

    right = run(forget, retain)
    assert not same(right, small.model(tok).state_dict()), "something was learned"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:3]))
    sources = [RECORDS[:3], datasets.Dataset.from_list(RECORDS[:3])]
    sources += [pandas.DataFrame(RECORDS[:3]), path, str(path)]
    for source in sources:
        assert same(run(source, KEPT, **how), right)
    assert not same(run(RECORDS[:3], KEPT), right), "the template counts"
    with pytest.warns(UserWarning, match=r"^train_dataset: .* are cut at max_length=12"):
        made(small.model(tok), config(tmp_path), RECORDS[:3], processing_class=tok, max_length=12)


def test_second_answers_of_records(tok, tmp_path):
    own = [record | {"alternate_answer": "No idea."} for record in RECORDS[:3]]
    for method, records in (("dpo", own), ("idk_dpo", RECORDS[:3])):
        args = config(tmp_path, method=method)
        trainer = made(small.model(tok), args, records, processing_class=tok)
        assert all("alternate_input_ids" in row for row in trainer.train_dataset)
        assert "alternate_input_ids" not in trainer.retain_dataset[0]
        args = config(tmp_path, method=method, remove_unused_columns=True)
        with pytest.raises(ValueError, match=r"^remove_unused_columns is True; it must be False"):
            made(small.model(tok), args, records, processing_class=tok)
    with pytest.raises(ValueError, match=r"^train_dataset: .*'alternate_answer' is None"):
        made(small.model(tok), config(tmp_path, method="dpo"), RECORDS, processing_class=tok)


def test_evaluation_sets_of_records(tok, tmp_path):
    sets = {"a": RECORDS[:1], "b": RECORDS[1:3]}
    options = {"processing_class": tok, "max_length": 64, "eval_dataset": sets}
    trainer = made(small.model(tok), config(tmp_path), RECORDS[:3], **options)
    assert {name: len(rows) for name, rows in trainer.eval_dataset.items()} == {"a": 1, "b": 2}
    assert "eval_a_loss" in trainer.evaluate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forget": KEPT}, r"^train_dataset: records, row 0: field 'spans' is missing"),
        ({"retain": [{"a": "b"}]}, r"^retain_dataset: records, row 0: a list with the columns 'a'"),
        ({"processing_class": None}, "^train_dataset holds records: processing_class must be the"),
        (
            {"forget": ["Ada is in Lund."]},
            "^train_dataset: records, row 0: a record must be an obj",
        ),
        ({"forget": {"train": RECORDS}}, "^train_dataset is a dict with 'train'; it must be rows"),
        ({"retain": KEPT[0]}, "^retain_dataset is a dict with 'question', 'answer'; it must be"),
        ({"peft_config": "lora"}, "^peft_config must be a peft.PeftConfig, not str"),
    ],
)
def test_records_that_cannot_be_used(tok, tmp_path, options, said):
    given = {"forget": RECORDS[:3], "processing_class": tok} | options
    with pytest.raises((TypeError, ValueError), match=said):
        made(small.model(tok), config(tmp_path), **given)
    with pytest.raises(TypeError, match="model must be a module, or a folder or id on the hub"):
        made(None, config(tmp_path), RECORDS[:3], processing_class=tok)


def test_a_collator_of_ones_own_gets_the_records(tok, tmp_path):
    options = {"processing_class": tok, "data_collator": lambda rows: {}, "retain": None}
    trainer = made(small.model(tok), config(tmp_path), RECORDS[:3], **options)
    assert trainer.train_dataset == RECORDS[:3]
    options["data_collator"] = DataCollatorWithFlattening()
    with pytest.raises(ValueError, match="WithFlattening cannot take these examples; leave data_c"):
        made(small.model(tok), config(tmp_path), RECORDS[:3], **options).train()


def test_a_model_by_its_folder(tok, tmp_path):
    write_model(tmp_path / "model", small.model(tok), template=OTHER)
    options = {"processing_class": tok, "template": OTHER}
    right = trained(small.model(tok), config(tmp_path), RECORDS[:3], **options)
    for name in (tmp_path / "model", str(tmp_path / "model")):
        assert same(trained(name, config(tmp_path), RECORDS[:3]), right)
    with pytest.raises(FileNotFoundError, match=r"model folder '.*none' does not exist"):
        made(tmp_path / "none", config(tmp_path), RECORDS[:3])


def test_an_adapter_is_made_and_trained_alone(tok, tmp_path):
    write_model(tmp_path / "model", small.model(tok))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    args = config(tmp_path)
    trainer = made(tmp_path / "model", args, RECORDS[:3], peft_config=lora)
    assert isinstance(trainer.reference, AdapterOffReference)
    trainer.train()
    moving = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert moving and all("lora" in name for name in moving)
    base = small.model(tok).state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    trainer.save_model(str(tmp_path / "adapter"))
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tmp_path / "model")
    again = made(
        small.model(tok),
        config(tmp_path),
        RECORDS[:3],
        retain=None,
        peft_config=lora,
        processing_class=tok,
        reference="live",
    )
    assert not isinstance(again.reference, AdapterOffReference), "what is asked for holds"
    with pytest.raises(ValueError, match="peft_config is given and the model has an adapter"):
        made(trainer.model, config(tmp_path), RECORDS[:3], peft_config=lora, processing_class=tok)
    with pytest.raises(ValueError, match="is an adapter; unlearning starts from a whole model"):
        made(tmp_path / "adapter", config(tmp_path), RECORDS[:3])
