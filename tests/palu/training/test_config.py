"""PALUConfig: what its fields may be, before any work, and from a command line."""

import math
from dataclasses import fields

import pytest
from transformers import HfArgumentParser, TrainingArguments

from palu.methods import METHODS
from palu.reference.model import REFERENCES
from palu.training.config import PALUConfig
from palu.training.options import MethodOptions, RunOptions, choices


def test_center_and_preserve_survive_the_command_line(tmp_path):
    parser = HfArgumentParser(PALUConfig)
    for text, value in (("0.5", 0.5), ("local_mean", "local_mean"), ("global_mean", "global_mean")):
        (args,) = parser.parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--center", text, "--preserve", "none"]
        )
        assert args.loss_options()["center"] == value
        assert args.preserve is None and args.remove_unused_columns is False
    words = "--method npo --beta 0.2 --retain_loss kl --normalization micro_batch"
    (args,) = parser.parse_args_into_dataclasses([*words.split(), "--output_dir", str(tmp_path)])
    assert (args.method, args.beta, args.retain_loss) == ("npo", 0.2, "kl")
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--objective", "flat", "--output_dir", str(tmp_path)])
    assert PALUConfig(output_dir=str(tmp_path), center=2.0).loss_options()["center"] == 2.0


NUMBERS = ("1", True, math.nan, math.inf, -1)
COUNTS = (*NUMBERS, 2.5, 0)
NO_CHOICE = ("l1", 1, 0.5, True, math.nan)
# what a field must not be; None too, but where it means that there is none
WRONG = {
    "method": (*NO_CHOICE, None),
    "top_k": (*COUNTS, None),
    "prefix_length": ("1", True, math.nan, 2.5),
    "objective": NO_CHOICE,
    "center": ("middle", True, math.nan, math.inf, None),
    "preserve": NO_CHOICE,
    "forget_weight": NUMBERS,
    "preserve_weight": (*NUMBERS, None),
    "select_from": (*NO_CHOICE, None),
    "backend": (*NO_CHOICE, None),
    "base_is_original": ("true", 1, None),
    "retain_loss": NO_CHOICE,
    "retain_weight": (*NUMBERS, None),
    "retain_batch_size": COUNTS,
    "normalization": (*NO_CHOICE, None),
    "reference": (*NO_CHOICE, None),
    "checks": NO_CHOICE,
    "reference_cache": (1, 0.5, True, math.nan),
    "trainable_params_regex": ("[", 1, True),
    "stop_at_forget_prob": ("0.5", True, math.nan, math.inf, -0.1, 0, 1),
}
# options of other methods: a method that has it, its wrong values
OF_METHODS = {
    "beta": ("npo", (*NUMBERS, 0)),
    "beta1": ("sat_imp", NUMBERS),
    "beta2": ("sat_imp", NUMBERS),
    "delta": ("sim_npo", NUMBERS),
    "ignore_first": ("ce_u", ("1", True, math.nan, 2.5, -1)),
    "retain_loss_eps": ("pdu", NUMBERS),
    "dual_step_size": ("pdu", (*NUMBERS, 0)),
    "dual_warmup_epochs": ("pdu", NUMBERS),
    "layer_id": ("rmu", ("1", True, math.nan, 2.5, -1)),
    "steering_coeff": ("rmu", (*NUMBERS, 0)),
}
CASES = [({}, name, value) for name, values in WRONG.items() for value in values]
CASES += [
    ({"method": method}, name, value)
    for name, (method, values) in OF_METHODS.items()
    for value in values
]


@pytest.mark.parametrize(("others", "name", "value"), CASES, ids=str)
def test_a_wrong_value_is_named(tmp_path, others, name, value):
    with pytest.raises((TypeError, ValueError)) as caught:
        PALUConfig(output_dir=str(tmp_path), **others, **{name: value})
    said = str(caught.value)
    assert said.startswith(name) and repr(value) in said and " must be " in said, said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"preserve": "none", "preserve_weight": 2.0},
            "preserve_weight is 2.0 and preserve is 'none'",
        ),
        ({"method": "npo", "top_k": 4}, "top_k is 4 and method 'npo' has no such option"),
        ({"method": "rmu", "preserve": "none"}, "preserve is None and method 'rmu' has no such"),
        ({"objective": "entropy", "center": 2.0}, "center is 2.0 and objective 'entropy' has no"),
    ],
)
def test_options_that_are_not_read_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        PALUConfig(output_dir=str(tmp_path), **options)


def test_options_say_which_methods_read_them_and_their_defaults():
    assert choices(RunOptions, "method") == (*METHODS,)
    assert choices(RunOptions, "reference") == REFERENCES
    for option in fields(MethodOptions):
        of = {
            name: method.__dataclass_fields__[option.name].default
            for name, method in METHODS.items()
            if option.name in method.option_names()
        }
        assert option.metadata["help"].of == of, option.name


def test_every_field_has_wrong_values_here():
    inherited = {field.name for field in fields(TrainingArguments)}
    own = {field.name for field in fields(PALUConfig)} - inherited
    assert own == {*WRONG, *OF_METHODS}
