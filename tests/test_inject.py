"""Tests for lora_from_scratch/inject.py: the claims of lesson 04."""

import copy
import re

import pytest
import torch
from helpers import fill, gpt2, ids, llama, logits
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import (
    LoRAConfig,
    add_lora,
    count_parameters,
    lora_parameters,
    merge_lora,
    remove_lora,
    unmerge_lora,
)
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.variants.adalora import AdaLoRAConfig
from lora_from_scratch.variants.dylora import DyLoRAConfig
from lora_from_scratch.variants.vera import VeRAConfig


def adapted(model, **settings):
    return fill(add_lora(model, LoRAConfig(r=3, lora_alpha=5, **settings)))


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "targets",
    [
        "all-linear",
        ["c_attn", "q_proj"],
        ["mlp.c_proj", "mlp.down_proj"],
        r".*\.1\..*(c_fc|up_proj)",
        ["wte", "embed_tokens"],
    ],
)
def test_targets_select_what_peft_selects(make, targets):
    model = make()
    if isinstance(targets, list):  # each model has one of the two names
        names = [n for n, _ in model.named_modules()]
        targets = [t for t in targets if any(n.endswith(t) for n in names)]
    peft = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=3, target_modules=targets)
    )
    expected = {
        n.removeprefix("base_model.model.")
        for n, m in peft.named_modules()
        if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }
    assert set(lora_layers(adapted(model, target_modules=targets))) == expected


def test_a_classifier_head_is_left_out_of_all_linear():
    model = nn.Sequential(nn.Linear(5, 7))
    model.score = nn.Linear(7, 2)
    assert set(lora_layers(adapted(model))) == {"0"}


def test_an_unknown_target_lists_near_names():
    with pytest.raises(ValueError, match=r"'c_atn' .*near names: .*c_attn"):
        adapted(gpt2(), target_modules=["c_proj", "c_atn"])
    with pytest.raises(ValueError, match="'Q_proj' .*near names: .*q_proj"):
        adapted(llama(), target_modules=["Q_proj"])
    with pytest.raises(ValueError, match="layers of this model: c_attn"):
        adapted(gpt2(), target_modules=["xyzzy"])


def test_a_string_that_matches_no_whole_name_is_explained():
    for target in ("attn", "c_attn"):
        with pytest.raises(
            ValueError,
            match=rf"'{target}' matches no module; a string is a regular "
            rf"expression .* whole names: .* write \['{target}'\]; layers",
        ):
            adapted(gpt2(), target_modules=target)
    with pytest.raises(ValueError, match="matches whole names; layers of"):
        adapted(gpt2(), target_modules=r".*q_proj")
    with pytest.raises(ValueError, match="is a GPT2Attention; .* whole names"):
        adapted(gpt2(), target_modules=r".*attn")


def test_targets_that_are_no_layer_are_named():
    with pytest.raises(ValueError, match="'transformer.ln_f' is a LayerNorm"):
        adapted(gpt2(), target_modules=["ln_f"])
    with pytest.raises(ValueError, match="not a regular expression"):
        adapted(gpt2(), target_modules="*c_attn")
    with pytest.raises(ValueError, match="no nn.Linear or Conv1D"):
        adapted(nn.Sequential(nn.ReLU()))


def test_after_an_error_the_model_is_as_it_was():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = state(model)
    with pytest.raises(ValueError, match="wpe: r must be in 1..11"):
        add_lora(
            model,
            LoRAConfig(
                r=5,
                target_modules=["c_attn", "wpe"],
                rank_pattern={"wpe": 12},
            ),
        )
    assert not lora_layers(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())


def test_an_adapted_model_is_refused():
    model = adapted(gpt2())
    with pytest.raises(RuntimeError, match="LoRA layers already"):
        add_lora(model, LoRAConfig())
    peft = get_peft_model(gpt2(), LoraConfig(target_modules=["c_attn"]))
    with pytest.raises(RuntimeError, match="holds PEFT's"):
        add_lora(peft, LoRAConfig())


