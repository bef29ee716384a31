"""The head and the hidden rows of a model give its own logits and gradients, or are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import palu_kernels
from palu.models.forward import model_hidden_states
from palu.models.head_check import check_head
from palu.models.lm_head import LMHead
from palu.models.wrappers import UnsupportedHead
from tests.support import families

every_family = pytest.mark.parametrize("name", families.FAMILIES)


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
    model = families.make(name)
    ids, mask = families.batch(left)
    want = model(input_ids=ids, attention_mask=mask).logits
    head = families.fusable_head(model, ids, mask)
    assert isinstance(head, LMHead) and isinstance(head, palu_kernels.LMHead)
    hidden = model_hidden_states(model, ids, mask)
    assert hidden.shape == (3, 9, head.hidden_size)
    torch.testing.assert_close(head.logits(hidden), want, rtol=1e-5, atol=1e-5)


@every_family
def test_gradients_are_those_of_the_model(name):
    model = families.make(name).train()
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    model = families.make(name).to(dtype)
    ids, mask = families.batch()
    head = families.fusable_head(model, ids, mask)
    assert head is not None
    got = head.logits(model_hidden_states(model, ids, mask)).float()
    want = model(input_ids=ids, attention_mask=mask).logits.float()
    assert (got - want).norm() <= torch.finfo(dtype).eps * want.norm()


def test_the_settings_are_read():
    """The families show what they are here for: a cap that bends, a scale, a bias."""
    ids, mask = families.batch()
    for name in set(families.CAPPED) & set(families.FAMILIES):
        model = families.make(name)
        head = LMHead.from_model(model)
        uncapped = replace(head, softcap=None).logits(model_hidden_states(model, ids, mask))
        assert uncapped.abs().max() > 1.5 * head.softcap, name
    for name in set(families.SCALED) & set(families.FAMILIES):
        assert LMHead.from_model(families.make(name)).logit_scale != 1, name
    for name in families.BIASED:
        assert LMHead.from_model(families.make(name)).bias.abs().max() > 1, name


def test_settings_of_the_text_part_of_a_config():
    model = families.make("gemma2")
    text = model.config

    class Composite:
        model_type = "composite"

        def get_text_config(self, decoder=None):
            return text

    model.__dict__["config"] = Composite()
    assert LMHead.from_model(model).softcap == text.final_logit_softcapping


def test_the_parameters_are_held():
    model = families.make("gptj")
    head = LMHead.from_model(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    assert head.requires_grad
    assert not LMHead.from_model(model.requires_grad_(False)).requires_grad


def test_no_logits_are_computed():
    model, (ids, mask) = families.make("llama"), families.batch()
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (families.VOCAB,):
                turned_weight = out.shape == (16, families.VOCAB)
                largest = max(largest, 0 if turned_weight else out.numel())
            return out

    with Sizes(), torch.no_grad():
        assert not model_hidden_states(model, ids, mask).requires_grad
    assert largest == 0 and model_hidden_states(model, ids, mask).requires_grad
    with Sizes():
        model(input_ids=ids, attention_mask=mask)
    assert largest == ids.numel() * families.VOCAB


def test_more_model_inputs_are_passed_on():
    model, (ids, mask) = families.make("llama"), families.batch()
    inputs = {"attention_mask": mask, "position_ids": torch.arange(9).expand(3, 9) * 3}
    got = LMHead.from_model(model).logits(model_hidden_states(model, ids, **inputs))
    torch.testing.assert_close(got, model(input_ids=ids, **inputs).logits)
    assert not torch.allclose(got, model(input_ids=ids, attention_mask=mask).logits)


def test_dropout_follows_the_mode():
    model, (ids, mask) = families.make("gpt2").train(), families.batch()
    torch.manual_seed(3)
    want = model(input_ids=ids, attention_mask=mask).logits
    torch.manual_seed(3)
    hidden = model_hidden_states(model, ids, mask)
    torch.testing.assert_close(LMHead.from_model(model).logits(hidden), want)
    model.eval()
    assert not torch.allclose(model_hidden_states(model, ids, mask), hidden)


def test_gradient_checkpointing():
    model, (ids, mask) = families.make("gemma2").train(), families.batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = gradients(model, cross_entropy(logits, ids, mask))
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        head = families.fusable_head(model, ids, mask)
        logits = head.logits(model_hidden_states(model, ids, mask))
        assert_same_gradients(gradients(model, cross_entropy(logits, ids, mask)), want)


# ---- wrappers ------------------------------------------------------------------------------------


class Autocast(families.Wrapper):
    """As accelerate does for mixed precision: autocast inside, float32 logits outside."""

    def forward(self, *args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            output = super().forward(*args, **kwargs)
        output.logits = output.logits.float()
        return output


def test_the_wrapper_is_what_gets_called():
    wrapper, (ids, mask) = families.Wrapper(families.make("llama")), families.batch()
    model_hidden_states(wrapper, ids, mask)
    assert wrapper.calls == 1
    check_head(wrapper, LMHead.from_model(wrapper), ids, mask)
    assert wrapper.calls == 3


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite", "gptj"])
def test_autocast_inside_the_wrapper(name):
    wrapper, (ids, mask) = Autocast(families.make(name)), families.batch()
    head = families.fusable_head(wrapper, ids, mask)
    assert head is not None
    hidden = model_hidden_states(wrapper, ids, mask)
    with torch.autocast("cpu", torch.bfloat16):
        got = head.logits(hidden)
    assert got.dtype == torch.bfloat16
    want = wrapper(input_ids=ids, attention_mask=mask).logits
    assert (got.float() - want).norm() <= 2**-8 * want.norm()
    if name != "llama":
        without = replace(head, softcap=None, bias=None, logit_scale=1.0)
        with pytest.raises(UnsupportedHead, match="differ by up to"):
            check_head(wrapper, without, ids, mask)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_ddp(one_process):
    model, (ids, mask) = families.make("llama_tied"), families.batch()
    logits = model(input_ids=ids, attention_mask=mask).logits
    want = gradients(model, cross_entropy(logits, ids, mask))

    def double(state, bucket):  # in place of an average over processes
        future = torch.futures.Future()
        future.set_result(2 * bucket.buffer())
        return future

    for unused in (False, True):
        ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        ddp.register_comm_hook(None, double)
        head = families.fusable_head(ddp, ids, mask)
        logits = head.logits(model_hidden_states(ddp, ids, mask))
        got = gradients(model, cross_entropy(logits, ids, mask))
        assert_same_gradients({name: gradient / 2 for name, gradient in got.items()}, want)


def test_ddp_with_a_static_graph_is_refused(one_process):
    """It reduces gradients when they reach the model's outputs, which these rows are not."""
    model, (ids, mask) = families.make("llama"), families.batch()
    ddp = DistributedDataParallel(model, static_graph=True)
    with pytest.raises(UnsupportedHead, match="static_graph=True"):
        LMHead.from_model(ddp)
    with pytest.raises(UnsupportedHead, match="static_graph=True"):
        model_hidden_states(ddp, ids, mask)
    with torch.no_grad():
        model_hidden_states(ddp, ids, mask)


