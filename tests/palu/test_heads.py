"""The head and the hidden rows of a model give its own logits and gradients, or are refused."""

from __future__ import annotations

import logging
from dataclasses import replace

import families
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, weight_norm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_outputs import CausalLMOutput

import palu_kernels
from palu.heads import HeadNotPlain, LMHead, check_head, model_hidden_states, plain_head

every_family = pytest.mark.parametrize("name", families.FAMILIES)
OWN = "the logits of the model itself have to be used"


def plain(name="llama"):
    return families.make(name)


def hooks_of(model):
    module = model.get_output_embeddings()
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def cross_entropy(logits, ids, mask):
    rows = mask[:, 1:].bool()
    loss = F.cross_entropy(logits[:, :-1][rows].float(), ids[:, 1:][rows])
    return loss + 1e-3 * logits[:, :-1][rows].square().mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, want):
    assert got.keys() == want.keys()
    total = torch.stack([g.norm() for g in want.values()]).norm()
    for name in want:
        assert (got[name] - want[name]).norm() <= 1e-5 * total, name


# ---- the same numbers on both roads --------------------------------------------------------------


@every_family
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_logits_are_those_of_the_model(name, left):
    model = plain(name)
    ids, mask = families.batch(left)
    want = model(input_ids=ids, attention_mask=mask).logits
    head = LMHead.from_model(model)
    hidden = model_hidden_states(model, ids, mask)
    assert hidden.shape == (3, 9, head.hidden_size)
    torch.testing.assert_close(head.logits(hidden), want, rtol=1e-5, atol=1e-5)


@every_family
def test_gradients_are_those_of_the_model(name):
    model = plain(name).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids, mask = families.batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = gradients(model, cross_entropy(logits, ids, mask))
    logits = LMHead.from_model(model).logits(model_hidden_states(model, ids, mask))
    got = gradients(model, cross_entropy(logits, ids, mask))
    assert_same_gradients(got, want)


@every_family
def test_the_check_passes(name, caplog):
    ids, mask = families.batch()
    head = plain_head(plain(name), ids, mask)
    assert isinstance(head, LMHead)
    assert isinstance(head, palu_kernels.LMHead)
    assert not caplog.records


