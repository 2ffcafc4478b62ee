"""Tests for lora_from_scratch/conv.py: one per claim of lesson 18."""

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    combine,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
    unmerge_lora,
)
from lora_from_scratch.conv import LoRAConv2d
from lora_from_scratch.inject import lora_layers, lora_parameters

BATCH, C_IN, C_OUT, R = 2, 3, 5, 4
KINDS = [  # kernel, stride, padding, dilation
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (1, 1, 0, 1),
    ((3, 2), (2, 1), (0, 1), 1),
    (3, 1, "same", 2),
]


def layer(kernel=3, stride=1, padding=1, dilation=1, bias=True):
    """Return an adapter over a random convolution, B not zero, float64."""
    torch.manual_seed(0)
    base = nn.Conv2d(C_IN, C_OUT, kernel, stride, padding, dilation, bias=bias)
    r = min(R, C_IN) if kernel == 1 else R
    lora = LoRAConv2d(base.double(), r, 6)
    nn.init.normal_(lora.lora_B)
    return lora


def model():
    """Return a small network of a linear layer between two convolutions."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(C_IN, 4, 3, stride=2, padding=1), nn.Conv2d(4, C_OUT, 1)
    )


X = torch.randn(
    BATCH, C_IN, 9, 8, dtype=torch.float64, generator=torch.Generator()
)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_forward_is_the_dense_convolution_with_w0_plus_dw(kind):
    lora = layer(*kind)
    base = lora.base_layer
    dW = torch.einsum("or,rihw->oihw", lora.lora_B[..., 0, 0], lora.lora_A) * (
        6 / lora.r
    )
    expected = F.conv2d(X, base.weight + dW, base.bias, *kind[1:])
    assert_close(lora(X), expected)
    assert_close(lora.get_delta_weight(), dW)


def test_it_is_lora_on_patches():
    lora = layer(3, 2, 1)
    patches = F.unfold(X, 3, padding=1, stride=2)  # (b, c_in k k, places)
    A, B = lora.lora_A.flatten(1), lora.lora_B.flatten(1)
    update = 6 / R * torch.einsum("or,ri,bip->bop", B, A, patches)
    expected = lora.base_layer(X) + update.view(BATCH, C_OUT, 5, 4)
    assert_close(lora(X), expected)


def test_rank_and_number_of_trained_numbers():
    lora = layer()
    rank = torch.linalg.matrix_rank(lora.get_delta_weight().flatten(1))
    assert rank == R
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert trained == R * (9 * C_IN + C_OUT)


def test_it_starts_at_the_base_layer_and_only_b_moves_first():
    lora = layer()
    lora.reset_parameters()
    assert torch.equal(lora(X), lora.base_layer(X))
    lora(X).square().sum().backward()
    assert lora.lora_A.grad.abs().max() == 0 < lora.lora_B.grad.abs().max()


def test_merged_equals_unmerged_and_unmerge_restores():
    lora = layer()
    before, h = lora.base_layer.weight.clone(), lora(X)
    lora.merge()
    assert_close(lora(X), h)
    lora.unmerge()
    assert_close(lora.base_layer.weight, before)


def test_dropout_falls_on_the_branch_only():
    lora = LoRAConv2d(layer().base_layer, R, 6, lora_dropout=0.5)
    assert torch.equal(lora(X), lora.base_layer(X))  # B is zero
    nn.init.normal_(lora.lora_B)
    assert not torch.equal(lora(X), lora(X))
    assert torch.equal(lora.eval()(X), lora(X))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        (nn.Linear(3, 4), "cannot wrap Linear"),
        (nn.ConvTranspose2d(3, 4, 3), "cannot wrap ConvTranspose2d"),
        (nn.Conv2d(4, 6, 3, groups=2), "groups=2"),
        (nn.Conv2d(3, 4, 3, padding_mode="circular"), "'circular'"),
        (nn.Conv2d(3, 3, 1), "r must be in 1..3"),
    ],
)
def test_what_does_not_fit_is_refused(base, message):
    with pytest.raises(ValueError, match=message):
        LoRAConv2d(base, 4, 8)


def test_rank_may_exceed_the_channels_that_come_in():
    assert LoRAConv2d(nn.Conv2d(2, 9, 3), 9, 8).lora_A.shape == (9, 2, 3, 3)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_gives_the_same_output_and_dw(tmp_path, rslora):
    x = X.float()
    settings = dict(r=3, lora_alpha=5, target_modules=["0", "1"])
    ours = add_lora(model(), LoRAConfig(**settings, use_rslora=rslora))
    for tensor in lora_parameters(ours):
        nn.init.normal_(tensor)
    save_adapter(ours, tmp_path)
    theirs = PeftModel.from_pretrained(model(), tmp_path)
    assert_close(theirs(x), ours(x))
    for name, own in lora_layers(ours).items():
        other = theirs.base_model.model.get_submodule(name)
        assert_close(other.get_delta_weight("default"), own.get_delta_weight())


def test_an_adapter_of_pefts_loads_here(tmp_path):
    config = LoraConfig(
        r=2, lora_alpha=7, target_modules=["0", "1"], init_lora_weights=False
    )
    theirs = get_peft_model(model(), config)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(model(), tmp_path)
    assert_close(ours(X.float()), theirs(X.float()))
    remove_lora(ours)
    assert torch.equal(ours(X.float()), model()(X.float()))


def test_another_base_is_noticed(tmp_path):
    ours = add_lora(model(), LoRAConfig(r=2, target_modules=["0"]))
    save_adapter(ours, tmp_path)
    other = model()
    nn.init.normal_(other[0].weight)
    with pytest.raises(ValueError, match="another base model"):
        load_adapter(other, tmp_path)


@pytest.mark.parametrize("method", ["add", "cat", "svd", "slerp", "ties"])
def test_adapters_of_convolutions_can_be_combined(tmp_path, method):
    folders, dW = {}, {}
    for i, name in enumerate(("a", "b")):
        targets = ["0", "1"] if i else ["0"]  # one lacks a layer
        config = LoRAConfig(r=i + 1, lora_alpha=4, target_modules=targets)
        one = add_lora(model(), config)
        torch.manual_seed(i)
        for tensor in lora_parameters(one):
            nn.init.normal_(tensor)
        save_adapter(one, tmp_path / name)
        folders[name] = tmp_path / name
        dW[name] = {
            n: m.get_delta_weight() for n, m in lora_layers(one).items()
        }
    weights = {"a": 0.5, "b": 2.0}
    options = {"r": 4} if method == "svd" else {}
    folder = combine(folders, weights, method, **options)
    both = load_adapter(model(), folder)
    theirs = PeftModel.from_pretrained(model(), folder)
    assert_close(both(X.float()), theirs(X.float()), rtol=1e-4, atol=1e-4)
    if method in ("add", "cat", "svd"):
        for name, own in lora_layers(both).items():
            exact = sum(w * dW[n].get(name, 0) for n, w in weights.items())
            assert_close(own.get_delta_weight(), exact, rtol=1e-4, atol=1e-5)
    merge_lora(both)
    assert_close(both(X.float()), theirs(X.float()), rtol=1e-4, atol=1e-4)
    unmerge_lora(both)
