"""Heads and models that are not plain are refused with a reason, and nothing is left behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from transformers.modeling_outputs import CausalLMOutput

from palu.models.forward import model_hidden_states
from palu.models.head_check import check_head, why_not_fusable
from palu.models.lm_head import LMHead
from palu.models.wrappers import UnsupportedHead
from tests.support import families

OWN = "the logits of the model itself have to be used"


# ---- heads that are not plain --------------------------------------------------------------------


class FakeQuantized(nn.Linear):
    def forward(self, hidden):
        scale = self.weight.abs().max() / 7
        return F.linear(hidden, (self.weight / scale).round() * scale, self.bias)


class Marked(torch.Tensor):
    """A tensor subclass."""


def weight(value, **options):
    def change(head):
        head.weight = nn.Parameter(value(head.weight.detach()), **options)

    return change


def as_buffer(head):
    value = head.weight.detach()
    del head.weight
    head.register_buffer("weight", value)


HEADS = {
    "is a .*FakeQuantized, not a plain torch.nn.Linear": lambda h: setattr(
        h, "__class__", FakeQuantized
    ),
    "has forward hooks": lambda h: h.register_forward_hook(lambda m, args, out: out * 2),
    "has forward pre hooks": lambda h: h.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "has backward hooks": lambda h: h.register_full_backward_hook(lambda *_: None),
    "has backward pre hooks": lambda h: h.register_full_backward_pre_hook(lambda *_: None),
    r"has parametrizations \(weight\)": parametrizations.orthogonal,
    "has forward pre hook[s]": weight_norm,
    "^the forward of the output embedding was replaced": lambda h: setattr(
        h, "forward", lambda hidden: F.linear(hidden, h.weight) * 2
    ),
    "weight of the output embedding is a Marked": weight(lambda w: w.as_subclass(Marked)),
    "weight of the output embedding is a Tensor": as_buffer,
    r"is offloaded \(on the meta device\)": weight(lambda w: w.to("meta")),
    # what DeepSpeed's stage 3 leaves
    r"shape \[0\], not \[101, 16\]: it is sharded or was changed": weight(lambda w: w[:0, 0]),
    "weight has dtype torch.float8_e4m3fn": weight(
        lambda w: w.to(torch.float8_e4m3fn), requires_grad=False
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize("reason", HEADS)
def test_other_heads_are_refused(reason):
    model, (ids, mask) = families.make("llama"), families.batch()
    HEADS[reason](model.lm_head)
    with pytest.raises(UnsupportedHead, match=f"{reason}.*: {OWN}$") as refusal:
        LMHead.from_model(model)
    assert "\n" not in str(refusal.value)
    assert why_not_fusable(model, ids, mask) == str(refusal.value)


def test_no_output_embedding():
    ids, mask = families.batch()
    with pytest.raises(UnsupportedHead, match="Linear names no output embedding"):
        LMHead.from_model(nn.Linear(2, 2))
    model = families.make("llama")
    model.get_output_embeddings = lambda: None
    with pytest.raises(UnsupportedHead, match="LlamaForCausalLM names no output embedding"):
        model_hidden_states(model, ids, mask)


@pytest.mark.parametrize("value", ["inv_sqrt_d_model", True, float("inf"), 0.0])
def test_a_scale_that_is_no_number(value):
    model = families.make("llama")
    model.config.logit_scale = value
    with pytest.raises(UnsupportedHead, match=OWN):
        LMHead.from_model(model)


# ---- what the config does not tell ---------------------------------------------------------------


class Twisted(nn.Module):
    """A causal language model that does something to the logits of another one."""

    def __init__(self, inner, twist):
        super().__init__()
        self.inner, self.twist, self.config = inner, twist, inner.config

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        return CausalLMOutput(logits=self.twist(self.inner(**inputs).logits))


def swap_two(logits):
    order = torch.arange(logits.shape[-1])
    order[[5, 6]] = order[[6, 5]]
    return logits[..., order]


def mask_one(logits):
    logits[..., 4] = torch.finfo(logits.dtype).min
    return logits


TWISTS = {
    "adds one": lambda x: x + 1,
    "scales": lambda x: x * 1.02,
    "caps at 30": lambda x: 30 * torch.tanh(x / 30),
    "caps at 100": lambda x: 100 * torch.tanh(x / 100),
    "clamps": lambda x: x.clamp(-60, 60),
    "permutes": lambda x: x.flip(-1),
    "swaps two": swap_two,
    "masks one": mask_one,
    "cuts the vocabulary": lambda x: x[..., :-3],
    "swaps rows": lambda x: x.flip(1),
    "has NaN": lambda x: torch.where(x > 25, torch.nan, x),
    "takes the softmax": lambda x: x.log_softmax(-1),
}


@pytest.mark.parametrize("twist", TWISTS.values(), ids=TWISTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_hidden_changes_of_the_logits_are_found(twist, dtype):
    model, (ids, mask) = Twisted(families.make("llama").to(dtype), twist), families.batch()
    with pytest.raises(UnsupportedHead, match=f"(differ by up to|logits of shape).*: {OWN}$"):
        check_head(model, LMHead.from_model(model), ids, mask)
    assert families.fusable_head(model, ids, mask) is None
    assert families.fusable_head(Twisted(model.inner, lambda x: x), ids, mask) is not None


def test_small_logits_are_raised_for_the_check():
    """A new model's logits are far below any cap; the config forgets it."""
    model, (ids, mask) = families.make("gemma2"), families.batch()
    with torch.no_grad():
        model.model.norm.weight.fill_(-1 + 1e-4)  # Gemma multiplies by 1 + weight
    assert families.fusable_head(model, ids, mask) is not None
    without = replace(LMHead.from_model(model), softcap=None)
    hidden = model_hidden_states(model, ids, mask)
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(without.logits(hidden), want)  # the cap does not show in these
    with pytest.raises(UnsupportedHead, match="differ by up to"):
        check_head(model, without, ids, mask)