@every_family
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model = plain(name).to(dtype)
    ids, mask = families.batch()
    head = plain_head(model, ids, mask)
    assert head is not None
    got = head.logits(model_hidden_states(model, ids, mask)).float()
    want = model(input_ids=ids, attention_mask=mask).logits.float()
    assert (got - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_the_settings_are_read():
    """The families show what they are here for: a cap that bends, a scale, a bias."""
    ids, mask = families.batch()
    for name in set(families.CAPPED) & set(families.FAMILIES):
        model = plain(name)
        head = LMHead.from_model(model)
        uncapped = replace(head, softcap=None).logits(model_hidden_states(model, ids, mask))
        assert uncapped.abs().max() > 1.5 * head.softcap, name
    for name in set(families.SCALED) & set(families.FAMILIES):
        assert LMHead.from_model(plain(name)).logit_scale != 1, name
    for name in families.BIASED:
        assert LMHead.from_model(plain(name)).bias.abs().max() > 1, name


def test_settings_of_the_text_part_of_a_config():
    model = plain("gemma2")
    text = model.config

    class Composite:
        model_type = "composite"

        def get_text_config(self, decoder=None):
            return text

    model.__dict__["config"] = Composite()
    assert LMHead.from_model(model).softcap == text.final_logit_softcapping


def test_the_parameters_are_held():
    model = plain("gptj")
    head = LMHead.from_model(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert head.requires_grad
    assert not LMHead.from_model(model.requires_grad_(False)).requires_grad


def test_no_logits_are_computed():
    model, (ids, mask) = plain(), families.batch()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (families.VOCAB,):
                turned_weight = out.shape == (16, families.VOCAB)
                largest = max(largest, 0 if turned_weight else out.numel())
            return out

    with Sizes():
        model_hidden_states(model, ids, mask)
    assert largest == 0
    with Sizes():
        model(input_ids=ids, attention_mask=mask)
    assert largest == ids.numel() * families.VOCAB


def test_more_model_inputs_are_passed_on():
    model, (ids, mask) = plain(), families.batch()
    inputs = {"attention_mask": mask, "position_ids": torch.arange(9).expand(3, 9) * 3}
    got = LMHead.from_model(model).logits(model_hidden_states(model, ids, **inputs))
    torch.testing.assert_close(got, model(input_ids=ids, **inputs).logits)
    assert not torch.allclose(got, model(input_ids=ids, attention_mask=mask).logits)


def test_no_gradients_wanted():
    model, (ids, mask) = plain(), families.batch()
    with torch.no_grad():
        assert not model_hidden_states(model, ids, mask).requires_grad
    assert model_hidden_states(model, ids, mask).requires_grad


def test_dropout_follows_the_mode():
    model, (ids, mask) = plain("gpt2").train(), families.batch()
    torch.manual_seed(3)
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(3)
    hidden = model_hidden_states(model, ids, mask)
    torch.testing.assert_close(LMHead.from_model(model).logits(hidden), want)
    model.eval()
    assert not torch.allclose(model_hidden_states(model, ids, mask), hidden)


def test_gradient_checkpointing():
    model, (ids, mask) = plain("gemma2").train(), families.batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = gradients(model, cross_entropy(logits, ids, mask))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        head = plain_head(model, ids, mask)
        logits = head.logits(model_hidden_states(model, ids, mask))
        assert_same_gradients(gradients(model, cross_entropy(logits, ids, mask)), want)


# ---- wrappers ------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """Calls its module and counts."""

    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, *args, **kwargs):
        self.calls += 1
        return self.module(*args, **kwargs)


class Autocast(Wrapper):
    """As accelerate does for mixed precision: autocast inside, float32 logits outside."""

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = super().forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output


def test_the_wrapper_is_what_gets_called():
    wrapper, (ids, mask) = Wrapper(plain()), families.batch()
    model_hidden_states(wrapper, ids, mask)
    assert wrapper.calls == 1
    check_head(wrapper, LMHead.from_model(wrapper), ids, mask)
    assert wrapper.calls == 3


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj"])
def test_autocast_inside_the_wrapper(name):
    wrapper, (ids, mask) = Autocast(plain(name)), families.batch()
    head = plain_head(wrapper, ids, mask)
    assert head is not None
    hidden = model_hidden_states(wrapper, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = head.logits(hidden)
    assert got.dtype == torch.bfloat16
    want = wrapper(input_ids=ids, attention_mask=mask).logits
    assert (got.float() - want).norm() <= 2**-8 * want.norm()
    if name != "llama":
        without = replace(head, softcap=None, bias=None, logit_scale=1.0)
        with pytest.raises(HeadNotPlain, match="differ by up to"):
            check_head(wrapper, without, ids, mask)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    model, (ids, mask) = plain("llama_tied"), families.batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = gradients(model, cross_entropy(logits, ids, mask))

    def double(state, bucket):  # in place of an average over processes
        future = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    for unused in (False, True):
        ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        ddp.register_comm_hook(None, double)
        head = plain_head(ddp, ids, mask)
        logits = head.logits(model_hidden_states(ddp, ids, mask))
        got = gradients(model, cross_entropy(logits, ids, mask))
        assert_same_gradients({name: gradient / 2 for name, gradient in got.items()}, want)


def test_ddp_with_a_static_graph_is_refused(one_process):
    """It reduces gradients when they reach the model's outputs, which these rows are not."""
    model, (ids, mask) = plain(), families.batch()
    ddp = DistributedDataParallel(model, static_graph=True)
    with pytest.raises(HeadNotPlain, match="static_graph=True"):
        LMHead.from_model(ddp)
    with pytest.raises(HeadNotPlain, match="static_graph=True"):
        model_hidden_states(ddp, ids, mask)
    with torch.no_grad():
        model_hidden_states(ddp, ids, mask)


def test_fsdp_is_refused():
    sharded = type("FullyShardedDataParallel", (Wrapper,), {})(plain())
    with pytest.raises(HeadNotPlain, match="sharded by FSDP"):
        LMHead.from_model(sharded)


def test_sharded_weights_are_refused(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = plain()
    mesh = dist.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(HeadNotPlain, match="sharded by FSDP"):
        LMHead.from_model(model)
    model = plain()
    model.lm_head.weight = nn.Parameter(dist.tensor.distribute_tensor(model.lm_head.weight, mesh))
    with pytest.raises(HeadNotPlain, match="weight of the output embedding is a DTensor"):
        LMHead.from_model(model)


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_compiled_models_are_refused(how):
    model, (ids, mask) = plain(), families.batch()
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    assert LMHead.from_model(compiled).weight is model.lm_head.weight
    with pytest.raises(HeadNotPlain, match="the model is compiled"):
        model_hidden_states(compiled, ids, mask)
    assert plain_head(compiled, ids, mask) is None
    assert hooks_of(model) == 0


def test_compiled_layers_are_no_matter():
    model, (ids, mask) = plain(), families.batch()
    model.model.layers[0].compile(backend="eager")
    assert plain_head(model, ids, mask) is not None


# ---- PEFT ----------------------------------------------------------------------------------------


def lora(model, targets=("q_proj", "v_proj"), **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite"])
def test_lora_on_attention(name):
    model, (ids, mask) = plain(name), families.batch()
    base = model(input_ids=ids, attention_mask=mask).logits
    adapted = lora(model)
    head = plain_head(adapted, ids, mask)
    logits = adapted(input_ids=ids, attention_mask=mask).logits
    want = gradients(adapted, cross_entropy(logits, ids, mask))
    got = head.logits(model_hidden_states(adapted, ids, mask))
    torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, base, atol=0.1)
    assert_same_gradients(gradients(adapted, cross_entropy(got, ids, mask)), want)
    assert all("lora" in n for n in want)
    with adapted.disable_adapter():
        torch.testing.assert_close(head.logits(model_hidden_states(adapted, ids, mask)), base)


@pytest.mark.parametrize(
    ("targets", "settings"),
    [(["q_proj", "lm_head"], {}), (["q_proj"], {"modules_to_save": ["lm_head"]})],
)
def test_peft_on_the_head_is_refused(targets, settings):
    adapted, (ids, mask) = lora(plain(), targets, **settings), families.batch()
    with pytest.raises(HeadNotPlain, match=r"is a peft\..*, not a plain torch\.nn\.Linear"):
        LMHead.from_model(adapted)
    assert plain_head(adapted, ids, mask) is None
    # The rows themselves are still right.
    got = adapted.get_output_embeddings()(model_hidden_states(adapted, ids, mask))
    torch.testing.assert_close(got, adapted(input_ids=ids, attention_mask=mask).logits)


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned, (ids, mask) = peft.get_peft_model(plain(), config), families.batch()
    with pytest.raises(HeadNotPlain, match=r"rows of shape \[3, 11, 16\] enter"):
        model_hidden_states(tuned, ids, mask)
    assert plain_head(tuned, ids, mask) is None


# ---- heads that are not plain --------------------------------------------------------------------


class FakeQuantized(nn.Linear):
    def forward(self, hidden):
        scale = self.weight.abs().max() / 7
        return F.linear(hidden, (self.weight / scale).round() * scale, self.bias)


class Marked(torch.Tensor):
    """A tensor subclass."""


def quantized(head):
    head.__class__ = FakeQuantized


def forward_hook(head):
    head.register_forward_hook(lambda module, args, out: out * 2)


def forward_pre_hook(head):
    head.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(head):
    head.register_full_backward_hook(lambda module, grads, outs: None)


def backward_pre_hook(head):
    head.register_full_backward_pre_hook(lambda module, grads: None)


def parametrized(head):
    parametrizations.orthogonal(head)


def old_weight_norm(head):
    weight_norm(head)


def replaced_forward(head):
    head.forward = lambda hidden: F.linear(hidden, head.weight) * 2


def subclass_weight(head):
    head.weight = nn.Parameter(head.weight.detach().as_subclass(Marked))


def weight_as_buffer(head):
    weight = head.weight.detach()
    del head.weight
    head.register_buffer("weight", weight)


def offloaded(head):
    head.weight = nn.Parameter(torch.empty_like(head.weight, device="meta"))


def empty_weight(head):  # what DeepSpeed's stage 3 leaves
    head.weight = nn.Parameter(torch.empty(0))


def float8_weight(head):
    head.weight = nn.Parameter(head.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantized, "the output embedding is a .*FakeQuantized, not a plain torch.nn.Linear"),
        (forward_hook, "the output embedding has forward hooks"),
        (forward_pre_hook, "the output embedding has forward pre hooks"),
        (backward_hook, "the output embedding has backward hooks"),
        (backward_pre_hook, "the output embedding has backward pre hooks"),
        (parametrized, r"the output embedding has parametrizations \(weight\)"),
        (old_weight_norm, "the output embedding has forward pre hooks"),
        (replaced_forward, "the forward of the output embedding was replaced"),
        (subclass_weight, "the weight of the output embedding is a Marked"),
        (weight_as_buffer, "the weight of the output embedding is a Tensor"),
        (offloaded, r"the weight of the output embedding is offloaded \(on the meta device\)"),
        (empty_weight, r"shape \[0\], not \[101, 16\]: it is sharded or was changed"),
        (float8_weight, "weight has dtype torch.float8_e4m3fn"),
    ],
)
def test_other_heads_are_refused(change, reason, caplog):
    model, (ids, mask) = plain(), families.batch()
    change(model.lm_head)
    with pytest.raises(HeadNotPlain, match=f"{reason}.*: {OWN}$") as refusal:
        LMHead.from_model(model)
    assert "\n" not in str(refusal.value)
    assert plain_head(model, ids, mask) is None
    assert len(caplog.records) == 1
    assert caplog.records[0].levelno == logging.WARNING
    assert caplog.records[0].name == "palu.heads"
    assert str(refusal.value) in caplog.text


def test_no_output_embedding():
    ids, mask = families.batch()
    with pytest.raises(HeadNotPlain, match="Linear names no output embedding"):
        LMHead.from_model(nn.Linear(2, 2))
    model = plain()
    model.get_output_embeddings = lambda: None
    with pytest.raises(HeadNotPlain, match="LlamaForCausalLM names no output embedding"):
        model_hidden_states(model, ids, mask)


@pytest.mark.parametrize("value", ["inv_sqrt_d_model", True, float("inf"), 0.0])
def test_a_scale_that_is_no_number(value):
    model = plain()
    model.config.logit_scale = value
    with pytest.raises(HeadNotPlain, match=OWN):
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
def test_hidden_changes_of_the_logits_are_found(twist, dtype, caplog):
    model, (ids, mask) = Twisted(plain().to(dtype), twist), families.batch()
    with pytest.raises(HeadNotPlain, match=f"(differ by up to|logits of shape).*: {OWN}$"):
        check_head(model, LMHead.from_model(model), ids, mask)
    assert plain_head(model, ids, mask) is None
    assert len(caplog.records) == 1


def test_an_untwisted_model_passes():
    ids, mask = families.batch()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert plain_head(Twisted(plain().to(dtype), lambda x: x), ids, mask) is not None


def test_small_logits_are_raised_for_the_check():
    """A new model's logits are far below any cap; the config forgets it."""
    model, (ids, mask) = plain("gemma2"), families.batch()
    with torch.no_grad():
        model.model.norm.weight.fill_(-1 + 1e-4)  # Gemma multiplies by 1 + weight
    assert plain_head(model, ids, mask) is not None
    without = replace(LMHead.from_model(model), softcap=None)
    hidden = model_hidden_states(model, ids, mask)
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(without.logits(hidden), want)  # the cap does not show in these
    with pytest.raises(HeadNotPlain, match="differ by up to"):
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
        inner = plain()
        with torch.no_grad():
            inner.lm_head.weight.mul_(factor)
        inner = inner.to(torch.bfloat16)
        assert plain_head(inner, ids, mask) is not None
        assert plain_head(Twisted(inner, twist), ids, mask) is None


def test_raised_rows_stay_finite():
    model, (ids, mask) = plain(), families.batch()
    with torch.no_grad():
        model.lm_head.weight.div_(30 * 4000)
        model.model.norm.weight.mul_(4000)
    assert plain_head(model.to(torch.float16), ids, mask) is not None


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
    model, (ids, mask) = plain(name).to(dtype), families.batch()
    head = LMHead.from_model(model)
    check_head(model, head, ids, mask)
    with torch.no_grad():
        other = model.get_output_embeddings().weight.roll(1, 0)
    for change in [*WRONG[name], {"weight": other}]:
        with pytest.raises(HeadNotPlain, match="differ by up to"):
            check_head(model, replace(head, **change), ids, mask)


def test_a_config_that_names_a_cap_that_is_not_applied():
    model, (ids, mask) = plain(), families.batch()
    model.config.final_logit_softcapping = 30.0
    assert LMHead.from_model(model).softcap == 30.0
    assert plain_head(model, ids, mask) is None


# ---- models that cannot be asked for their rows --------------------------------------------------


class Odd(Twisted):
    """Calls the head of a Llama in an unusual way."""

    def __init__(self, inner, how):
        super().__init__(inner, None)
        self.how = how

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        hidden = self.inner.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        return CausalLMOutput(logits=self.how(self.inner.lm_head, hidden))


def last_row(head, hidden):
    return head(hidden[:, -1:])


def flat(head, hidden):
    return head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


def by_keyword(head, hidden):
    return head(input=hidden)


def without_the_module(head, hidden):
    return F.linear(hidden, head.weight)


def twice(head, hidden):
    return head(hidden) + head(hidden)


def needs_a_row(head, hidden):
    return head(hidden) / head(hidden).amax(1, keepdim=True)


def without_gradients(head, hidden):
    with torch.no_grad():
        return head(hidden)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (last_row, r"rows of shape \[3, 1, 16\] enter"),
        (flat, r"rows of shape \[27, 16\] enter"),
        (by_keyword, "calls its output embedding 0 times"),
        (without_the_module, "calls its output embedding 0 times"),
        (twice, "calls its output embedding 2 times"),
        (needs_a_row, "fails when no row enters"),
        (without_gradients, "switches gradients on or off"),
    ],
)
def test_odd_models_are_refused(how, reason):
    model, (ids, mask) = Odd(plain(), how), families.batch()
    with pytest.raises(HeadNotPlain, match=f"{reason}.*: {OWN}$") as refusal:
        model_hidden_states(model, ids, mask)
    assert "\n" not in str(refusal.value)
    assert hooks_of(model) == 0
    if how is not without_gradients:  # the check runs without gradients
        assert plain_head(model, ids, mask) is None


