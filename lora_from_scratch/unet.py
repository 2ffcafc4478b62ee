"""A U-Net of Diffusers' shape for pictures of 8 x 8, and its weights.

Maps a noisy picture x (b, 1, 8, 8), its step t (b,) and a label y (b,) to
the noise in it, (b, 1, 8, 8). On the way down it halves the side once, on
the way up it doubles it again and sees what it saw on the way down.

Names and arithmetic are those of Diffusers' ``UNet2DModel`` with two blocks
of 24 and 48 channels, so that names of adapters mean the same in both.
Source: Ho et al. 2020, arXiv:2006.11239, appendix B; Diffusers 0.42,
``models/unets/unet_2d.py``.
Taught in: notebooks/18_diffusion.ipynb
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_from_scratch.files import check_sums

FOLDER = Path(__file__).parent / "assets" / "tiny_ddpm"
CHANNELS, GROUPS, HEADS = (24, 48), 8, 4
NO_LABEL = 10  # the label of "any digit"; 0 to 9 are the digits
WITHHELD = 7  # the digit whose label no training picture had


class ResnetBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, shifted by step and label."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(width, c_out)
        self.norm2 = nn.GroupNorm(GROUPS, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = None
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """Map x (b, c_in, h, w) and e (b, width) to (b, c_out, h, w)."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(F.silu(e))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Attention(nn.Module):
    """Self-attention in which every pixel is a token."""

    def __init__(self, c: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(GROUPS, c)
        self.to_q, self.to_k, self.to_v = (nn.Linear(c, c) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, c, h, w) to the same shape."""
        u = self.group_norm(x).flatten(2).transpose(1, 2)  # (b, h w, c)
        q, k, v = (
            project(u).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        u = F.scaled_dot_product_attention(q, k, v)  # (b, heads, h w, c/heads)
        u = self.to_out[0](u.transpose(1, 2).flatten(2))
        return x + u.transpose(1, 2).view_as(x)


class _Resample(nn.Module):
    """A convolution that halves the side, or one after it was doubled."""

    def __init__(self, c: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=stride, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, c, h, w) to half or double h and w."""
        if self.conv.stride == (1, 1):
            x = F.interpolate(x, scale_factor=2.0)
        return self.conv(x)


def _block(**parts):
    lists = {name: nn.ModuleList(found) for name, found in parts.items()}
    return nn.ModuleDict(lists)


class TinyUNet(nn.Module):
    """The noise predictor. New weights are random: see ``load_unet``."""

    def __init__(self):
        super().__init__()
        a, b = CHANNELS
        width = 4 * a

        def resnet(c_in, c_out):
            return ResnetBlock(c_in, c_out, width)

        self.conv_in = nn.Conv2d(1, a, 3, padding=1)
        self.time_embedding = nn.ModuleDict(
            {
                "linear_1": nn.Linear(a, width),
                "linear_2": nn.Linear(width, width),
            }
        )
        self.class_embedding = nn.Embedding(NO_LABEL + 1, width)
        self.down_blocks = nn.ModuleList(
            [
                _block(resnets=[resnet(a, a)], downsamplers=[_Resample(a, 2)]),
                _block(resnets=[resnet(a, b)]),
            ]
        )
        self.mid_block = _block(
            resnets=[resnet(b, b), resnet(b, b)], attentions=[Attention(b)]
        )
        self.up_blocks = nn.ModuleList(
            [
                _block(
                    resnets=[resnet(b + b, b), resnet(b + a, b)],
                    upsamplers=[_Resample(b, 1)],
                ),
                _block(resnets=[resnet(b + a, a), resnet(a + a, a)]),
            ]
        )
        self.conv_norm_out = nn.GroupNorm(GROUPS, a)
        self.conv_out = nn.Conv2d(a, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the predicted noise, in the shape of x.

        Args:
            x: noisy pictures, (b, 1, h, w), h and w even.
            t: their steps, integers from 0 (nearly clean), (b,).
            y: labels 0 to 9, or ``NO_LABEL``, (b,).
        """
        hidden = self.time_embedding["linear_1"](waves(t, CHANNELS[0]).to(x))
        e = self.time_embedding["linear_2"](F.silu(hidden))
        e = e + self.class_embedding(y)
        x = self.conv_in(x)
        seen = [x]
        for block in self.down_blocks:
            x = block["resnets"][0](x, e)
            seen.append(x)
            if "downsamplers" in block:
                x = block["downsamplers"][0](x)
                seen.append(x)
        first, second = self.mid_block["resnets"]
        x = second(self.mid_block["attentions"][0](first(x, e)), e)
        for block in self.up_blocks:
            for resnet in block["resnets"]:
                x = resnet(torch.cat([x, seen.pop()], dim=1), e)
            if "upsamplers" in block:
                x = block["upsamplers"][0](x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def waves(t: Tensor, n: int) -> Tensor:
    """Return n cosines and sines of the steps t (b,), (b, n), float32."""
    rates = torch.exp(-math.log(10_000) * torch.arange(n // 2) / (n // 2))
    angles = t[:, None].float() * rates.to(t.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def load_unet() -> TinyUNet:
    """Return the pretrained U-Net: float32, CPU, eval mode.

    Raises:
        RuntimeError: if a file of it is missing or damaged.
    """
    check_sums(FOLDER, "install the package again")
    model = TinyUNet()
    state = load_file(FOLDER / "model.safetensors")
    model.load_state_dict({k: v.float() for k, v in state.items()})
    return model.eval()