def test_small_faults_show_in_small_logits_and_large_ones_in_large_logits():
    """Found at bfloat16's roundings, each by one of the two rows or the two rules."""

    def nudge_one(logits):
        nudged = logits.clone()
        nudged[..., 5] += 0.02 * logits.abs().amax(-1)
        return nudged

    ids, mask = families.batch()
    for factor, twist in (
        (1 / 30, lambda x: x + 0.2),  # within the rounding of the raised logits
        (10, lambda x: 3000 * torch.tanh(x / 3000)),  # beyond the logits as they are
        (1, nudge_one),  # small beside the whole row
    ):
        inner = families.make("llama")
        with torch.no_grad():
            inner.lm_head.weight.mul_(factor)
        inner = inner.to(torch.bfloat16)
        assert families.fusable_head(inner, ids, mask) is not None
        assert families.fusable_head(Twisted(inner, twist), ids, mask) is None


def test_raised_rows_stay_finite():
    model, (ids, mask) = families.make("llama"), families.batch()
    with torch.no_grad():
        model.lm_head.weight.div_(30 * 4000)
        model.model.norm.weight.mul_(4000)
    assert families.fusable_head(model.to(torch.float16), ids, mask) is not None


WRONG = {
    "gemma2": [{"softcap": None}, {"softcap": 12.5}],
    "gemma3": [{"softcap": None}],
    "cohere": [{"logit_scale": 1.0}, {"logit_scale": 0.255}],
    "granite": [{"logit_scale": 6.0}],
    "phi": [{"bias": None}],
    "gptj": [{"bias": None}],
    "llama": [{"logit_scale": 1.02}, {"softcap": 30.0}],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_head_is_found(name, dtype):
    model, (ids, mask) = families.make(name).to(dtype), families.batch()
    head = LMHead.from_model(model)
    check_head(model, head, ids, mask)
    with torch.no_grad():
        other = model.get_output_embeddings().weight.roll(1, 0)
    for change in [*WRONG[name], {"weight": other}]:
        with pytest.raises(UnsupportedHead, match="differ by up to"):
            check_head(model, replace(head, **change), ids, mask)


def test_a_config_that_names_a_cap_that_is_not_applied():
    model, (ids, mask) = families.make("llama"), families.batch()
    model.config.final_logit_softcapping = 30.0
    assert LMHead.from_model(model).softcap == 30.0
    assert families.fusable_head(model, ids, mask) is None


# ---- models that cannot be asked for their rows --------------------------------------------------


class Odd(Twisted):
    """Calls the head of a Llama in an unusual way."""

    def __init__(self, inner, how):
        super().__init__(inner, None)
        self.how = how

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.inner.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return CausalLMOutput(logits=self.how(self.inner.lm_head, hidden))


ODD = {
    r"rows of shape \[3, 1, 16\] enter": lambda head, hidden: head(hidden[:, -1:]),
    r"rows of shape \[27, 16\] enter": lambda head, hidden: head(hidden.flatten(0, 1)).view(
        *hidden.shape[:2], -1
    ),
    "calls its output embedding 0 times": lambda head, hidden: head(input=hidden),
    "its output embedding 0 times": lambda head, hidden: F.linear(hidden, head.weight),
    "calls its output embedding 2 times": lambda head, hidden: head(hidden) + head(hidden),
    "fails when no row enters": lambda head, hidden: head(hidden) / head(hidden).amax(1, True),
    "switches gradients on or off": torch.no_grad()(lambda head, hidden: head(hidden)),
}


@pytest.mark.parametrize("reason", ODD)
def test_odd_models_are_refused(reason):
    model, (ids, mask) = Odd(families.make("llama"), ODD[reason]), families.batch()
    with pytest.raises(UnsupportedHead, match=f"{reason}.*: {OWN}$") as refusal:
        model_hidden_states(model, ids, mask)
    assert "\n" not in str(refusal.value)
    assert families.hooks_of(model) == 0
    if reason != "switches gradients on or off":  # the check runs without gradients
        assert families.fusable_head(model, ids, mask) is None


def test_a_checkpoint_around_the_whole_model():
    """Reentrant, it runs the forward without gradients: the rows would be cut off the graph."""

    class Checkpointed(families.Wrapper):
        def forward(self, input_ids, **inputs):
            def run(anchor):
                return super(Checkpointed, self).forward(input_ids=input_ids, **inputs).logits

            anchor = torch.zeros(1, requires_grad=True)
            logits = torch.utils.checkpoint.checkpoint(run, anchor, use_reentrant=True)
            return CausalLMOutput(logits=logits)

    model, (ids, mask) = Checkpointed(families.make("llama")), families.batch()
    with pytest.raises(UnsupportedHead, match="switches gradients on or off"):
        model_hidden_states(model, ids, mask)


def test_outputs_without_logits():
    ids, mask = families.batch()
    for output in (lambda logits: (logits,), lambda logits: CausalLMOutput()):
        model = Twisted(families.make("llama"), None)
        model.forward = lambda m=model, o=output, **kw: o(m.inner(**kw).logits)
        with pytest.raises(UnsupportedHead, match="no logits to compare with"):
            check_head(model, LMHead.from_model(model), ids, mask)


# ---- nothing is left behind ----------------------------------------------------------------------


def test_hooks_are_gone_after_a_call_and_after_a_fault():
    model, (ids, mask) = families.make("llama"), families.batch()
    model_hidden_states(model, ids, mask)
    families.fusable_head(model, ids, mask)
    assert families.hooks_of(model) == 0
    with pytest.raises(IndexError):  # the model's own fault is not hidden
        model_hidden_states(model, ids + families.VOCAB, mask)
    assert families.hooks_of(model) == 0
    with pytest.raises(IndexError):
        families.fusable_head(model, ids + families.VOCAB, mask)
    assert families.hooks_of(model) == 0


def test_running_out_of_memory_is_not_hidden():
    model, (ids, mask) = families.make("llama"), families.batch()

    def full(module, args, out):
        raise torch.OutOfMemoryError("full")

    model.lm_head.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        model_hidden_states(model, ids, mask)


def test_the_check_leaves_mode_random_state_and_gradients():
    model, (ids, mask) = families.make("gpt2").train(), families.batch()
    model.transformer.h[0].eval()  # part of it frozen in evaluation mode
    seen = []
    for module in (model, model.transformer.wte):  # draws numbers, in spite of evaluation mode
        module.register_forward_hook(lambda m, *_: seen.append((m.training, torch.rand(4))))
    modes = [module.training for module in model.modules()]
    parameters = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert families.fusable_head(model, ids, mask) is not None  # in spite of dropout
    assert [training for training, _ in seen] == [False] * 6
    assert torch.equal(torch.rand(3), want)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    # Also when it refuses.
    head = replace(LMHead.from_model(model), logit_scale=2.0)
    torch.manual_seed(5)
    with pytest.raises(UnsupportedHead):
        check_head(model, head, ids, mask)
    assert torch.equal(torch.rand(3), want)
    assert [module.training for module in model.modules()] == modes


# ---- inputs of the check -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_only_real_tokens_are_tried(left):
    """The padding's id may be none of the model's."""
    ids, mask = families.batch(left)
    ids[mask == 0] = families.VOCAB + 5
    assert families.fusable_head(families.make("llama"), ids, mask) is not None
    seen = []
    model = families.make("llama")
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    families.fusable_head(model, ids, mask)
    assert {tuple(x.shape) for x in seen} == {(2, 8)}


def test_batches_that_are_nearly_or_quite_empty():
    model, (ids, mask) = families.make("llama"), families.batch()
    assert families.fusable_head(model, ids[:1, :1]) is not None
    assert families.fusable_head(model, ids, torch.zeros_like(mask)) is None
    assert model_hidden_states(model, ids[:1, :1]).shape == (1, 1, 16)


def test_rows_that_cannot_be_tested():
    model, (ids, mask) = families.make("llama"), families.batch()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert families.fusable_head(model, ids, mask) is None
    assert "the largest logit of a test row is 0.0" in why_not_fusable(model, ids, mask)
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert families.fusable_head(model, ids, mask) is None
    assert "the largest logit of a test row is nan" in why_not_fusable(model, ids, mask)