def test_a_checkpoint_around_the_whole_model():
    """Reentrant, it runs the forward without gradients: the rows would be cut off the graph."""

    class Checkpointed(Wrapper):
        def forward(self, input_ids, **inputs):
            def run(anchor):
                return super(Checkpointed, self).forward(input_ids=input_ids, **inputs).logits

            anchor = torch.zeros(1, requires_grad=True)
            logits = torch.utils.checkpoint.checkpoint(run, anchor, use_reentrant=True)
            return CausalLMOutput(logits=logits)

    model, (ids, mask) = Checkpointed(plain()), families.batch()
    with pytest.raises(HeadNotPlain, match="switches gradients on or off"):
        model_hidden_states(model, ids, mask)


def test_outputs_without_logits():
    ids, mask = families.batch()
    for output in (lambda logits: (logits,), lambda logits: CausalLMOutput()):
        model = Twisted(plain(), None)
        model.forward = lambda m=model, o=output, **kw: o(m.inner(**kw).logits)
        with pytest.raises(HeadNotPlain, match="no logits to compare with"):
            check_head(model, LMHead.from_model(model), ids, mask)


# ---- nothing is left behind ----------------------------------------------------------------------


def test_hooks_are_gone_after_a_call_and_after_a_fault():
    model, (ids, mask) = plain(), families.batch()
    model_hidden_states(model, ids, mask)
    plain_head(model, ids, mask)
    assert hooks_of(model) == 0
    with pytest.raises(IndexError):  # the model's own fault is not hidden
        model_hidden_states(model, ids + families.VOCAB, mask)
    assert hooks_of(model) == 0
    with pytest.raises(IndexError):
        plain_head(model, ids + families.VOCAB, mask)
    assert hooks_of(model) == 0


