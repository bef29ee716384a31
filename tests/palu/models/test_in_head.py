"""A loss in the head's forward is the loss from hidden rows, whatever the model is wrapped in."""

import copy
import json

import pytest
import torch
from torch import nn

from palu import LMHead, PALULoss, PALUOutput, loss_in_head, model_hidden_states, whole_head
from palu.models.wrappers import UnsupportedHead
from tests.support import WORKERS, families, ranks
from tests.support.once import once
from tests.support.workers import in_head as worker
from tests.support.workers import step_losses

LOSS = PALULoss(top_k=7, objective="entropy", eos_token_id=2)


def launch(processes, folder):
    """What every process found (`tests/support/workers/in_head.py`)."""
    ranks.launch([WORKERS / "in_head.py", folder], processes, folder)
    return [json.loads((folder / f"rank-{n}.json").read_text()) for n in range(processes)]


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def launched(request, tmp_path_factory):
    count = request.param
    return once(tmp_path_factory, f"in_head-{count}", lambda folder: launch(count, folder))[1]


@pytest.mark.parametrize("name", worker.CASES)
def test_steps_are_those_of_one_process(launched, name):
    """Two steps of SGD: the losses within 1e-6 of themselves, the weights within 2e-6 where they
    moved by 1e-3 to 0.2 (float64: 1e-14; bfloat16: 4e-3, 10% of the move)."""
    case = worker.CASES[name]
    wide, half = case.get("dtype") == torch.float64, case.get("policy")
    near = 1e-14 if wide else 4e-3 if half else 1e-6
    for one in launched:
        found = one[name]
        assert found["moved"] > 1e-3
        assert found["together"] == pytest.approx(found["alone"], rel=near)
        assert found["far"] <= (0.1 * found["moved"] if half else 2 * near)


@pytest.mark.parametrize("name", step_losses.CASES)
def test_step_losses_are_those_of_one_process(launched, name):
    """In float64; the means of the terms are float32."""
    case = step_losses.CASES[name]
    for one in launched:
        found = one[f"step: {name}"]
        assert found["without_logits"] == (case["method"] != "rmu" and "hooked" not in case)
        assert found["together"][0] == pytest.approx(found["alone"][0], rel=1e-13)
        assert found["together"][1:] == pytest.approx(found["alone"][1:], rel=1e-6)
        assert found["moved"] > 0.02 and found["far"] < 1e-14


def test_what_one_process_finds_holds_in_all(launched):
    where = f"in process {len(launched) - 1} "
    found = [[text.removeprefix(where) for text in one["disagreement"]] for one in launched]
    assert found == [found[0]] * len(launched)
    assert "has forward hooks" in found[0][0] and "with scale 2 and softcap None" in found[0][1]
    assert all(text.startswith(where) for text in launched[0]["disagreement"])


def test_an_error_in_one_process_is_its_own(launched):
    said = [one["error"][0] for one in launched]
    assert said == ["nothing"] * (len(said) - 1) + ["ValueError: of my own"]
    assert not any(one["error"][1] for one in launched)


# ---- in one process ------------------------------------------------------------------------------


def step(model, original, by):
    ids, mask = families.batch()
    labels = torch.where(mask.bool(), -200, -100)
    labels[:, 2:4] = ids[:, 2:4]
    with torch.no_grad():
        ref = model_hidden_states(original, ids, mask)
    ref_head = LMHead.from_model(original)

    def loss(hidden, head):
        return LOSS.from_hidden(hidden, head, labels, ref, ref_head)

    if by == "head":
        out = loss_in_head(model, loss, ids, mask)
    else:
        out = loss(model_hidden_states(model, ids, mask), LMHead.from_model(model))
    (3 * out.loss).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out, gradients


def assert_same(model, original):
    (got, gradients), (want, right) = (step(model, original, by) for by in ("head", "rows"))
    assert (
        type(got) is PALUOutput and torch.stack(got[:3]).tolist() == torch.stack(want[:3]).tolist()
    )
    assert gradients.keys() == right.keys() and len(right) > 0
    assert all(torch.equal(gradients[n], right[n]) for n in right)
    assert any(g.abs().max() > 0 for g in right.values())
    assert families.hooks_of(model) == 0 and "forward" not in vars(model.get_output_embeddings())


@pytest.mark.parametrize("name", families.FAMILIES)
def test_a_plain_model_bit_for_bit(name):
    model = families.make(name).train(name not in ("gpt2", "gptj"))  # whose dropout draws
    assert_same(model, families.make(name).requires_grad_(False))


@pytest.mark.parametrize("part", ["head", "body", "embedding"])
def test_parts_that_are_frozen(part):
    model = families.make("llama_tied" if part == "embedding" else "llama")
    if part == "body":
        model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(part == "body")
    assert_same(model, families.make("llama").requires_grad_(False))