def test_only_the_adapter_trains_and_is_counted():
    model = gpt2()
    total = sum(p.numel() for p in model.parameters())  # shared: once
    assert count_parameters(model) == (total, total)
    adapted(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert [id(p) for p in trained] == [id(p) for p in lora_parameters(model)]
    shapes = [(24, 72), (24, 24), (24, 96), (96, 24)]
    numbers = 2 * 3 * sum(i + o for i, o in shapes)
    assert count_parameters(model) == (numbers, total + numbers)


def test_patterns_give_single_modules_their_own_rank_and_alpha():
    model = adapted(
        gpt2(),
        rank_pattern={"mlp.c_fc": 2, r"h\.1\.attn\.c_proj": 4},
        alpha_pattern={"c_fc": 7},
    )
    found = {n: (m.r, m.lora_alpha) for n, m in lora_layers(model).items()}
    assert found["transformer.h.0.mlp.c_fc"] == (2, 7)
    assert found["transformer.h.0.attn.c_proj"] == (3, 5)
    assert found["transformer.h.1.attn.c_proj"] == (4, 5)


def test_merging_and_unmerging_a_model_keeps_its_logits():
    model = adapted(llama())
    expected = logits(model)
    before = state(model)
    merge_lora(model)
    assert_close(logits(model), expected)
    with pytest.raises(RuntimeError, match="is already merged"):
        merge_lora(model)
    unmerge_lora(model)
    assert_close(state(model), before)
    with pytest.raises(RuntimeError, match="is not merged"):
        unmerge_lora(model)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_tied_weights_train_but_refuse_to_merge(target):
    model = adapted(gpt2(), target_modules=[target, "c_attn"])
    before, expected = state(model), logits(model)
    assert not torch.equal(expected, logits(gpt2()))
    with pytest.raises(RuntimeError, match="shares its weight with"):
        merge_lora(model)
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert_close(logits(model), expected)


def test_a_tied_head_outside_the_targets_does_not_hinder_merging():
    model = adapted(gpt2())
    expected = logits(model)
    merge_lora(model)
    assert_close(logits(model), expected)


def test_remove_gives_back_the_same_layers_bit_for_bit():
    model = gpt2()
    modules, before = dict(model.named_modules()), state(model)
    expected = logits(model)
    adapted(model)
    remove_lora(model)
    assert {k: id(v) for k, v in model.named_modules()} == {
        k: id(v) for k, v in modules.items()
    }
    assert all(torch.equal(v, before[k]) for k, v in state(model).items())
    assert torch.equal(logits(model), expected)
    adapted(model)  # and it can be adapted again


def test_remove_undoes_a_merge():
    model = gpt2()
    before = state(model)
    adapted(model)
    merge_lora(model)
    remove_lora(model)
    assert not lora_layers(model)
    assert_close(state(model), before)


def test_modules_to_save_are_trained_copies():
    model = llama()
    head, expected = model.lm_head, logits(model)
    adapted(model, modules_to_save=["lm_head"])
    assert model.lm_head is not head
    assert set(model.lm_head.parameters()) <= set(lora_parameters(model))
    assert model.lm_head.weight.requires_grad
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert logits(model).count_nonzero() == 0
    remove_lora(model)
    assert model.lm_head is head
    assert torch.equal(logits(model), expected)


def test_unknown_modules_to_save_are_an_error():
    with pytest.raises(ValueError, match="modules_to_save: 'scor' matches no"):
        adapted(gpt2(), modules_to_save=["scor"])


@pytest.mark.parametrize("act", [merge_lora, unmerge_lora, remove_lora])
def test_a_plain_model_has_nothing_to_merge_or_remove(act):
    with pytest.raises(RuntimeError, match="has no LoRA layers; call add"):
        act(gpt2())


def test_train_and_eval_mode_survive():
    model = gpt2().eval()
    adapted(model)
    assert not any(m.training for m in model.modules())
    model.train()
    remove_lora(model)
    assert all(m.training for m in model.modules())


def test_an_adapted_model_can_be_copied_and_prints_its_rank():
    model = adapted(gpt2())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    assert re.search(r"r=3, lora_alpha=5, .*merged=False", repr(twin))
    assert torch.equal(
        model.generate(ids(), max_new_tokens=3, do_sample=False),
        twin.generate(ids(), max_new_tokens=3, do_sample=False),
    )


def of_every_kind(**settings):
    """Return one config of each method."""
    return {
        "lora": LoRAConfig(r=3, lora_alpha=5, **settings),
        "dora": LoRAConfig(r=3, lora_alpha=5, use_dora=True, **settings),
        "pissa": LoRAConfig(
            r=3, lora_alpha=5, init_lora_weights="pissa", **settings
        ),
        "dylora": DyLoRAConfig(r=3, lora_alpha=5, **settings),
        "vera": VeRAConfig(r=30, **settings),
        "adalora": AdaLoRAConfig(
            init_r=3, target_r=2, total_step=9, lora_alpha=5, **settings
        ),
    }


KINDS = of_every_kind()
LAYER_NAMES = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA"}
LAYER_NAMES |= {"dylora": "DyLoRA", "vera": "VeRA", "adalora": "AdaLoRA"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def varied(model, config):
    """Return the model with every adapter tensor moved at random."""
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in lora_parameters(model):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += 0.1 * noise.to(tensor)
    return model


@every_kind
@pytest.mark.parametrize("make", [gpt2, llama])
def test_each_config_brings_its_layers_and_starts_at_the_base(make, kind):
    model = make()
    expected = logits(model)
    add_lora(model, KINDS[kind])
    names = {type(m).__name__ for m in lora_layers(model).values()}
    end = "Conv1D" if make is gpt2 else "Linear"
    assert names == {LAYER_NAMES[kind] + end}
    if kind == "pissa":
        assert_close(logits(model), expected)
    else:
        assert torch.equal(logits(model), expected)


@every_kind
def test_each_variant_trains_its_tensors_and_only_those(kind):
    model = add_lora(llama(), KINDS[kind])
    trained = list(lora_parameters(model))
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in trained
    }
    assert sum(p.numel() for p in trained) == count_parameters(model)[0]
    model = varied(llama(), KINDS[kind])
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad.count_nonzero() > 0 for p in lora_parameters(model))
    assert all(
        p.grad is None for p in model.parameters() if not p.requires_grad
    )


