"""Tests for lora_from_scratch/family.py: one test per claim in notebook 07."""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
from helpers import gpt2, ids, llama, logits
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from lora_from_scratch.config import LoRAConfig
from lora_from_scratch.family import (
    HoulsbyAdapter,
    add_houlsby,
    add_prefix,
    add_prompt,
    train_biases,
)
from lora_from_scratch.inject import add_lora, count_parameters
from lora_from_scratch.train import evaluate, train

N, M = 3, 5
FLOAT32 = {"rtol": 1e-6, "atol": 1e-6}  # transformers computes losses so
METHODS = {
    "prompt": lambda model: add_prompt(model, N),
    "prefix": lambda model: add_prefix(model, N),
    "houlsby": lambda model: add_houlsby(model, M),
    "biases": train_biases,
}
ADD = {"prompt": add_prompt, "prefix": add_prefix}
every = pytest.mark.parametrize("method", METHODS)
virtual = pytest.mark.parametrize("method", ADD)
bases = pytest.mark.parametrize("base", [gpt2, llama])


def mask():
    """Return a mask for ids(): two rows are padded on the right."""
    lengths = torch.tensor([[7], [4], [6]])
    return (torch.arange(7) < lengths).long()


def moved(model):
    """Draw every trainable number anew: a start would prove too little."""
    generator = torch.Generator().manual_seed(4)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3, generator=generator)
    return model.eval()


def peft_twin(base, model):
    """Return PEFT's model with the prompt or prefix of ours."""
    kind = {True: peft.PromptTuningConfig, False: peft.PrefixTuningConfig}
    config = kind[hasattr(model, "prompt")](
        task_type="CAUSAL_LM", num_virtual_tokens=N
    )
    twin = peft.get_peft_model(base().eval(), config).double().eval()
    weight = twin.prompt_encoder["default"].embedding.weight
    if hasattr(model, "prompt"):
        flat = model.prompt
    else:  # (n, n_layers * 2 * n_kv_heads * head_dim)
        flat = model.prefix.permute(3, 0, 1, 2, 4).reshape(N, -1)
    assert weight.shape == flat.shape
    with torch.no_grad():
        weight.copy_(flat)
    return twin


@bases
@virtual
def test_virtual_places_equal_peft(base, method):
    model = moved(METHODS[method](base()))
    twin = peft_twin(base, model)
    assert_close(logits(model), logits(twin)[:, -7:], rtol=0, atol=1e-10)
    rows = {"input_ids": ids(), "attention_mask": mask()}
    with torch.no_grad():
        ours, theirs = model(**rows).logits, twin(**rows).logits[:, -7:]
    real = mask().bool()
    assert_close(ours[real], theirs[real], rtol=0, atol=1e-10)


@bases
@virtual
def test_loss_is_over_the_tokens_that_the_base_model_predicts(base, method):
    model = moved(METHODS[method](base()))
    labels = ids().masked_fill(mask() == 0, -100)
    rows = {"input_ids": ids(), "attention_mask": mask()}
    with torch.no_grad():
        out = model(**rows, labels=labels)
    assert out.logits.shape == (3, 7, 37)
    nats = [
        -out.logits[i, j - 1].log_softmax(-1)[labels[i, j]]
        for i in range(3)
        for j in range(1, 7)
        if labels[i, j] != -100
    ]
    assert len(nats) == 6 + 3 + 5
    assert_close(out.loss.double(), torch.stack(nats).mean(), **FLOAT32)
    assert evaluate(model, ids()) == pytest.approx(
        F.cross_entropy(
            logits(model)[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()
        ).item(),
        rel=1e-6,
    )


def test_peft_asks_the_last_prompt_vector_for_the_first_token():
    model = moved(add_prompt(gpt2(), N))
    twin = peft_twin(gpt2, model)
    with torch.no_grad():
        ours = model(input_ids=ids(), labels=ids()).loss
        theirs = twin(input_ids=ids(), labels=ids())
    first = F.cross_entropy(theirs.logits[:, N - 1], ids()[:, 0])
    assert_close(theirs.loss, (6 * ours + first.float()) / 7, **FLOAT32)


@bases
def test_prompt_is_vectors_before_the_token_vectors(base):
    model, plain = moved(add_prompt(base(), N)), base().eval()
    x = torch.cat(
        [model.prompt.expand(3, -1, -1), plain.get_input_embeddings()(ids())],
        dim=1,
    )
    with torch.no_grad():
        expected = plain(inputs_embeds=x).logits[:, N:]
    assert_close(logits(model), expected)


@bases
def test_prompt_and_prefix_start_at_the_same_random_tokens(base):
    starts = {}
    for method, add in ADD.items():
        model = base().eval()
        torch.manual_seed(5)
        starts[method] = logits(add(model, N))
    assert_close(starts["prompt"], starts["prefix"])
    torch.manual_seed(5)
    nonsense = torch.randint(37, (1, N)).expand(3, -1)
    plain = logits(base().eval(), torch.cat([nonsense, ids()], dim=1))
    assert_close(starts["prompt"], plain[:, N:])
    assert (starts["prompt"] - logits(base().eval())).abs().max() > 0.01


@bases
@virtual
@pytest.mark.parametrize("use_cache", [True, False])
def test_generates_what_the_forward_pass_predicts(base, method, use_cache):
    model = moved(METHODS[method](base()))
    text = ids()[:, :4]
    made = model.generate(
        text,
        attention_mask=torch.ones_like(text),
        max_new_tokens=3,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=0,
        eos_token_id=None,
    )
    for _ in range(3):
        choice = logits(model, text)[:, -1:].argmax(-1)
        text = torch.cat([text, choice], dim=1)
    assert made.tolist() == text.tolist()


@virtual
def test_left_padded_rows_keep_their_positions(method):
    model = moved(METHODS[method](gpt2()))
    text = ids()[:1, :5]
    padded = F.pad(text, (2, 0))
    seen = F.pad(torch.ones_like(text), (2, 0))
    with torch.no_grad():
        out = model(
            input_ids=padded,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0),
        )
    assert_close(out.logits[:, 2:], logits(model, text))


