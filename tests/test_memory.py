"""Tests for lora_from_scratch/memory.py: counts against models on meta."""

import math
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from peft import (
    LoraConfig,
    PromptTuningConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)
from typer.testing import CliRunner

from lora_from_scratch import LoRAConfig, add_lora
from lora_from_scratch.__main__ import app
from lora_from_scratch.memory import (
    ARCHITECTURES,
    RECIPES,
    Architecture,
    activation_bytes,
    from_config,
    inference_ledger,
    kv_cache_bytes,
    logits_bytes,
    lora_training_bytes,
    n_lora_parameters,
    nf4_bits,
    nf4_bytes,
    state_bytes,
    training_bytes,
    training_ledger,
    weight_bytes,
)
from lora_from_scratch.nf4 import NF4Linear, quantize_model, quantize_nf4
from lora_from_scratch.results import read_results

# PEFT's own advice about Conv1D and its use of a deprecated name
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing"),
]

LLAMA_2 = ARCHITECTURES["llama-2-7b"]
QV = ["q_proj", "v_proj"]
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(**changes):
    sizes = dict(
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    return LlamaConfig(**{**sizes, **changes})


def gpt2(**changes):
    sizes = dict(
        n_embd=64,
        n_layer=3,
        n_head=4,
        vocab_size=300,
        n_positions=48,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2Config(**{**sizes, **changes})


def build(config, device="meta"):
    kind = GPT2LMHeadModel if config.model_type == "gpt2" else LlamaForCausalLM
    with torch.device(device):
        model = kind(config)
    model.loss_type = "ForCausalLM"
    return model


def tiny():
    """Return a config of the size of the course's tiny GPT-2."""
    a = ARCHITECTURES["tiny"]
    return gpt2(
        n_embd=a.d_model,
        n_layer=a.n_layers,
        vocab_size=a.vocab,
        n_positions=a.n_positions,
    )


@pytest.mark.parametrize(
    ("name", "total"),
    [  # published counts; tiny and smollm2 from their model cards
        ("tiny", 4_273_664),
        ("gpt2", 124_439_808),
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("mistral-7b", 7_241_732_096),
        ("llama-3-8b", 8_030_261_248),
        ("llama-65b", 65_285_660_672),
        ("llama-3-70b", 70_553_706_496),
    ],
)
def test_parameters_of_known_models(name, total):
    assert ARCHITECTURES[name].n_parameters == total


@pytest.mark.parametrize(
    ("name", "targets", "r", "count"),
    [  # counted with PEFT on the real configurations
        ("gpt2", ["c_attn"], 8, 294_912),
        ("gpt2", "all-linear", 8, 1_179_648),
        ("gpt2", "all-linear", 16, 2_359_296),
        ("llama-2-7b", QV, 8, 4_194_304),
        ("llama-2-7b", QKVO, 16, 16_777_216),
        ("llama-2-7b", "all-linear", 8, 19_988_480),
        ("llama-2-7b", "all-linear", 64, 159_907_840),
        ("mistral-7b", QV, 64, 27_262_976),
        ("mistral-7b", "all-linear", 8, 20_971_520),
        ("llama-3-8b", "all-linear", 16, 41_943_040),
        ("llama-65b", "all-linear", 64, 799_539_200),
        ("llama-2-13b", QV, 8, 6_553_600),
        ("llama-2-70b", "all-linear", 16, 207_093_760),
        ("llama-3-70b", "all-linear", 8, 103_546_880),
    ],
)
def test_lora_parameters_of_known_models(name, targets, r, count):
    assert n_lora_parameters(ARCHITECTURES[name], r, targets) == count


@pytest.mark.parametrize(
    "config",
    [
        gpt2(),
        gpt2(n_inner=100, tie_word_embeddings=False),
        llama(),
        llama(tie_word_embeddings=True, head_dim=24, num_key_value_heads=1),
    ],
    ids=["gpt2", "gpt2-odd", "llama", "llama-odd"],
)
def test_counts_equal_a_model_and_peft(config):
    architecture, model = from_config(config), build(config)
    assert architecture.n_parameters == model.num_parameters()
    for targets in (
        "all-linear",
        ["c_proj"] if config.model_type == "gpt2" else ["o_proj", "up_proj"],
    ):
        wrapped = get_peft_model(
            build(config), LoraConfig(r=5, target_modules=targets)
        )
        trainable, _ = wrapped.get_nb_trainable_parameters()
        assert n_lora_parameters(architecture, 5, targets) == trainable


def test_gpt2_of_real_size_equals_peft_on_meta():
    config = GPT2Config(bos_token_id=0, eos_token_id=0)
    model = get_peft_model(
        build(config), LoraConfig(r=8, target_modules="all-linear")
    )
    trainable, total = model.get_nb_trainable_parameters()
    gpt2_small = ARCHITECTURES["gpt2"]
    assert trainable == n_lora_parameters(gpt2_small, 8)
    assert total - trainable == gpt2_small.n_parameters


def test_mistral_config_is_read_as_the_listed_model():
    read = from_config(MistralConfig(intermediate_size=14_336))
    listed = ARCHITECTURES["mistral-7b"]
    assert read.n_parameters == listed.n_parameters
    assert read.linears == listed.linears


def test_training_state_per_parameter_is_16_12_8_and_6_bytes():
    assert {k: v.total for k, v in RECIPES.items()} == {
        "fp32": 16,
        "fp32-adam8": 10,
        "fp32-sgd": 8,
        "mixed": 16,
        "bf16": 12,
        "pure-bf16": 8,
        "bf16-adam8": 6,
        "bf16-sgd": 4,
    }


@pytest.mark.parametrize(
    ("recipe", "gigabytes"),
    [  # Llama-2-7B, GB = 1e9 bytes
        ("fp32", 107.8),
        ("mixed", 107.8),
        ("bf16", 80.9),
        ("pure-bf16", 53.9),
        ("bf16-adam8", 40.4),
    ],
)
def test_full_fine_tuning_of_llama_2(recipe, gigabytes):
    items = training_bytes(LLAMA_2, recipe)
    assert round(sum(items.values()) / 1e9, 1) == gigabytes


def test_items_equal_the_tensors_of_a_real_optimizer():
    model = build(gpt2(), "cpu")
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.ones(1, 4).long()).logits.sum().backward()
    optimizer.step()
    states = optimizer.state.values()
    found = {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters()),
        "master copy": 0,
        "optimizer": sum(
            s["exp_avg"].nbytes + s["exp_avg_sq"].nbytes for s in states
        ),
    }
    assert training_bytes(from_config(gpt2()), "fp32") == found


