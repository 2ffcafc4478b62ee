"""Tests for lora_from_scratch/adapters.py: files, and every way they fail."""

import errno
import json
import warnings

import pytest
import torch
from helpers import fill, gpt2, llama, logits
from peft import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from lora_from_scratch import (
    AdapterError,
    LoRAConfig,
    add_lora,
    load_adapter,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_adapter,
)
from lora_from_scratch import adapters as module
from lora_from_scratch.inject import lora_layers
from lora_from_scratch.variants.adalora import AdaLoRAConfig, AdaLoRALinear
from lora_from_scratch.variants.dylora import DyLoRAConfig, cut_rank, set_rank
from lora_from_scratch.variants.vera import VeRAConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SETTINGS = [
    (gpt2, {}),
    (gpt2, {"target_modules": ["c_attn", "wpe"]}),
    (gpt2, {"target_modules": r".*h\.1\.mlp\.c_(fc|proj)"}),
    (gpt2, {"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_attn": 9}}),
    (llama, {"use_rslora": True}),
    (llama, {"modules_to_save": ["lm_head"], "target_modules": ["q_proj"]}),
    (llama, {"target_modules": ["embed_tokens", "down_proj"]}),
]


def adapted(model, **settings):
    fill(add_lora(model, LoRAConfig(r=3, lora_alpha=5, **settings)))
    for name in model.lora_originals:
        for parameter in model.get_submodule(name).parameters():
            nn.init.normal_(parameter)
    return model


@pytest.fixture
def saved(tmp_path):
    """Return a folder with an adapter of gpt2() and its logits."""
    model = adapted(gpt2())
    save_adapter(model, tmp_path)
    return tmp_path


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def fails(model, folder, match):
    """Loading raises, and the model is as it was before the call."""
    model.transformer.wpe.requires_grad_(False)
    modules = {n: id(m) for n, m in model.named_modules()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(AdapterError, match=match):
        load_adapter(model, folder)
    assert {n: id(m) for n, m in model.named_modules()} == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not hasattr(model, "lora_config")


@pytest.mark.parametrize(("make", "settings"), SETTINGS)
def test_peft_loads_what_we_save_and_we_do_too(make, settings, tmp_path):
    model = adapted(make(), **settings)
    assert not torch.allclose(logits(model), logits(make()), rtol=1e-3)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys
        warnings.filterwarnings("ignore", category=FutureWarning)
        theirs = PeftModel.from_pretrained(make(), tmp_path)
    assert_close(logits(theirs), logits(model), rtol=0, atol=1e-10)
    ours = load_adapter(make(), tmp_path)
    assert torch.equal(logits(ours), logits(model))


@pytest.mark.parametrize(("make", "settings"), SETTINGS)
def test_we_load_what_peft_saves(make, settings, tmp_path):
    config = LoraConfig(
        **{"r": 3, "lora_alpha": 5, "target_modules": "all-linear"} | settings,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(make(), config)
    assert not torch.allclose(logits(theirs), logits(make()), rtol=1e-3)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(), tmp_path)
    assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-10)


def test_pefts_copy_of_a_tied_base_weight_must_be_the_same(tmp_path):
    config = LoraConfig(
        r=3, target_modules=["lm_head"], init_lora_weights=False
    )
    theirs = get_peft_model(gpt2(), config)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(tmp_path / WEIGHTS)
    ours = load_adapter(gpt2(), tmp_path)
    assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-10)
    fails(gpt2(seed=9), tmp_path, "copy of lm_head's base weight differs")


def test_saving_again_writes_the_same_adapter(saved, tmp_path):
    first, config = load_file(saved / WEIGHTS), (saved / CONFIG).read_text()
    model = load_adapter(gpt2(), saved)
    save_adapter(model, tmp_path / "again")
    assert (tmp_path / "again" / CONFIG).read_text() == config
    second = load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_base_weights_are_never_written(saved):
    keys = load_file(saved / WEIGHTS).keys()
    assert all(".lora_" in key for key in keys)
    assert json.loads((saved / CONFIG).read_text())["target_modules"] == [
        "c_attn",
        "c_fc",
        "c_proj",
    ]