def test_adapter_equals_dense_formula():
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 6).double()
    layer = HoulsbyAdapter(base, d=6, bottleneck=5)
    moved(layer)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    h = torch.einsum("bti,oi->bto", x, base.weight) + base.bias
    u = torch.einsum("bto,mo->btm", h, layer.down.weight) + layer.down.bias
    u = u * (1 + torch.erf(u / 2**0.5)) / 2
    up = torch.einsum("btm,om->bto", u, layer.up.weight) + layer.up.bias
    assert_close(layer(x), h + up)


@bases
def test_adapters_start_near_the_base_model_but_not_at_it(base):
    model, plain = add_houlsby(base().eval(), M), base().eval()
    change = (logits(model) - logits(plain)).abs().max()
    assert 0 < change < 1e-3 * logits(plain).abs().max()
    for module in model.modules():
        if isinstance(module, HoulsbyAdapter):
            torch.nn.init.zeros_(module.up.weight)
    assert_close(logits(model), logits(plain), rtol=0, atol=0)


def test_an_adapter_stands_before_each_residual_sum():
    model = moved(add_houlsby(gpt2(), M))
    x = torch.randn(2, 3, 24, dtype=torch.float64)
    block = model.transformer.h[1]
    h = x + block.attn(block.ln_1(x))[0]
    assert isinstance(block.attn.c_proj, HoulsbyAdapter)
    mlp = block.mlp.c_proj
    inner = mlp.base_layer(block.mlp.act(block.mlp.c_fc(block.ln_2(h))))
    expected = h + inner + mlp.up(F.gelu(mlp.down(inner)))
    assert_close(block(x), expected)


def test_counts():
    d, layers = 24, 2
    sizes = {
        "prompt": N * d,
        "prefix": layers * 2 * N * d,
        "houlsby": layers * 2 * (2 * M * d + M + d) + (2 * layers + 1) * 2 * d,
        "biases": layers * (3 * d + d + 4 * d + d + 2 * d) + d,
    }
    for method, n in sizes.items():
        assert count_parameters(METHODS[method](gpt2()))[0] == n
    # grouped queries: two heads of keys and values, of four
    assert count_parameters(add_prefix(llama(), N))[0] == 2 * 2 * N * 12


def test_biases_of_bert_base():
    with torch.device("meta"):
        model = BertModel(BertConfig())
    d, d_ff, layers = 768, 3072, 12
    blocks = layers * (4 * d + d_ff + d + 2 * d)  # attention, MLP, norms
    embedding_norm_and_pooler = 2 * d
    n, total = count_parameters(train_biases(model))
    assert n == blocks + embedding_norm_and_pooler
    assert round(100 * n / total, 3) == 0.094  # % of the model


@every
def test_training_moves_every_added_number_and_no_other(method):
    model = METHODS[method](gpt2())
    before = copy.deepcopy(model.state_dict())
    losses = train(model, [ids()] * 8, steps=8, lr=1e-2)
    assert losses[-1] < losses[0]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    for name, value in model.state_dict().items():
        if name in trained:
            assert not torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, before[name]), name


@every
def test_a_copy_has_its_own_numbers(method):
    model = METHODS[method](gpt2()).eval()
    twin = moved(copy.deepcopy(model))
    assert not torch.allclose(logits(model), logits(twin))


@every
def test_an_adapted_model_is_refused(method):
    for model in (
        add_prompt(gpt2(), N),
        add_lora(gpt2(), LoRAConfig(r=2)),
    ):
        with pytest.raises(RuntimeError, match="adapted already"):
            METHODS[method](model)


@pytest.mark.parametrize(
    ("add", "size", "message"),
    [
        (add_prompt, 0, "n must be in 1..10, got 0"),
        (add_prompt, 11, "n must be in 1..10, got 11"),
        (add_prefix, 0, "n must be in 1..10, got 0"),
        (add_prefix, 11, "n must be in 1..10, got 11"),
        (add_houlsby, 0, "bottleneck must be at least 1, got 0"),
    ],
)
def test_a_size_out_of_range_is_an_error(add, size, message):
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        add(model, size)
    assert add(model, 1) is model  # the error left it as it was


def test_adapters_know_gpt2_and_llama_alone():
    config = BertConfig(hidden_size=12, num_hidden_layers=1)
    with torch.device("meta"):
        model = BertModel(config)
    with pytest.raises(ValueError, match="'bert' is not covered"):
        add_houlsby(model, M)


def test_llama_has_no_biases_to_train():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no biases"):
        train_biases(llama())


@virtual
def test_a_full_context_is_an_error(method):
    model = ADD[method](gpt2(), 4)
    logits(model)  # 4 + 7 = 11 positions
    with pytest.raises(ValueError, match=r"8 tokens are more .* 11 positions"):
        logits(model, torch.cat([ids(), ids()[:, :1]], dim=1))


def test_prefix_under_gradient_checkpointing_is_an_error():
    model = add_prefix(gpt2(), N)
    model.activation_checkpointing_enable()
    with pytest.raises(RuntimeError, match="checkpointing_disable"):
        model.train()(input_ids=ids(), labels=ids())