def test_lora_keeps_the_base_weights_in_memory():
    items = lora_training_bytes(LLAMA_2, 8, QV)
    assert items["base weights"] == 2 * LLAMA_2.n_parameters
    states = sum(items.values()) - items["base weights"]
    assert states == 16 * n_lora_parameters(LLAMA_2, 8, QV)


def test_adapter_of_16_bits_costs_12_bytes_per_number():
    items = lora_training_bytes(LLAMA_2, 8, recipe="bf16")
    assert sum(items.values()) - items["base weights"] == 12 * 19_988_480


def test_nf4_bits_with_and_without_double_quantization():
    assert nf4_bits(double_quant=False) == 4.5
    assert nf4_bits() == pytest.approx(4.12695, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "linears", "rest", "total", "plain", "saved"),
    [  # GB: block linears in NF4, the rest in 16 bits; then in 4.5 bits
        ("llama-2-7b", 3.34, 0.52, 3.87, 4.17, 0.30),
        ("mistral-7b", 3.60, 0.52, 4.13, 4.45, 0.33),
        ("llama-3-8b", 3.60, 2.10, 5.70, 6.03, 0.33),
        ("llama-65b", 33.41, 1.05, 34.46, 37.48, 3.02),
        ("llama-2-70b", 35.31, 1.05, 36.36, 39.55, 3.19),
        ("llama-3-70b", 35.31, 4.21, 39.52, 42.71, 3.19),
    ],
)
def test_weights_in_nf4(name, linears, rest, total, plain, saved):
    a = ARCHITECTURES[name]
    whole = weight_bytes(a, nf4_bits())
    other = 2 * (a.n_parameters - a.n_linear_parameters)
    without = weight_bytes(a, nf4_bits(double_quant=False))
    sizes = (whole - other, other, whole, without, without - whole)
    found = tuple(round(size / 1e9, 2) for size in sizes)
    assert found == (linears, rest, total, plain, saved)