def test_running_out_of_memory_is_not_hidden():
    model, (ids, mask) = plain(), families.batch()

    def full(module, args, out):
        raise torch.OutOfMemoryError("full")

    model.lm_head.register_forward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        model_hidden_states(model, ids, mask)


def test_the_check_leaves_mode_random_state_and_gradients():
    model, (ids, mask) = plain("gpt2").train(), families.batch()
    model.transformer.h[0].eval()  # part of it frozen in evaluation mode
    modes = [module.training for module in model.modules()]
    parameters = {n: p.clone() for n, p in model.named_parameters()}
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert plain_head(model, ids, mask) is not None  # in spite of dropout
    assert torch.equal(torch.rand(3), want)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(p, parameters[n]) for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    # Also when it refuses.
    head = replace(LMHead.from_model(model), logit_scale=2.0)
    torch.manual_seed(5)
    with pytest.raises(HeadNotPlain):
        check_head(model, head, ids, mask)
    assert torch.equal(torch.rand(3), want)
    assert [module.training for module in model.modules()] == modes


def test_the_check_runs_in_evaluation_mode():
    model, (ids, mask) = plain().train(), families.batch()
    seen = []
    model.model.embed_tokens.register_forward_hook(lambda m, a, o: seen.append(m.training))
    model.register_forward_hook(lambda m, a, o: seen.append(m.training))
    assert plain_head(model, ids, mask) is not None
    assert seen == [False] * 4