def test_a_merged_adapter_saves_and_loads_onto_the_plain_base(tmp_path):
    model = adapted(gpt2())
    merge_lora(model)
    save_adapter(model, tmp_path)
    again = load_adapter(gpt2(), tmp_path)
    assert_close(logits(again), logits(model))


def test_the_same_base_in_another_precision_is_accepted(saved):
    model = load_adapter(gpt2(torch.bfloat16), saved)
    exact = logits(load_adapter(gpt2(), saved))
    error = (logits(model).double() - exact).norm() / exact.norm()
    assert error < 0.05


def test_a_loaded_adapter_can_train_on(saved):
    model = load_adapter(gpt2(), saved)
    assert all(
        layer.lora_A.requires_grad for layer in lora_layers(model).values()
    )
    remove_lora(model)
    load_adapter(model, saved)


def test_nothing_to_save_is_an_error(tmp_path):
    with pytest.raises(AdapterError, match="no LoRA layers to save"):
        save_adapter(gpt2(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_neither_saved_nor_loaded(saved, value):
    before = (saved / WEIGHTS).read_bytes()
    model = load_adapter(gpt2(), saved)
    layer = lora_layers(model)["transformer.h.0.mlp.c_fc"]
    with torch.no_grad():
        layer.lora_B[0, 0] = value
    with pytest.raises(AdapterError, match="NaN or infinity.*c_fc.lora_B"):
        save_adapter(model, saved)
    assert (saved / WEIGHTS).read_bytes() == before

    def poison(tensors):
        tensors["base_model.model.transformer.h.1.attn.c_attn.lora_A.weight"][
            0, 0
        ] = value

    edit_weights(saved, poison)
    fails(gpt2(), saved, r"NaN or infinity.*h\.1\.attn\.c_attn\.lora_A")


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    model = adapted(gpt2())
    with pytest.raises(AdapterError, match="cannot write the adapter to"):
        save_adapter(model, file)
    with pytest.raises(AdapterError, match="cannot write the adapter to"):
        save_adapter(model, file / "below")
    assert file.read_text() == "not a folder"


def test_with_a_full_disk_the_old_adapter_stays_whole(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    other = adapted(gpt2(), rank_pattern={"c_fc": 2})

    def half_written(path, data):
        with open(path, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.Path, "write_bytes", half_written)
    with pytest.raises(AdapterError, match="No space left.*is unchanged"):
        save_adapter(other, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    fails(gpt2(), saved, f"has no {name}")


def test_a_missing_folder_is_named(tmp_path):
    fails(gpt2(), tmp_path / "nowhere", "nowhere has no adapter_config.json")


def test_a_pickle_is_refused(saved):
    (saved / WEIGHTS).rename(saved / "adapter_model.bin")
    fails(gpt2(), saved, "adapter_model.bin is a pickle")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_cut_weights_are_damaged(saved, keep):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:keep])
    fails(gpt2(), saved, "damaged or cut short")


@pytest.mark.parametrize("text", ["", "{", "[]", '"LORA"'])
def test_a_damaged_config_is_an_error(saved, text):
    (saved / CONFIG).write_text(text)
    fails(gpt2(), saved, "cannot be read|must hold a JSON object")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', not one of LORA, VERA"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base model"),
        ({"r": None}, "lacks r"),
        ({"r": 0}, "r must be an int of at least 1, got 0"),
        ({"lora_alpha": -1}, "lora_alpha must be .* got -1"),
        ({"use_dora": True}, "8 key.s. missing .*lora_magnitude_vector"),
        ({"peft_type": "VERA"}, "not known here: .*lora_alpha=5"),
        ({"lora_bias": True}, "not known here: lora_bias=True"),
        ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\]"),
        ({"exclude_modules": ["c_fc"]}, "exclude_modules"),
        ({"a_new_option": "x"}, "a_new_option='x'"),
        ({"target_modules": ["q_proj"]}, "matches no module"),
        ({"target_modules": ["c_attn"]}, "12 key.s. unused by this model"),
        (
            {"target_modules": ["c_attn", "c_fc", "c_proj", "wpe"]},
            "2 key.s. mi",
        ),
        ({"r": 2}, r"lora_A.weight has shape \(3, 24\), .* needs \(2, 24\)"),
        ({"r": 25}, "r must be in 1..24"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(saved, changes, message):
    edit_config(saved, **changes)
    fails(gpt2(), saved, message)


def test_keys_with_another_prefix_are_an_error(saved):
    def strip(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("base_model.")] = tensors.pop(key)

    edit_weights(saved, strip)
    fails(gpt2(), saved, "keys must start with 'base_model.model.'")


def test_missing_and_unused_keys_are_named(saved):
    key = "base_model.model.transformer.h.0.mlp.c_fc.lora_A.weight"
    kept = load_file(saved / WEIGHTS)[key]
    edit_weights(saved, lambda t: t.pop(key))
    fails(gpt2(), saved, r"1 key\(s\) missing from the file: .*c_fc.lora_A")
    edit_weights(saved, lambda t: t.update({key: kept}))
    edit_weights(saved, lambda t: t.update({key + "x": kept.clone()}))
    fails(gpt2(), saved, r"1 key\(s\) unused by this model: .*weightx")


def test_an_adapter_of_another_base_is_refused(saved):
    fails(gpt2(seed=9), saved, "trained on another base model")
    model = llama()
    with pytest.raises(AdapterError, match="does not fit this model"):
        load_adapter(model, saved)
    assert not lora_layers(model)


def test_a_fine_tuned_base_is_another_base(saved):
    model = gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.std() * torch.randn_like(parameter)
    fails(model, saved, "trained on another base model")


def test_without_a_fingerprint_another_base_name_warns(tmp_path):
    theirs = gpt2()
    theirs.name_or_path = "someone/another-gpt2"
    config = LoraConfig(r=3, target_modules=["c_attn"])
    get_peft_model(theirs, config).save_pretrained(tmp_path)
    ours = gpt2()
    ours.config._name_or_path = "someone/gpt2"
    with pytest.warns(UserWarning, match="'someone/another-gpt2', this model"):
        load_adapter(ours, tmp_path)


def test_an_adapted_model_is_refused_and_unchanged(saved):
    model = adapted(gpt2())
    before = logits(model)
    with pytest.raises(AdapterError, match="LoRA layers already"):
        load_adapter(model, saved)
    assert torch.equal(logits(model), before)


ADA = {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 5}
VARIANTS = {
    "dora": LoRAConfig(r=3, lora_alpha=5, use_dora=True),
    "dora with rslora": LoRAConfig(
        r=3,
        lora_alpha=5,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"c_fc": 2, "up_proj": 2},
    ),
    "pissa": LoRAConfig(r=3, lora_alpha=5, init_lora_weights="pissa"),
    "pissa with rslora": LoRAConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        init_lora_weights="pissa",
        rank_pattern={"attn.c_proj": 13, "o_proj": 13, "v_proj": 8},
        alpha_pattern={"c_fc": 9, "up_proj": 9},
    ),
    "vera": VeRAConfig(r=30),
    "vera without projection": VeRAConfig(r=30, save_projection=False),
    "adalora": AdaLoRAConfig(**ADA),
    "dylora": DyLoRAConfig(r=3, lora_alpha=5),
}