@pytest.mark.parametrize(
    ("n", "block_size", "plain", "double"),
    [  # codes, scales; then codes, scales, scales of scales, their mean
        (16_384, 64, 8192 + 4 * 256, 8192 + 256 + 4 + 4),
        (16_385, 64, 8193 + 4 * 257, 8193 + 257 + 8 + 4),
        (331_776, 64, 165_888 + 4 * 5184, 165_888 + 5184 + 4 * 21 + 4),
        (100, 32, 50 + 4 * 4, 50 + 4 + 4 + 4),
        (1, 64, 1 + 4, 1 + 1 + 4 + 4),
    ],
)
def test_bytes_of_a_matrix_in_nf4(n, block_size, plain, double):
    assert nf4_bytes(n, False, block_size) == plain
    assert nf4_bytes(n, True, block_size) == double
    weight = torch.linspace(-1, 1, n)
    for double_quant, size in ((False, plain), (True, double)):
        found = quantize_nf4(weight, block_size, double_quant).nbytes
        assert found == size
    if n >= 331_776:  # large enough for the round number
        assert 8 * double / n == pytest.approx(nf4_bits(), rel=1e-4)


def test_weights_in_32_bits_are_all_in_32_bits():
    assert weight_bytes(LLAMA_2, 32) == 4 * LLAMA_2.n_parameters
    n = LLAMA_2.n_linear_parameters
    rest = LLAMA_2.n_parameters - n
    assert weight_bytes(LLAMA_2, 4, rest_bits=32) == n / 2 + rest * 4


def test_kv_cache_equals_the_cache_of_a_model():
    config = llama()
    cache = build(config, "cpu")(torch.ones(3, 7).long()).past_key_values
    found = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    assert kv_cache_bytes(from_config(config), 3, 7, 4) == found


def saved_bytes(model, batch, tokens):
    """Bytes that one forward pass hands to autograd, weights left out."""
    own = [*model.parameters(), *model.buffers()]
    own = {x.untyped_storage().data_ptr() for x in own}
    kept = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = x  # also keeps the address taken
        return x

    ids = torch.arange(batch * tokens).view(batch, tokens) % 300
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(x.untyped_storage().nbytes() for x in kept.values())


def measured(model, batch, tokens):
    """Train one step; return {item: bytes of the tensors really there}."""
    activations = saved_bytes(model.train(), batch, tokens)
    ids = torch.arange(batch * tokens).view(batch, tokens) % 300
    model(input_ids=ids, labels=ids).loss.backward()
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    moments = [
        s[k]
        for s in optimizer.state.values()
        for k in ("exp_avg", "exp_avg_sq")
    ]
    frozen = [p for p in parameters if not p.requires_grad]
    frozen += [x.weight for x in model.modules() if isinstance(x, NF4Linear)]
    items = {
        "frozen weights": frozen,
        "trained weights": trained,
        "gradients": [p.grad for p in trained],
        "optimizer": moments,
    }
    items = {k: sum(x.nbytes for x in v) for k, v in items.items()}
    return {**items, "activations": activations}


def agree(ledger, found, share=0.01):
    """Assert that no item is off by more than ``share``, 10 % being asked."""
    for item, size in found.items():
        assert ledger[item] == pytest.approx(size, rel=share), item


DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16], ids=str
)
CONFIGS = pytest.mark.parametrize(
    "config", [tiny(), llama()], ids=["gpt2", "llama"]
)


@DTYPES
@CONFIGS
def test_every_item_of_full_fine_tuning_is_what_is_measured(config, dtype):
    found = measured(build(config, "cpu").to(dtype), 5, 33)
    recipe = "fp32" if dtype == torch.float32 else "pure-bf16"
    ledger = training_ledger(from_config(config), 5, 33, recipe=recipe)
    agree(ledger, found)


@DTYPES
@CONFIGS
@pytest.mark.parametrize("targets", ["all", "attention", "mlp", "late"])
def test_every_item_of_lora_is_what_is_measured(config, dtype, targets):
    first = config.model_type == "gpt2"
    targets = {
        "all": ["all-linear", "all-linear"],
        "attention": [["c_attn"], QV],
        "mlp": [["c_fc", "mlp.c_proj"], ["gate_proj", "up_proj", "down_proj"]],
        "late": [["attn.c_proj"], ["o_proj"]],  # block 0 keeps half
    }[targets][0 if first else 1]
    model = build(config, "cpu").to(dtype)
    kinds = LoRAConfig(r=5, target_modules=targets)
    found = measured(add_lora(model, kinds), 5, 33)
    bits = 8 * dtype.itemsize
    shape = from_config(config)
    ledger = training_ledger(shape, 5, 33, 5, targets, bits_per_parameter=bits)
    agree(ledger, found)
    full = activation_bytes(shape, 5, 33, dtype.itemsize)
    assert found["activations"] < full


@DTYPES
@CONFIGS
def test_peft_keeps_the_same_in_float32_and_copies_in_16_bits(config, dtype):
    targets = ["c_attn"] if config.model_type == "gpt2" else QKVO
    model = build(config, "cpu").to(dtype)
    found = measured(
        get_peft_model(model, LoraConfig(r=5, target_modules=targets)), 5, 33
    )
    bits, shape = 8 * dtype.itemsize, from_config(config)
    of_peft = training_ledger(
        shape, 5, 33, 5, targets, bits_per_parameter=bits, upcast=True
    )
    agree(of_peft, found)
    ours = training_ledger(shape, 5, 33, 5, targets, bits_per_parameter=bits)
    same = ours["activations"] == of_peft["activations"]
    assert same == (dtype == torch.float32)


@CONFIGS
def test_dora_trains_magnitudes_and_keeps_its_outputs(config):
    kinds = LoRAConfig(r=5, use_dora=True)
    found = measured(add_lora(build(config, "cpu"), kinds), 5, 33)
    ledger = training_ledger(from_config(config), 5, 33, 5, use_dora=True)
    agree(ledger, found)


def test_a_frozen_model_that_gradients_pass_is_r_0():
    model = build(tiny(), "cpu")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))  # BitFit
    found = measured(model, 5, 33)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = activation_bytes(from_config(tiny()), 5, 33, 4, r=0)
    assert kept == pytest.approx(found["activations"], rel=0.01)
    state = state_bytes(n, "fp32")
    assert state["optimizer"] == found["optimizer"]
    assert state["weights"] == state["gradients"] == found["gradients"]

    prompt = PromptTuningConfig(num_virtual_tokens=7, task_type="CAUSAL_LM")
    found = saved_bytes(get_peft_model(build(tiny(), "cpu"), prompt), 5, 33)
    kept = activation_bytes(from_config(tiny()), 5, 7 + 33, 4, r=0)
    assert kept == pytest.approx(found, rel=0.01)