def test_random_numbers_drawn_in_evaluation_are_given_back():
    class Drawing(Wrapper):
        def forward(self, **inputs):
            torch.rand(4)
            return super().forward(**inputs)

    model, (ids, mask) = Drawing(plain()), families.batch()
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    assert plain_head(model, ids, mask) is not None
    assert torch.equal(torch.rand(3), want)


# ---- inputs of the check -------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True])
def test_only_real_tokens_are_tried(left):
    """The padding's id may be none of the model's."""
    ids, mask = families.batch(left)
    ids[mask == 0] = families.VOCAB + 5
    assert plain_head(plain(), ids, mask) is not None
    seen = []
    model = plain()
    model.model.embed_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    plain_head(model, ids, mask)
    assert {tuple(x.shape) for x in seen} == {(2, 8)}


def test_batches_that_are_nearly_or_quite_empty():
    model, (ids, mask) = plain(), families.batch()
    assert plain_head(model, ids[:1, :1]) is not None
    assert plain_head(model, ids, torch.zeros_like(mask)) is None
    assert model_hidden_states(model, ids[:1, :1]).shape == (1, 1, 16)


def test_rows_that_cannot_be_tested(caplog):
    model, (ids, mask) = plain(), families.batch()
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert plain_head(model, ids, mask) is None
    assert "the largest logit of a test row is 0.0" in caplog.text
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    assert plain_head(model, ids, mask) is None
    assert "the largest logit of a test row is nan" in caplog.text
