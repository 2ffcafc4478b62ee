"""Tests for lora_from_scratch/kohya.py, against Kohya's own forward pass."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import (
    AdapterError,
    LoRAConfig,
    add_lora,
    load_adapter,
    save_adapter,
)
from lora_from_scratch.inject import lora_parameters
from lora_from_scratch.kohya import from_kohya, kohya_name, to_kohya
from lora_from_scratch.unet import TinyUNet

SETTINGS = dict(
    r=3,
    lora_alpha=7,
    target_modules=["to_q", "to_out.0", "conv1", "conv_shortcut"],
    rank_pattern={"to_q": 2},
    alpha_pattern={"conv1": 5},
)
X, T, Y = torch.randn(2, 1, 8, 8), torch.tensor([3, 70]), torch.tensor([4, 7])


def base():
    """Return the same random U-Net each time."""
    torch.manual_seed(0)
    return TinyUNet()


@pytest.fixture(params=[False, True], ids=["plain", "rslora"])
def ours(request, tmp_path):
    """Return an adapted model, saved to tmp_path / "peft"."""
    model = add_lora(base(), LoRAConfig(**SETTINGS, use_rslora=request.param))
    torch.manual_seed(1)
    for tensor in lora_parameters(model):
        nn.init.normal_(tensor, std=0.2)
    save_adapter(model, tmp_path / "peft")
    return model


def as_kohya_computes(model, tensors):
    """Hang Kohya's branch on every module: up(down(x)) * alpha / dim."""
    names = {kohya_name(n): m for n, m in model.named_modules()}
    for key, down in tensors.items():
        name, _, what = key.partition(".")
        if what != "lora_down.weight":
            continue
        up, alpha = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.alpha"]

        def branch(module, args, h, down=down, up=up, alpha=alpha):
            if isinstance(module, nn.Conv2d):
                z = F.conv2d(args[0], down, None, module.stride, module.padding)
                return h + F.conv2d(z, up) * (alpha / len(down))
            return h + F.linear(F.linear(args[0], down), up) * (
                alpha / len(down)
            )

        names[name].register_forward_hook(branch)
    return model


@torch.no_grad()
def test_kohyas_arithmetic_on_our_file_gives_our_output(ours, tmp_path):
    to_kohya(tmp_path / "peft", tmp_path / "k.safetensors")
    tensors = load_file(tmp_path / "k.safetensors")
    theirs = as_kohya_computes(base(), tensors)
    assert_close(theirs(X, T, Y), ours(X, T, Y), rtol=1e-4, atol=1e-5)
    key = "lora_unet_mid_block_attentions_0_to_q.lora_down.weight"
    assert tensors[key].shape == (2, 48)
    key = "lora_unet_up_blocks_1_resnets_0_conv1.lora_down.weight"
    assert tensors[key].shape == (3, 72, 3, 3)
    assert (ours(X, T, Y) - base()(X, T, Y)).abs().max() > 0.1


@torch.no_grad()
def test_there_and_back_gives_the_same_output(ours, tmp_path):
    to_kohya(tmp_path / "peft", tmp_path / "k.safetensors")
    from_kohya(tmp_path / "k.safetensors", base(), tmp_path / "back")
    again = load_adapter(base(), tmp_path / "back")
    assert_close(again(X, T, Y), ours(X, T, Y), rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("alpha", [None, 0.0, 3.0])
def test_without_alpha_it_is_the_rank(tmp_path, alpha):
    name = "lora_unet_mid_block_attentions_0_to_v"
    tensors = {
        f"{name}.lora_down.weight": torch.randn(3, 48),
        f"{name}.lora_up.weight": torch.randn(48, 3),
    }
    if alpha is not None:
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "k.safetensors")
    from_kohya(tmp_path / "k.safetensors", base(), tmp_path / "peft")
    model = load_adapter(base(), tmp_path / "peft")
    layer = model.mid_block["attentions"][0].to_v
    assert layer.scaling == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_unet_nobody.lora_up.weight": torch.ones(1)}, "0 modules"),
        ({"lora_unet_conv_in.hada_w1_a": torch.ones(1)}, "conv_in has hada"),
        ({"lora_unet_conv_in.lora_up.weight": torch.ones(1)}, "conv_in has"),
        (
            {
                "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2),
                "lora_unet_conv_in.lora_down.weight": torch.ones(3, 4),
            },
            "no product",
        ),
    ],
)
def test_what_is_no_plain_lora_of_this_model_is_refused(
    tmp_path, change, message
):
    save_file(change, tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match=message):
        from_kohya(tmp_path / "k.safetensors", base(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unreadable_and_empty_files_are_refused(tmp_path):
    path = tmp_path / "k.safetensors"
    with pytest.raises(AdapterError, match="cannot be read"):
        from_kohya(path, base(), tmp_path / "out")
    path.write_bytes(b"nonsense")
    with pytest.raises(AdapterError, match="cannot be read"):
        from_kohya(path, base(), tmp_path / "out")
    save_file({}, path)
    with pytest.raises(AdapterError, match="no tensors"):
        from_kohya(path, base(), tmp_path / "out")


def test_two_modules_of_one_name_are_refused(tmp_path):
    """a_b.c and a.b_c are both a_b_c."""
    linear = lambda: nn.Linear(4, 4)  # noqa: E731
    model = nn.Module()
    model.a_b, model.a = nn.Module(), nn.Module()
    model.a_b.c, model.a.b_c = linear(), linear()
    add_lora(model, LoRAConfig(r=1, target_modules=["c", "b_c"]))
    save_adapter(model, tmp_path / "peft")
    with pytest.raises(AdapterError, match="both be lora_unet_a_b_c"):
        to_kohya(tmp_path / "peft", tmp_path / "k.safetensors")
    with pytest.raises(AdapterError, match="cannot write"):
        save_adapter(
            add_lora(base(), LoRAConfig(r=1, target_modules=["to_q"])),
            tmp_path / "q",
        )
        to_kohya(tmp_path / "q", tmp_path / "no folder" / "k.safetensors")
