"""DreamBooth with LoRA: teach Stable Diffusion one thing from a few pictures.

    pip install diffusers
    python tools/train_dreambooth.py --pictures my_dog --word "sks dog" \\
        --kind dog --out my_dog_lora

Fetches Stable Diffusion 1.5 from the hub (about 4 GB), lets it draw pictures
of the kind (prior preservation), trains LoRA on to_q, to_k, to_v and to_out.0
of the U-Net, and writes pytorch_lora_weights.safetensors for Diffusers,
kohya.safetensors for most other tools, and before and after pictures. As the
memory of one GPU of 16 GB is meant to be enough, the frozen parts are in
float16 there, the adapter and the loss in float32.

This file was tested on a CPU with a tiny random model of the same classes. It
has not run on a GPU, and not with Stable Diffusion's weights.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file

from lora_from_scratch.kohya import ALPHA, DOWN, UP, kohya_name

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


def load(model):
    """Return the pipeline, frozen, on the GPU if there is one."""
    gpu = torch.cuda.is_available()
    pipe = StableDiffusionPipeline.from_pretrained(
        model,
        torch_dtype=torch.float16 if gpu else torch.float32,
        safety_checker=None,
    )
    for part in (pipe.vae, pipe.text_encoder, pipe.unet):
        part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=not gpu)
    return pipe.to("cuda" if gpu else "cpu")


def read_pictures(folder, side):
    """Return the pictures of a folder, cut square, (n, 3, side, side).

    Raises:
        ValueError: if there is none.
    """
    paths = sorted(
        p for p in Path(folder).iterdir() if p.suffix.lower() in ENDINGS
    )
    if not paths:
        raise ValueError(f"{folder} holds no {', '.join(sorted(ENDINGS))}")
    return to_pixels([Image.open(path) for path in paths], side)


def to_pixels(pictures, side):
    """Return PIL pictures as a tensor (n, 3, side, side), -1 to 1."""
    found = []
    for picture in pictures:
        picture = picture.convert("RGB")
        cut = min(picture.size)
        left, top = (picture.width - cut) // 2, (picture.height - cut) // 2
        picture = picture.crop((left, top, left + cut, top + cut))
        flat = torch.frombuffer(
            bytearray(picture.resize((side, side)).tobytes()), dtype=torch.uint8
        )
        found.append(flat.view(side, side, 3).permute(2, 0, 1) / 127.5 - 1)
    return torch.stack(found)


def draw(pipe, prompt, n, side, seed, steps=25):
    """Return n pictures that the pipeline draws, one at a time."""
    generator = torch.Generator().manual_seed(seed)
    return [
        pipe(
            prompt,
            height=side,
            width=side,
            num_inference_steps=steps,
            generator=generator,
        ).images[0]
        for _ in range(n)
    ]


@torch.no_grad()
def to_latents(pipe, pixels):
    """Return what the autoencoder makes of pixels, as the U-Net wants it."""
    found = []
    for one in pixels.split(1):
        one = one.to(pipe.vae.device, pipe.vae.dtype)
        found.append(pipe.vae.encode(one).latent_dist.mean)
    return torch.cat(found).float() * pipe.vae.config.scaling_factor


@torch.no_grad()
def to_text(pipe, prompt):
    """Return the text encoder's states of one prompt, (1, tokens, width)."""
    ids = pipe.tokenizer(
        prompt,
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return pipe.text_encoder(ids.to(pipe.text_encoder.device))[0]


def add_adapter(pipe, r):
    """Put LoRA into the U-Net, scale 1, float32; return what trains."""
    # alpha = r: a reader that forgets alpha still gets the scale right.
    pipe.unet.add_adapter(LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS))
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    return trained


def train(pipe, sets, steps, lr, trained, seed=0):
    """Train; yield the loss of each step.

    Args:
        pipe: with the adapter in it.
        sets: (latents, text states) of the concept, then of the kind; each
            gives one picture to every step.
        steps: how many.
        lr: learning rate.
        trained: the adapter's tensors.
        seed: of pictures, steps and noise.
    """
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(
            f"this model predicts {scheduler.config.prediction_type}, not "
            "the noise; the loss below would be wrong for it"
        )
    device = pipe.unet.device
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = [
            torch.randint(len(x), (1,), generator=generator) for x, _ in sets
        ]
        x0 = torch.cat([x[i] for (x, _), i in zip(sets, rows, strict=True)])
        text = torch.cat([text for _, text in sets])
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.randint(
            scheduler.config.num_train_timesteps,
            (len(x0),),
            generator=generator,
        ).to(device)
        noisy = scheduler.add_noise(x0, noise, t)
        with torch.autocast(device.type, torch.float16, device.type == "cuda"):
            predicted = pipe.unet(
                noisy.to(pipe.unet.dtype), t, encoder_hidden_states=text
            ).sample
        loss = F.mse_loss(predicted.float(), noise)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        yield loss.item()


def save(pipe, folder, r):
    """Write the adapter for Diffusers and in Kohya's format."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(pipe.unet)
    state = {k: v.detach().cpu().contiguous() for k, v in state.items()}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=convert_state_dict_to_diffusers(state)
    )
    tensors = {}
    for key, value in state.items():
        module, _, factor = key.removesuffix(".weight").rpartition(".")
        name = kohya_name(module)
        tensors[f"{name}.{DOWN if factor == 'lora_A' else UP}"] = value
        tensors[f"{name}.{ALPHA}"] = torch.tensor(float(r))
    save_file(tensors, folder / "kohya.safetensors", metadata={"format": "pt"})


def main(arguments=None):
    """Draw, train, save, draw again."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", required=True, help="a folder of yours")
    parser.add_argument("--word", required=True, help='such as "sks dog"')
    parser.add_argument("--kind", required=True, help='such as "dog"')
    parser.add_argument("--out", type=Path, default=Path("dreambooth_lora"))
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--own", type=int, default=100)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    args = parser.parse_args(arguments)
    pixels = read_pictures(args.pictures, args.side)  # before any download
    pipe = load(args.model)
    args.out.mkdir(parents=True, exist_ok=True)
    concept = f"a photo of {args.word}"
    kind = f"a photo of a {args.kind}"
    draw(pipe, concept, 1, args.side, 1)[0].save(args.out / "before.png")
    own = to_pixels(draw(pipe, kind, args.own, args.side, 0), args.side)
    sets = [
        (to_latents(pipe, x), to_text(pipe, prompt))
        for x, prompt in ((pixels, concept), (own, kind))
    ]
    trained = add_adapter(pipe, args.r)
    print(f"{sum(p.numel() for p in trained):,} numbers to train", flush=True)
    losses = []
    for loss in train(pipe, sets, args.steps, args.lr, trained):
        losses.append(loss)
        if len(losses) % 50 == 0:
            print(len(losses), f"{sum(losses[-50:]) / 50:.4f}", flush=True)
    save(pipe, args.out, args.r)
    for prompt, name in ((concept, "after.png"), (kind, "kind.png")):
        draw(pipe, prompt, 1, args.side, 1)[0].save(args.out / name)


if __name__ == "__main__":
    main()
