"""Our layers against PEFT: outputs, all gradients, 20 AdamW steps."""

import copy

import pytest
import torch
from helpers import One, gpt2, ids, llama
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lora_from_scratch import LoRAConfig, add_lora
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.linear import LoRAEmbedding

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
R, ALPHA = 3, 7


def pair(model, targets):
    """Return the model adapted by us and by PEFT, with equal A and B."""
    theirs = get_peft_model(
        copy.deepcopy(model),
        LoraConfig(r=R, lora_alpha=ALPHA, target_modules=targets),
    )
    ours = add_lora(
        model, LoRAConfig(r=R, lora_alpha=ALPHA, target_modules=targets)
    )
    factors = []
    for name, layer in lora_layers(ours).items():
        twin = theirs.base_model.model.get_submodule(name)
        if isinstance(layer, LoRAEmbedding):
            A, B = twin.lora_embedding_A, twin.lora_embedding_B
            A, B = A["default"], B["default"]
        else:
            A, B = twin.lora_A["default"].weight, twin.lora_B["default"].weight
        nn.init.normal_(layer.lora_A, std=0.05)
        nn.init.normal_(layer.lora_B, std=0.05)
        with torch.no_grad():
            A.copy_(layer.lora_A)
            B.copy_(layer.lora_B)
        factors += [(layer.lora_A, A), (layer.lora_B, B)]
    assert factors
    return ours, theirs, factors


def agree(ours, theirs, factors, batches, loss, tolerance):
    close = {"rtol": tolerance, "atol": tolerance}
    left = torch.optim.AdamW([a for a, _ in factors], lr=1e-3)
    right = torch.optim.AdamW([b for _, b in factors], lr=1e-3)
    for step, batch in enumerate(batches):
        x, y = loss(ours, batch), loss(theirs, batch)
        assert_close(x, y, **close)
        x.backward()
        y.backward()
        for a, b in factors:
            assert_close(a.grad, b.grad, **close)
            if step == 0:
                assert a.grad.count_nonzero() > 0
        left.step()
        right.step()
        left.zero_grad()
        right.zero_grad()
    for a, b in factors:
        assert_close(a, b, **close)


LAYERS = {
    "Linear": lambda: nn.Linear(13, 9),
    "Linear without bias": lambda: nn.Linear(13, 9, bias=False),
    "Conv1D": lambda: Conv1D(9, 13),
    "Embedding": lambda: nn.Embedding(37, 9),
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", LAYERS)
def test_one_layer_trains_as_in_peft(kind, dtype):
    torch.manual_seed(0)
    ours, theirs, factors = pair(One(LAYERS[kind]()).to(dtype), ["layer"])
    if kind == "Embedding":
        batches = [ids(seed=s) for s in range(20)]
    else:
        batches = [torch.randn(4, 5, 13, dtype=dtype) for _ in range(20)]
    target = torch.randn(9, dtype=dtype)

    def loss(model, x):
        return (model(x) - target).square().mean()

    agree(ours, theirs, factors, batches, loss, TOLERANCE[dtype])


@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_the_gradient_of_the_input_equals_pefts(kind):
    torch.manual_seed(0)
    ours, theirs, _ = pair(One(LAYERS[kind]()).double(), ["layer"])
    x = torch.randn(4, 13, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, 9, dtype=torch.float64)
    got = torch.autograd.grad((ours(x) * weights).sum(), x)
    expected = torch.autograd.grad((theirs(x) * weights).sum(), x)
    assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (gpt2, "all-linear"),
        (gpt2, ["c_attn", "wte"]),
        (llama, "all-linear"),
        (llama, ["q_proj", "v_proj", "embed_tokens"]),
    ],
)
def test_a_model_trains_as_in_peft(make, targets, dtype):
    ours, theirs, factors = pair(make(dtype), targets)
    batches = [ids(seed=s) for s in range(20)]

    def loss(model, tokens):
        return model(input_ids=tokens, labels=tokens).loss

    agree(ours, theirs, factors, batches, loss, TOLERANCE[dtype])


def test_dropout_falls_on_the_same_entries_as_in_peft():
    torch.manual_seed(0)
    settings = {"r": R, "lora_alpha": ALPHA, "target_modules": ["layer"]}
    base = One(nn.Linear(13, 9).double())
    theirs = get_peft_model(
        copy.deepcopy(base), LoraConfig(**settings, lora_dropout=0.4)
    )
    ours = add_lora(base, LoRAConfig(**settings, lora_dropout=0.4))
    layer, twin = ours.layer, theirs.base_model.model.layer
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        twin.lora_A["default"].weight.copy_(layer.lora_A)
        twin.lora_B["default"].weight.copy_(layer.lora_B)
    x = torch.randn(6, 13, dtype=torch.float64)
    torch.manual_seed(5)
    got = ours(x)
    torch.manual_seed(5)
    assert_close(got, theirs(x), rtol=0, atol=1e-12)