@every_kind
@pytest.mark.parametrize("make", [gpt2, llama])
def test_each_variant_merges_and_unmerges(make, kind):
    model = varied(make(), KINDS[kind])
    expected, before = logits(model), state(model)
    assert not torch.allclose(expected, logits(make()), rtol=1e-3)
    merge_lora(model)
    assert_close(logits(model), expected)
    unmerge_lora(model)
    assert_close(state(model), before)


@every_kind
@pytest.mark.parametrize("merged", [False, True])
def test_each_variant_leaves_without_a_trace(kind, merged):
    model = gpt2()
    modules = {k: id(v) for k, v in model.named_modules()}
    tensors = {
        k: id(v) for k, v in model.named_parameters(remove_duplicate=False)
    }
    before = state(model)
    varied(model, KINDS[kind])
    if merged:
        merge_lora(model)
    remove_lora(model)
    assert {k: id(v) for k, v in model.named_modules()} == modules
    assert tensors == {
        k: id(v) for k, v in model.named_parameters(remove_duplicate=False)
    }
    assert before.keys() == state(model).keys()
    for key, value in state(model).items():
        if merged and kind != "pissa":
            assert_close(value, before[key])
        else:
            assert torch.equal(value, before[key])


@every_kind
def test_after_an_error_in_the_middle_nothing_is_left(kind):
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.weight = nn.Parameter(
        torch.ones(24, 96, dtype=torch.int8), requires_grad=False
    )
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    tensors = {n: id(p) for n, p in model.named_parameters()}
    modules = {k: id(v) for k, v in model.named_modules()}
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc: "):
        add_lora(model, KINDS[kind])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: id(p) for n, p in model.named_parameters()} == tensors
    assert {k: id(v) for k, v in model.named_modules()} == modules


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "lora"])
def test_variants_of_an_embedding_are_refused_with_the_reason(kind):
    model = gpt2()
    for targets in (["wte"], ["c_attn", "wte"]):
        config = of_every_kind(target_modules=targets)[kind]
        with pytest.raises(
            ValueError,
            match=r"wte: \w+ cannot wrap (an )?Embedding: .*; leave it out of "
            "target_modules, or adapt it with",
        ):
            add_lora(model, config)
    assert not lora_layers(model)


def test_pissa_frees_a_tied_head_and_ties_it_again():
    model = gpt2()
    wte = model.transformer.wte.weight
    config = LoRAConfig(
        r=3, target_modules=["lm_head"], init_lora_weights="pissa"
    )
    varied(model, config)
    expected = logits(model)
    merge_lora(model)  # its residual is a tensor of its own
    assert_close(logits(model), expected)
    remove_lora(model)
    assert model.lm_head.weight is wte is model.transformer.wte.weight


def test_all_layers_share_one_pair_in_vera():
    model = add_lora(llama(), VeRAConfig(r=30))
    pairs = {id(m.projections) for m in lora_layers(model).values()}
    assert len(pairs) == 1
    twin = copy.deepcopy(model)
    assert len({id(m.projections) for m in lora_layers(twin).values()}) == 1
    assert torch.equal(logits(twin), logits(model))
