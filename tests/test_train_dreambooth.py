"""The DreamBooth script, run whole on a CPU with a tiny random pipeline."""

import json

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", reason="pip install diffusers==0.42.1")

from diffusers import (  # noqa: E402
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.loaders.lora_conversion_utils import (  # noqa: E402
    _convert_non_diffusers_lora_to_diffusers,
)
from PIL import Image  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from transformers import (  # noqa: E402
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
)

from lora_from_scratch.unet import CHANNELS, GROUPS, TinyUNet  # noqa: E402
from tools import train_dreambooth as tool  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_tiny_unet_is_diffusers_unet():
    torch.manual_seed(0)
    ours = TinyUNet()
    theirs = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=GROUPS,
        num_class_embeds=11,
        attention_head_dim=CHANNELS[1] // 4,
    )
    theirs.load_state_dict(ours.state_dict())  # strict: the same names
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([0, 9, 99]), torch.arange(3)
    assert_close(ours(x, t, y), theirs(x, t, y).sample, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Write a pipeline of Stable Diffusion's classes, tiny and random."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{x}</w>" for x in letters)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    (root / "vocab.json").write_text(json.dumps(vocab))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=16
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=vocab["<|startoftext|>"],
            eos_token_id=vocab["<|endoftext|>"],
        )
    )
    blocks = ("CrossAttnDownBlock2D", "DownBlock2D")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=blocks,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae, text, tokenizer, unet, DDIMScheduler(), None, None, None, False
    )
    pipe.save_pretrained(root / "model")
    pictures = root / "pictures"
    pictures.mkdir()
    for i in range(2):
        Image.new("RGB", (20 + i, 17), (200, 40 * i, 9)).save(
            pictures / f"{i}.png"
        )
    return root


def test_the_whole_script_and_both_files(folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fewer = tool.draw
    monkeypatch.setattr(tool, "draw", lambda *a: fewer(*a, **({"steps": 2})))
    out = folder / "out"
    asked = f"--model {folder / 'model'} --pictures {folder / 'pictures'}"
    asked += f" --out {out} --side 16 --steps 4 --own 1 --r 2 --lr 0.05"
    tool.main([*asked.split(), "--word", "sks dog", "--kind", "dog"])
    assert "numbers to train" in capsys.readouterr().out
    for name in ("before", "after", "kind"):
        assert Image.open(out / f"{name}.png").size == (16, 16)

    pipe = tool.load(folder / "model")
    x = torch.randn(1, 4, 8, 8)
    text = tool.to_text(pipe, "sks dog")
    plain = pipe.unet(x, 5, encoder_hidden_states=text).sample
    outputs = []
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        again = tool.load(folder / "model")
        again.load_lora_weights(out, weight_name=file)
        outputs.append(again.unet(x, 5, encoder_hidden_states=text).sample)
    assert_close(outputs[0], outputs[1])
    assert (outputs[0] - plain).abs().max() > 1e-4
    state = load_file(out / "kohya.safetensors")
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2"
    assert f"{name}_to_out_0.lora_down.weight" in state
    assert state[f"{name}_to_k.alpha"] == 2
    _convert_non_diffusers_lora_to_diffusers(dict(state))  # knows all names


def test_it_learns_and_touches_nothing_but_the_adapter(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    pipe = tool.load(folder / "model")
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    x = torch.randn(2, 4, 8, 8)
    sets = [(x[:1], tool.to_text(pipe, "a")), (x[1:], tool.to_text(pipe, "b"))]
    trained = tool.add_adapter(pipe, 4)
    list(tool.train(pipe, sets, 3, 0.01, trained))
    after = pipe.unet.state_dict()
    for name, value in before.items():
        place = name if name in after else name.replace(".w", ".base_layer.w")
        place = place if place in after else name.replace(".b", ".base_layer.b")
        if place in after:
            assert torch.equal(after[place], value), name
    assert all(p.requires_grad for p in trained)
    assert any(
        p.abs().max() > 0
        for n, p in pipe.unet.named_parameters()
        if "lora_B" in n
    )


def test_a_folder_without_pictures_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        tool.read_pictures(tmp_path, 16)


def test_a_model_that_predicts_something_else_is_refused(folder):
    pipe = tool.load(folder / "model")
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="v_prediction"):
        list(tool.train(pipe, [], 1, 0.1, tool.add_adapter(pipe, 2)))