def live_bytes(function):
    """Call ``function``; return its result, and the bytes that stayed and
    that were needed at most, as PyTorch's allocator counted them."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = function()
    events = profile.profiler.kineto_results.events()
    events = [e for e in events if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return result, now, most


@CONFIGS
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_stays_and_what_peaks_in_a_real_step(config, kind, checkpointing):
    shape, model = from_config(config), build(config, "cpu").train()
    r = None if kind == "full" else 5
    if kind == "qlora":
        quantize_model(model)
    if r:
        model = add_lora(model, LoRAConfig(r=r))
    if checkpointing:
        model.activation_checkpointing_enable()
    ids = torch.arange(5 * 33).view(5, 33) % 300

    def forward():
        return model(input_ids=ids, labels=ids).loss

    forward().backward()  # the first step allocates what stays
    model.zero_grad()
    loss, stays, most = live_bytes(forward)
    _, _, in_backward = live_bytes(loss.backward)
    most = max(most, stays + in_backward)

    kept = activation_bytes(shape, 5, 33, 4, checkpointing, r)
    items = training_ledger(shape, 5, 33, r, checkpointing=checkpointing)
    momentary = logits_bytes(shape, 5, 33)
    assert most < sum(items[k] for k in ("activations", "logits", "gradients"))
    if checkpointing:  # the block that is computed again is not there yet
        three, four = (
            activation_bytes(replace(shape, n_layers=n), 5, 33, 4, r=r)
            for n in (3, 4)
        )
        block = four - three
        if shape.kind == "gpt2":  # checkpointing switches the cache off
            block -= 5 * 33 * 4 * 2 * shape.d_model
        assert stays == pytest.approx(kept - block, rel=0.1)
    else:
        assert stays == pytest.approx(kept, rel=0.01)
        assert most == pytest.approx(kept + momentary, rel=0.02)


def smollm(**changes):
    """Return a config of SmolLM2-135M's widths, not its length or words."""
    a = ARCHITECTURES["smollm2-135m"]
    sizes = dict(
        hidden_size=a.d_model,
        intermediate_size=a.d_ff,
        num_hidden_layers=2,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_kv_heads,
        tie_word_embeddings=a.tied,
    )
    return llama(**{**sizes, **changes})


@DTYPES
@pytest.mark.parametrize(
    ("config", "double_quant"),
    [(tiny(), True), (llama(), False), (smollm(), True)],
    ids=["gpt2", "llama", "smollm"],
)
def test_every_item_of_qlora_is_what_is_measured(config, double_quant, dtype):
    model = quantize_model(build(config, "cpu").to(dtype), 64, double_quant)
    found = measured(add_lora(model, LoRAConfig(r=5)), 5, 33)
    shape, rest_bits = from_config(config), 8 * dtype.itemsize
    ledger = training_ledger(
        shape,
        5,
        33,
        5,
        bits_per_parameter=nf4_bits(double_quant),
        rest_bits=rest_bits,
    )
    for item in ("trained weights", "gradients"):
        assert found[item] == ledger[item] == 4 * n_lora_parameters(shape, 5)
    exact = shape.n_layers * sum(
        nf4_bytes(x.d_in * x.d_out, double_quant) for x in shape.linears
    )
    rest = shape.n_parameters - shape.n_linear_parameters
    assert found["frozen weights"] == exact + rest * dtype.itemsize
    agree(ledger, found)


@DTYPES
@CONFIGS
def test_qlora_with_checkpointing_keeps_the_inputs_of_blocks(config, dtype):
    model = quantize_model(build(config, "cpu").to(dtype))
    model = add_lora(model, LoRAConfig(r=5)).train()
    model.activation_checkpointing_enable()
    shape, size = from_config(config), dtype.itemsize
    kept = activation_bytes(shape, 5, 33, size, True, 5)
    three, four = (  # without the block that backward computes again
        activation_bytes(replace(shape, n_layers=n), 5, 33, size, r=5)
        for n in (3, 4)
    )
    again = four - three
    if shape.kind == "gpt2":  # checkpointing switches the cache off
        again -= 5 * 33 * size * 2 * shape.d_model
    found = saved_bytes(model, 5, 33)
    assert kept - again == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("prepared", [False, True])