def test_fsdp_is_refused():
    sharded = type("FullyShardedDataParallel", (families.Wrapper,), {})(families.make("llama"))
    with pytest.raises(UnsupportedHead, match=r"sharded by FSDP: use palu.loss_in_head"):
        LMHead.from_model(sharded)


def test_sharded_weights_are_refused(one_process):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    model = families.make("llama")
    mesh = dist.init_device_mesh("cpu", (1,))
    fsdp.fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedHead, match=r"sharded by FSDP: use palu.loss_in_head"):
        LMHead.from_model(model)
    model = families.make("llama")
    model.lm_head.weight = nn.Parameter(dist.tensor.distribute_tensor(model.lm_head.weight, mesh))
    with pytest.raises(UnsupportedHead, match="weight of the output embedding is a DTensor"):
        LMHead.from_model(model)


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_compiled_models_are_refused(how):
    model, (ids, mask) = families.make("llama"), families.batch()
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    assert LMHead.from_model(compiled).weight is model.lm_head.weight
    with pytest.raises(UnsupportedHead, match="the model is compiled"):
        model_hidden_states(compiled, ids, mask)
    assert families.fusable_head(compiled, ids, mask) is None
    assert families.hooks_of(model) == 0


def test_compiled_layers_are_no_matter():
    model, (ids, mask) = families.make("llama"), families.batch()
    model.model.layers[0].compile(backend="eager")
    assert families.fusable_head(model, ids, mask) is not None


# ---- PEFT ----------------------------------------------------------------------------------------


def lora(model, targets=("q_proj", "v_proj"), **settings):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, **settings)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "granite"])
def test_lora_on_attention(name):
    model, (ids, mask) = families.make(name), families.batch()
    base = model(input_ids=ids, attention_mask=mask).logits
    adapted = lora(model)
    head = families.fusable_head(adapted, ids, mask)
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
    adapted, (ids, mask) = lora(families.make("llama"), targets, **settings), families.batch()
    with pytest.raises(UnsupportedHead, match=r"is a peft\..*, not a plain torch\.nn\.Linear"):
        LMHead.from_model(adapted)
    assert families.fusable_head(adapted, ids, mask) is None
    # The rows themselves are still right.
    got = adapted.get_output_embeddings()(model_hidden_states(adapted, ids, mask))
    torch.testing.assert_close(got, adapted(input_ids=ids, attention_mask=mask).logits)


def test_prompt_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    tuned, (ids, mask) = peft.get_peft_model(families.make("llama"), config), families.batch()
    with pytest.raises(UnsupportedHead, match=r"rows of shape \[3, 11, 16\] enter"):
        model_hidden_states(tuned, ids, mask)
    assert families.fusable_head(tuned, ids, mask) is None