def varied(model, config):
    """Return the model with every adapter tensor moved at random."""
    add_lora(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in lora_parameters(model):
            noise = torch.randn(tensor.shape, generator=generator)
            tensor += 0.2 * noise.to(tensor)
        for i, layer in enumerate(lora_layers(model).values()):
            if isinstance(layer, AdaLoRALinear):  # one layer loses them all
                layer.lora_E[(1, 3) if i else (0, 1, 2, 3), :] = 0
    return model


def from_peft(make, folder):
    """Return PEFT's model; a missing or unused key would be an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        warnings.filterwarnings("ignore", message="Specified to not")
        warnings.filterwarnings("ignore", message=".*zero-element tensors")
        warnings.filterwarnings("ignore", message=".*rank_pattern keys did not")
        return PeftModel.from_pretrained(make(), folder)


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("kind", VARIANTS)
def test_peft_loads_every_variant_and_we_do_too(kind, make, tmp_path):
    model = varied(make(), VARIANTS[kind])
    expected = logits(model)
    assert not torch.allclose(expected, logits(make()), rtol=1e-3)
    save_adapter(model, tmp_path / "a")
    theirs = from_peft(make, tmp_path / "a")
    # PEFT always draws VeRA's matrices in float32, and computes in it
    close = 1e-5 if kind.startswith("vera") else 1e-10
    assert_close(
        logits(theirs), expected, rtol=0, atol=close, check_dtype=False
    )
    again = load_adapter(make(), tmp_path / "a")
    assert_close(logits(again), expected, rtol=0, atol=1e-10)
    save_adapter(again, tmp_path / "b")
    first, second = (load_file(tmp_path / n / WEIGHTS) for n in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == json.loads(
        (tmp_path / "b" / CONFIG).read_text()
    )


@pytest.mark.parametrize("kind", VARIANTS)
def test_a_merged_variant_saves_the_same_adapter(kind, tmp_path):
    model = varied(llama(), VARIANTS[kind])
    expected = logits(model)
    merge_lora(model)
    save_adapter(model, tmp_path)
    assert_close(logits(load_adapter(llama(), tmp_path)), expected)


def trained_by_peft(model):
    """Return what PEFT trains and saves.

    It also trains AdaLoRA's ``ranknum``, a divisor, and does not save it.
    """
    return [
        p
        for n, p in model.named_parameters()
        if p.requires_grad and "ranknum" not in n
    ]


def random_peft(make, config):
    """Return PEFT's model with every trainable tensor moved at random."""
    theirs = get_peft_model(make(), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained_by_peft(theirs):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * noise.to(parameter)
    return theirs


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    "config",
    [
        lambda: LoraConfig(r=3, target_modules="all-linear", use_dora=True),
        lambda: VeraConfig(r=30, target_modules="all-linear"),
        lambda: VeraConfig(
            r=30,
            target_modules="all-linear",
            save_projection=False,
            projection_prng_key=4,
        ),
        lambda: AdaLoraConfig(**ADA, target_modules="all-linear"),
    ],
    ids=["dora", "vera", "vera without projection", "adalora"],
)
def test_we_load_every_variant_that_peft_saves(make, config, tmp_path):
    theirs = random_peft(make, config())
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(make(), tmp_path)
    close = 1e-5 if "VeRA" in repr(ours) else 1e-10
    assert not torch.allclose(expected, logits(make()), rtol=1e-3)
    assert_close(logits(ours), expected, rtol=0, atol=close, check_dtype=False)


def test_we_load_what_pefts_adalora_has_pruned(tmp_path):
    theirs = random_peft(
        llama, AdaLoraConfig(**ADA, target_modules=["q_proj", "up_proj"])
    )
    optimizer = torch.optim.AdamW(trained_by_peft(theirs), lr=1e-2)
    tokens = torch.arange(12).view(2, 6)
    for step in range(1, 10):
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    ranks = {sum(mask) for mask in kept.values()}
    assert len(ranks) > 1
    ours = load_adapter(llama(), tmp_path)
    assert_close(logits(ours), expected, rtol=0, atol=1e-10)
    # what was pruned stays so: nothing reaches it
    ours(input_ids=tokens, labels=tokens).loss.backward()
    for layer in lora_layers(ours).values():
        pruned = layer.lora_E[:, 0] == 0
        for tensor in (layer.lora_A, layer.lora_B.T, layer.lora_E):
            assert tensor[pruned].count_nonzero() == 0
        for grad in (layer.lora_A.grad, layer.lora_B.grad.T, layer.lora_E.grad):
            assert grad[pruned].count_nonzero() == 0
            assert (grad[~pruned] != 0).any(dim=1).all()


def test_a_pruned_adalora_file_holds_only_what_is_left(tmp_path):
    model = varied(llama(), VARIANTS["adalora"])
    save_adapter(model, tmp_path)
    sizes = {
        key.removesuffix(".lora_E"): len(value)
        for key, value in load_file(tmp_path / WEIGHTS).items()
        if key.endswith("lora_E")
    }
    assert sorted(sizes.values()) == [0] + [2] * (len(sizes) - 1)


def test_an_untrained_adalora_saves_all_its_triplets(tmp_path):
    save_adapter(add_lora(llama(), VARIANTS["adalora"]), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] is None
    from_peft(llama, tmp_path)
    layers = lora_layers(load_adapter(llama(), tmp_path)).values()
    assert all(layer.lora_A.count_nonzero() > 0 for layer in layers)


@pytest.mark.parametrize("mask", [[True], "yes", [1, 0, 2, 0]])
def test_a_damaged_rank_pattern_is_an_error(mask, tmp_path):
    save_adapter(varied(gpt2(), VARIANTS["adalora"]), tmp_path)
    edit_config(
        tmp_path, rank_pattern={"transformer.h.0.mlp.c_fc.lora_E": mask}
    )
    fails(gpt2(), tmp_path, r"rank_pattern\[.*c_fc.*of init_r=4 booleans")
    edit_config(tmp_path, rank_pattern=[mask])
    fails(gpt2(), tmp_path, "rank_pattern must map layers to booleans")


def test_a_rank_pattern_of_another_rank_is_an_error(tmp_path):
    save_adapter(varied(gpt2(), VARIANTS["adalora"]), tmp_path)
    pattern = {"transformer.h.0.mlp.c_fc.lora_E": [True] * 4}
    edit_config(tmp_path, rank_pattern=pattern)
    fails(gpt2(), tmp_path, r"lora_A has shape .*, this model needs \(4, 24\)")


def test_adalora_without_its_total_step_is_refused(tmp_path):
    save_adapter(varied(gpt2(), VARIANTS["adalora"]), tmp_path)
    edit_config(tmp_path, total_step=None)
    fails(gpt2(), tmp_path, "AdaLoRA needs total_step")


def test_pissa_from_peft_loads_if_it_was_converted(tmp_path):
    settings = {"r": 3, "target_modules": ["q_proj", "up_proj"]}
    theirs = get_peft_model(
        llama(torch.float32), LoraConfig(**settings, init_lora_weights="pissa")
    )
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    expected = logits(theirs)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(
        AdapterError, match="path_initial_model_for_weight_conversion"
    ):
        load_adapter(llama(torch.float32), tmp_path / "raw")
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(
        tmp_path / "plain",
        path_initial_model_for_weight_conversion=tmp_path / "start",
    )
    ours = load_adapter(llama(torch.float32), tmp_path / "plain")
    assert_close(logits(ours), expected, rtol=0, atol=1e-5)


def test_pissa_is_saved_for_the_original_base_at_twice_its_rank(tmp_path):
    model = varied(gpt2(), VARIANTS["pissa"])
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 10)
    assert config["init_lora_weights"] is True
    fails(gpt2(seed=9), tmp_path, "trained on another base model")


@pytest.mark.parametrize("b", [1, 2, 3])
def test_dylora_is_saved_whole_or_cut(b, tmp_path):
    model = varied(llama(), VARIANTS["dylora"])
    whole = logits(model)
    set_rank(model, b)
    expected = logits(model)
    save_adapter(model, tmp_path / "whole")
    assert_close(
        logits(from_peft(llama, tmp_path / "whole")), whole, rtol=0, atol=1e-10
    )
    cut_rank(model, b)
    save_adapter(model, tmp_path / "cut")
    theirs = from_peft(llama, tmp_path / "cut")
    assert_close(logits(theirs), expected, rtol=0, atol=1e-10)
    assert theirs.peft_config["default"].r == b


def test_a_file_that_lacks_veras_projections_is_named(tmp_path):
    save_adapter(varied(gpt2(), VARIANTS["vera"]), tmp_path)
    edit_weights(tmp_path, lambda t: t.pop("base_model.vera_A"))
    fails(gpt2(), tmp_path, "1 key.s. missing from the file: base_model.vera_A")
    edit_config(tmp_path, save_projection=False)
    fails(gpt2(), tmp_path, "1 key.s. unused by this model: base_model.vera_B")