def test_rest_bits_are_32_after_peft_prepares_a_4_bit_model(prepared):
    config = llama()
    model = build(config, "cpu").to(torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if name.endswith("_proj"):
            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            new.load_state_dict(layer.state_dict())
            model.set_submodule(name, new.to("cpu"))
    model.is_loaded_in_4bit = True
    if prepared:
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    rest = sum(
        p.nbytes for n, p in model.named_parameters() if "_proj" not in n
    )
    model = get_peft_model(model, LoraConfig(r=5, target_modules=QKVO))
    found = measured(model, 5, 33)
    shape, bits = from_config(config), 32 if prepared else 16
    ledger = training_ledger(
        shape,
        5,
        33,
        5,
        QKVO,
        bits_per_parameter=nf4_bits(),
        rest_bits=bits,
        upcast=not prepared,
    )
    del found["frozen weights"]  # bitsandbytes' scales are no parameters
    agree(ledger, found)
    in_nf4 = shape.n_linear_parameters * nf4_bits() / 8
    assert ledger["frozen weights"] == pytest.approx(in_nf4 + rest, rel=1e-9)


@DTYPES
def test_one_matrix_at_a_time_is_unpacked(dtype):
    linear = torch.nn.Linear(2048, 3072, bias=False)
    layer = NF4Linear.from_linear(linear)
    x = torch.ones(2, 2048, dtype=dtype, requires_grad=True)
    y, stays, forward = live_bytes(lambda: layer(x))
    _, _, backward = live_bytes(y.sum().backward)
    assert stays == y.nbytes
    shape = Architecture("x", "llama", 3, 2048, 3072, 4, 2, 512, 99)
    bits = 8 * dtype.itemsize
    nf4, plain = (
        training_ledger(shape, 1, 2, 4, bits_per_parameter=bpp, rest_bits=bits)
        for bpp in (nf4_bits(), 16)
    )
    assert plain["unpacked matrix"] == 0
    expected = nf4["unpacked matrix"]
    assert expected == 2048 * 3072 * dtype.itemsize
    for most in (forward, backward):  # chunks take 5 MB, whatever the size
        assert expected < most < expected + 6e6


def test_inference_needs_weights_and_a_cache():
    config = smollm(vocab_size=500)
    model = quantize_model(build(config, "cpu").to(torch.bfloat16))
    cache = model(torch.ones(3, 7).long()).past_key_values
    found = {
        "weights": sum(p.nbytes for p in model.parameters())
        + sum(
            x.weight.nbytes for x in model.modules() if isinstance(x, NF4Linear)
        ),
        "KV cache": sum(x.keys.nbytes + x.values.nbytes for x in cache.layers),
    }
    shape = from_config(config)
    ledger = inference_ledger(shape, 3, 7, nf4_bits())
    agree(ledger, found, share=1e-3)
    assert ledger["unpacked matrix"] == 2 * 576 * 1536
    plain = inference_ledger(shape, 3, 7, 32)
    assert plain == {
        "weights": 4 * shape.n_parameters,
        "KV cache": 2 * found["KV cache"],
        "unpacked matrix": 0,
    }


LITGPT = read_results("litgpt_memory")


def litgpt_keeps(row):
    """Bytes that litgpt's layers keep and ``activation_bytes`` leaves out."""
    a = ARCHITECTURES[row["architecture"]]
    per_token = a.n_layers * sum(
        x["d_model"] * a.d_model + x["d_ff"] * a.d_ff
        for x in LITGPT["beside"]["rows"]
        if row["quantize"] or not x["quantized"]
    )
    return row["batch"] * LITGPT["training"]["tokens"] * per_token


@pytest.mark.parametrize(
    "row",
    LITGPT["rows"],
    ids=lambda r: f"{r['task']}-{r['architecture']}-{r['quantize']}",
)
def test_what_litgpt_measured_is_predicted(row):
    """Quoted, not measured here: see ``source`` in the file.

    Training: r=8 on queries and values, bfloat16 all through, 1,304 tokens
    (the longest example of Alpaca), no checkpointing. 3 % with what litgpt's
    own layers keep; without it the ledger is low, by 10 % in 16 bits and 26 %
    in 4. Inference: 1 % in 16 bits, 7 % in 4.
    """
    a, setting = ARCHITECTURES[row["architecture"]], LITGPT[row["task"]]
    bits = {None: 16, "nf4": nf4_bits(False), "nf4-dq": nf4_bits()}
    bits = bits[row["quantize"]]
    if row["task"] == "inference":
        ledger = inference_ledger(a, row["batch"], setting["tokens"], bits)
        tolerance, low = 0.07 if row["quantize"] else 0.01, None
    else:
        ledger = training_ledger(
            a,
            row["batch"],
            setting["tokens"],
            setting["r"],
            setting["target_modules"],
            setting["recipe"],
            bits,
            setting["checkpointing"],
        )
        tolerance, low = 0.03, 0.26 if row["quantize"] else 0.10
        ledger["weights"] = ledger["frozen weights"]
    total = sum(v for k, v in ledger.items() if k != "frozen weights")
    measured = 1e9 * row["gb"]
    assert ledger["weights"] == weight_bytes(a, bits) < measured
    if low:
        assert measured * (1 - low) < total < measured
        total += litgpt_keeps(row)
    assert total == pytest.approx(measured, rel=tolerance)


def test_the_settings_quoted_from_litgpt_are_its_own():
    assert LITGPT["quoted"] and LITGPT["citation"] == "lightning2023litgpt"
    n = [  # the source counts the trained parameters
        n_lora_parameters(ARCHITECTURES[name], 8, QV)
        for name in ("llama-2-7b", "llama-2-13b")
    ]
    assert n == [4_194_304, 6_553_600]


def test_the_safety_copy_of_train_is_one_more_of_what_is_trained():
    shape = from_config(tiny())
    for r in (None, 8):
        with_copy = training_ledger(shape, 2, 9, r, safety_copy=True)
        without = training_ledger(shape, 2, 9, r)
        assert with_copy["safety copy"] == with_copy["trained weights"]
        extra = sum(with_copy.values()) - sum(without.values())
        assert extra == without["trained weights"]


def test_the_ledger_agrees_with_the_functions_for_its_items():
    shape = ARCHITECTURES["llama-3-8b"]
    ledger = training_ledger(
        shape, 2, 300, 8, QV, bits_per_parameter=nf4_bits()
    )
    items = lora_training_bytes(shape, 8, QV, bits_per_parameter=nf4_bits())
    assert ledger["frozen weights"] == items["base weights"]
    assert ledger["trained weights"] == items["adapter"]
    assert ledger["optimizer"] == items["optimizer"]
    assert ledger["activations"] == activation_bytes(
        shape, 2, 300, 2, r=8, target_modules=QV
    )
    full = training_ledger(shape, 2, 300, recipe="mixed")
    for item, size in training_bytes(shape, "mixed").items():
        assert full[{"weights": "trained weights"}.get(item, item)] == size
    assert full["activations"] == activation_bytes(shape, 2, 300, 2)
    assert set(full) == set(ledger) and full["frozen weights"] == 0


def test_checkpointing_keeps_inputs_and_one_block():
    two, four = (
        Architecture("x", "llama", n, 64, 176, 4, 2, 16, 300) for n in (2, 4)
    )
    step = activation_bytes(four, 3, 5, checkpointing=True)
    step -= activation_bytes(two, 3, 5, checkpointing=True)
    assert step == 2 * (3 * 5) * 64 * 2  # two more inputs, 2 bytes each
    whole = activation_bytes(four, 3, 5)
    assert activation_bytes(four, 3, 5, checkpointing=True) < whole / 2


@pytest.mark.parametrize("r", [0, -1, 2.0, True])
def test_rank_must_be_a_positive_int(r):
    with pytest.raises(ValueError, match="r must be an int of at least 1"):
        n_lora_parameters(LLAMA_2, r)


def test_unknown_target_lists_the_layers():
    with pytest.raises(ValueError, match="'c_attn' matches no .*q_proj"):
        n_lora_parameters(LLAMA_2, 8, ["q_proj", "c_attn"])
    with pytest.raises(ValueError, match="'_proj' matches no layer"):
        n_lora_parameters(LLAMA_2, 8, ["_proj"])


def test_a_single_string_is_no_list_of_targets():
    with pytest.raises(ValueError, match="all-linear"):
        n_lora_parameters(LLAMA_2, 8, "q_proj")


def test_unknown_recipe_and_kind():
    with pytest.raises(ValueError, match="recipe must be one of fp32"):
        training_bytes(LLAMA_2, "fp64")
    with pytest.raises(ValueError, match="kind must be gpt2 or llama"):
        Architecture("x", "bert", 1, 8, 8, 1, 1, 8, 10)
    with pytest.raises(ValueError, match="d_model must be"):
        Architecture("x", "llama", 1, 0, 8, 1, 1, 8, 10)


def test_configs_that_would_be_miscounted_are_refused():
    with pytest.raises(ValueError, match="'qwen2' is not covered"):
        from_config(Qwen2Config())
    with pytest.raises(ValueError, match="attention_bias=True"):
        from_config(llama(attention_bias=True))


@pytest.mark.parametrize("bits", [0, -4, math.nan, math.inf])
def test_bits_must_be_positive(bits):
    with pytest.raises(ValueError, match="bits must be positive"):
        weight_bytes(LLAMA_2, bits)


def test_ledger_refuses_what_it_cannot_count():
    with pytest.raises(ValueError, match="1024 positions, got tokens=1025"):
        training_ledger(ARCHITECTURES["gpt2"], 1, 1025)
    with pytest.raises(ValueError, match="not its DoRA"):
        training_ledger(LLAMA_2, 1, 8, 8, use_dora=True, upcast=True)
    with pytest.raises(ValueError, match="recipe must be one of .*'fp8'"):
        training_ledger(LLAMA_2, 1, 8, 8, recipe="fp8")
    with pytest.raises(ValueError, match="r must be an int of at least 1"):
        training_ledger(LLAMA_2, 1, 8, 0)
    with pytest.raises(ValueError, match="r must be an int of at least 1"):
        activation_bytes(LLAMA_2, 1, 8, r=-2)


def test_the_command_line_prints_three_ledgers():
    command = "memory llama-2-7b --r 16 --targets q_proj,v_proj --tokens 100"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0
    for settings in (
        dict(recipe="bf16"),
        dict(r=16, target_modules=QV, bits_per_parameter=16),
        dict(r=16, target_modules=QV, bits_per_parameter=nf4_bits()),
    ):
        total = sum(training_ledger(LLAMA_2, 1, 100, **settings).values())
        assert f"{total / 1e9:.3f}" in result.output
    result = CliRunner().invoke(app, [*command.split(), "--inference"])
    assert result.exit_code == 0 and "KV cache" in result.output
    for bits in (16, nf4_bits()):
        total = sum(inference_ledger(LLAMA_2, 1, 100, bits).values())
        assert f"{total / 1e9:.3f}" in result.output
    wrong = CliRunner().invoke(app, ["memory", "gpt5"])
    assert wrong.exit_code == 2 and "llama-2-7b" in wrong.output
    wrong = CliRunner().invoke(app, ["memory", "tiny", "--targets", "q_proj"])
    assert wrong.exit_code == 2 and "attn.c_attn" in wrong.output


def test_sizes_of_a_batch_must_be_positive():
    with pytest.raises(ValueError, match="batch must be"):
        activation_bytes(LLAMA_2, 0, 5)
    with pytest.raises(ValueError, match="bytes_per_number is 2 or 4"):
        activation_bytes(LLAMA_2, 1, 5, 8)
    with pytest.raises(ValueError, match="tokens must be"):
        kv_cache_bytes(LLAMA_2, 1, 0)
    with pytest.raises(ValueError, match="block_size must be"):
        nf4_bits(block_size=0)