def test_a_compiled_body():
    model, original = families.make("llama"), families.make("llama").requires_grad_(False)
    model.model.compile(backend="eager")
    (_, got), (_, want) = (
        step(model, original, "head"),
        step(families.make("llama"), original, "rows"),
    )
    assert all(torch.allclose(got[n], want[n], rtol=1e-5, atol=1e-6) for n in want)


def mean_square(hidden, head):
    return head.logits(hidden).square().mean()


def test_what_a_loss_gives():
    model, (ids, mask) = families.make("llama"), families.batch()
    value = loss_in_head(model, mean_square, ids, mask)
    pair = loss_in_head(model, lambda h, w: (mean_square(h, w), h, "x"), ids, mask)
    assert type(pair) is tuple and torch.equal(pair[0], value) and pair[2] == "x"
    assert pair[0].requires_grad and not pair[1].requires_grad
    with torch.no_grad():
        assert torch.equal(loss_in_head(model, mean_square, ids, mask), value)
    for wrong in (None, (), 1.0, ("x",)):
        with pytest.raises(TypeError, match=r"loss gave a .*; it must give a tensor"):
            loss_in_head(model, lambda h, w, wrong=wrong: wrong, ids, mask)
    zero = loss_in_head(model, lambda h, w: h.new_zeros(()), ids, mask)
    zero.backward()
    assert zero.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_backward_twice_and_in_any_order():
    model, (ids, mask) = families.make("llama"), families.batch()
    one = loss_in_head(model, mean_square, ids, mask)
    two = loss_in_head(model, lambda h, w: mean_square(h, w) * 2, ids, mask)
    weight = model.lm_head.weight
    (want,) = torch.autograd.grad(
        mean_square(model_hidden_states(model, ids, mask), LMHead.from_model(model)), weight
    )
    (got,) = torch.autograd.grad(two - one, weight, retain_graph=True)
    torch.testing.assert_close(got, want)
    (got,) = torch.autograd.grad(5 * one, weight)
    torch.testing.assert_close(got, 5 * want)


class Odd(nn.Module):
    """Calls a model and does something with what comes out."""

    def __init__(self, inner, do):
        super().__init__()
        self.inner, self.do = inner, do

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        return self.do(self.inner, inputs)


def detached(model, inputs):
    out = model(**inputs)
    out.logits = out.logits.detach()
    return out


def whole_logits(model, inputs):
    out = model(**inputs)
    out.logits = out.logits.new_zeros(3, 9, families.VOCAB)
    return out


def largest(model, inputs):
    model(**inputs).logits.max()


def without_head(model, inputs):
    return model.model(**inputs)


def without_gradient(model, inputs):
    with torch.no_grad():
        return model(**inputs)


ODD = {
    "the logits of the model are not made of": (detached, whole_logits),
    "more than once": (lambda m, i: (m(**i), m(**i))[1],),
    "does not call its output embedding": (without_head,),
    "switches gradients on or off": (without_gradient,),
    r"fails when no logits leave its output embedding \(.*max": (largest,),
}


@pytest.mark.parametrize("reason", ODD)
def test_models_that_are_refused(reason):
    ids, mask = families.batch()
    for do in ODD[reason]:
        model = Odd(families.make("llama"), do)
        with pytest.raises(UnsupportedHead, match=reason):
            loss_in_head(model, mean_square, ids, mask)
        assert "forward" not in vars(model.get_output_embeddings())


def test_heads_that_are_refused():
    ids, mask = families.batch()
    model = families.make("llama")
    model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedHead, match="has forward hooks"):
        loss_in_head(model, mean_square, ids, mask)
    compiled = torch.compile(families.make("llama"), backend="eager")
    with pytest.raises(UnsupportedHead, match="is compiled"):
        loss_in_head(compiled, mean_square, ids, mask)


def test_an_error_in_the_loss_is_the_users():
    model, (ids, mask) = families.make("llama"), families.batch()
    right = copy.deepcopy(model.state_dict())

    def fails(hidden, head):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        loss_in_head(model, fails, ids, mask)
    assert vars(model.lm_head).keys() == vars(families.make("llama").lm_head).keys()
    assert all(torch.equal(right[n], p) for n, p in model.state_dict().items())
    assert loss_in_head(model, mean_square, ids, mask).requires_grad


def test_the_head_of_a_plain_model():
    model = families.make("granite")
    with whole_head(model) as head:
        assert head.weight.data_ptr() == model.lm_head.weight.data_ptr()
        assert not head.requires_grad and head.logit_scale == 1 / 6
