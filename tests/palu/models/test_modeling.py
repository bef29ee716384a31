"""logits_at: the same rows as the full forward gives, with and without `logits_to_keep`; and the
tokens that end an answer."""

import pytest
import torch
from torch import nn

from palu.models import forward as modeling
from palu.models.forward import logits_at, shift_to_logits
from palu.models.wrappers import eos_token_ids
from tests.support import families, small


@pytest.fixture
def setup():
    tok = small.tokenizer()
    model = small.model(tok)
    torch.manual_seed(1)
    ids = torch.randint(3, len(tok), (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    keep = torch.zeros(3, 11, dtype=torch.bool)
    keep[0, [2, 3, 9]] = True
    keep[2, 0] = True
    modeling._TAKES_MASK.clear()
    yield model, ids, mask, keep
    modeling._TAKES_MASK.clear()


def full(model, ids, mask, keep):
    return model(input_ids=ids, attention_mask=mask).logits[keep]


def test_rows_are_those_of_the_full_forward(setup):
    model, ids, mask, keep = setup
    want = full(model, ids, mask, keep)
    for _ in range(2):  # the probing call and a later one
        got = logits_at(model, ids, mask, keep)
        torch.testing.assert_close(got, want)
    assert not torch.allclose(got[:1], want[1:2])  # the rows differ, so the order was tested


def test_installed_transformers_computes_only_the_kept_rows(setup):
    model, ids, mask, keep = setup
    seen = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[:-1]))
    logits_at(model, ids, mask, keep)
    logits_at(model, ids, mask, keep)
    if not modeling._TAKES_MASK[type(model)]:
        pytest.skip("this transformers takes no boolean mask as logits_to_keep")
    assert seen == [torch.Size([4]), torch.Size([4])]


def test_gradients_reach_the_model(setup):
    model, ids, mask, keep = setup
    logits_at(model, ids, mask, keep).square().sum().backward()
    got = model.lm_head.weight.grad.clone()
    model.zero_grad()
    full(model, ids, mask, keep).square().sum().backward()
    torch.testing.assert_close(got, model.lm_head.weight.grad)


class Old(nn.Module):
    """Stands in for an older transformers: a mask as `logits_to_keep` is refused or ignored."""

    def __init__(self, inner, behaviour):
        super().__init__()
        self.inner, self.behaviour, self.calls = inner, behaviour, 0

    def forward(self, input_ids, attention_mask=None, use_cache=None, logits_to_keep=0):
        self.calls += 1
        hidden = self.inner.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        if isinstance(logits_to_keep, torch.Tensor) and self.behaviour == "refuse":
            hidden = hidden[:, logits_to_keep, :]
        return type("Output", (), {"logits": self.inner.lm_head(hidden)})


class Plain(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return self.inner(input_ids=input_ids, attention_mask=attention_mask)


@pytest.mark.parametrize("behaviour", ["refuse", "ignore"])
def test_models_without_the_mask_fall_back(setup, behaviour):
    model, ids, mask, keep = setup
    old = Old(model, behaviour)
    want = full(model, ids, mask, keep)
    torch.testing.assert_close(logits_at(old, ids, mask, keep), want)
    calls = old.calls
    torch.testing.assert_close(logits_at(old, ids, mask, keep), want)
    assert old.calls == calls + 1  # the verdict is remembered
    assert modeling._TAKES_MASK[Old] is False


def test_a_model_without_the_argument(setup):
    model, ids, mask, keep = setup
    got = logits_at(Plain(model), ids, mask, keep)
    torch.testing.assert_close(got, full(model, ids, mask, keep))


def test_the_wrapper_is_what_gets_called(setup):
    model, ids, mask, keep = setup
    wrapper = families.Wrapper(model)
    got = logits_at(wrapper, ids, mask, keep)
    torch.testing.assert_close(got, full(model, ids, mask, keep))
    assert wrapper.calls >= 1


def test_peft_adapters_are_applied(setup):
    peft = pytest.importorskip("peft")
    model, ids, mask, keep = setup
    base = full(model, ids, mask, keep).detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    got = logits_at(adapted, ids, mask, keep)
    torch.testing.assert_close(got, full(adapted, ids, mask, keep))
    assert not torch.allclose(got, base)


def test_no_row_kept(setup):
    model, ids, mask, keep = setup
    for _ in range(2):
        assert logits_at(model, ids, mask, torch.zeros_like(keep)).shape == (0, 330)


def test_bad_masks(setup):
    model, ids, mask, keep = setup
    with pytest.raises(TypeError, match=r"positions must be a bool tensor, not torch\.int64"):
        logits_at(model, ids, mask, keep.long())
    with pytest.raises(ValueError, match=r"shape of input_ids, \(3, 11\), not \(3, 10\)"):
        logits_at(model, ids, mask, keep[:, 1:])


def test_prediction_rows_shift_by_one():
    at_labels = torch.tensor([[True, False, True, True], [False, True, False, False]])
    want = torch.tensor([[False, True, True, False], [True, False, False, False]])
    assert torch.equal(shift_to_logits(at_labels), want)


def test_end_tokens_are_those_of_tokenizer_settings_and_config(setup):
    model, tok = setup[0], small.tokenizer()
    model.generation_config.eos_token_id = [9, 7]
    model.config.eos_token_id = 5
    assert eos_token_ids(model, None) == [5, 7, 9]
    assert eos_token_ids(nn.DataParallel(model), tok) == sorted({5, 7, 9, tok.eos_token_id})
    assert eos_token_ids(nn.Linear(1, 1), None) == []
