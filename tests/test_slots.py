"""Adapters on their way from disk to a slot, and back out."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from adapters_on_disk import save
from helpers import gpt2, ids, llama
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from lora_from_scratch import (
    AdapterError,
    LoRAConfig,
    add_lora,
    load_adapter,
    remove_lora,
)
from lora_from_scratch.adapters import CONFIG, WEIGHTS
from lora_from_scratch.linear import lora_layers
from lora_from_scratch.serving.slots import AdapterSlots, UnknownAdapter


@pytest.fixture
def slots(tmp_path):
    """Two slots of rank 6 over a Llama, and a folder of five adapters."""
    model = llama()
    settings = [
        dict(r=2),
        dict(r=6, use_rslora=True, lora_alpha=3),
        dict(r=3, target_modules=["q_proj"]),
        dict(
            r=4,
            target_modules=["q_proj", "down_proj"],
            rank_pattern={"down_proj": 5},
            alpha_pattern={"layers.0.self_attn.q_proj": 1.5},
        ),
        dict(r=1, target_modules=["lm_head"]),
    ]
    for i, setting in enumerate(settings):
        save(model, tmp_path / f"a{i}", i, **setting)
    found = AdapterSlots(model, max_adapters=2, max_rank=6)
    for i in range(len(settings)):
        found.register(f"a{i}", tmp_path / f"a{i}")
    return found


def in_slot(slots, slot):
    """Return {layer: dW} of what a slot holds now."""
    return {
        name: (layer.lora_A[slot].T @ layer.lora_B[slot]).T
        for name, layer in slots.layers.items()
        if layer.lora_A is not None
    }


def test_a_slot_holds_the_dW_of_its_adapter_whatever_was_there(slots):
    order = [0, 1, 2, 3, 4, 1, 3, 0, 2, 4, 0]
    for i in order:
        entry = slots.find(f"a{i}")
        slot = slots.acquire(entry)
        plain = load_adapter(llama(), entry.folder)
        expected = {
            name: layer.get_delta_weight()
            for name, layer in lora_layers(plain).items()
        }
        assert any(dW.abs().max() > 0.01 for dW in expected.values())
        for name, dW in in_slot(slots, slot).items():
            assert_close(dW, expected.get(name, torch.zeros_like(dW)))
        assert set(expected) <= set(in_slot(slots, slot))
        slots.release(entry)


def test_an_evicted_adapter_leaves_no_factor_behind(tmp_path):
    model = llama(torch.float32)
    wide = save(model, tmp_path / "wide", 1)
    save(model, tmp_path / "narrow", 2, target_modules=["q_proj"])

    def grow(tensors):  # finite, but x A is not
        for key in tensors:
            if "lora_A" in key:
                tensors[key] *= 1e38

    edit_weights(wide, grow)
    slots = AdapterSlots(model, 1, 6)
    for name in ("wide", "narrow"):
        slots.register(name, tmp_path / name)
        slot = slots.acquire(slots.find(name))
        slots.release(slots.find(name))
    slots.route([slot], 7)
    expected = load_adapter(llama(torch.float32), tmp_path / "narrow")
    with torch.no_grad():
        found = model(ids()[:1]).logits
        assert_close(found, expected(ids()[:1]).logits)


@pytest.mark.parametrize("spoil", ["overwritten", "cut short"])
def test_a_file_spoiled_in_place_cannot_reach_the_cache(slots, spoil):
    entry = slots.find("a0")
    slot = slots.acquire(entry)
    before = {n: dW.clone() for n, dW in in_slot(slots, slot).items()}
    slots.release(entry)
    path = entry.folder / WEIGHTS
    size = path.stat().st_size
    with path.open("r+b") as file:
        if spoil == "cut short":
            file.truncate(100)
        else:
            file.seek(size // 2)
            file.write(b"\xff" * (size - size // 2))
    for name in ("a1", "a2"):  # evict it, so that it is copied again
        slots.acquire(slots.find(name))
        slots.release(slots.find(name))
    slot = slots.acquire(entry)
    for name, dW in in_slot(slots, slot).items():
        assert torch.equal(dW, before.get(name, torch.zeros_like(dW)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("spaces", [0, 3])
def test_a_second_reading_finds_the_same_factors(tmp_path, dtype, spaces):
    """Of any dtype, and behind a header of any length."""
    folder = save(llama(), tmp_path / "a", 5)

    def change(tensors):
        for key in tensors:
            tensors[key] = tensors[key].to(dtype)

    edit_weights(folder, change)
    path = folder / WEIGHTS
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (n + spaces).to_bytes(8, "little")
        + data[8 : 8 + n]
        + b" " * spaces
        + data[8 + n :]
    )
    slots = AdapterSlots(llama(), 1, 4, cache_bytes=0)
    slots.register("a", folder)
    slot = slots.acquire(slots.find("a"))
    assert slots.counts["disk_loads"] == 2
    expected = load_adapter(llama(), folder)
    for name, layer in lora_layers(expected).items():
        assert layer.lora_A.dtype == in_slot(slots, slot)[name].dtype
        assert_close(in_slot(slots, slot)[name], layer.get_delta_weight())


def test_files_changed_while_they_are_read_are_refused(slots, monkeypatch):
    entry = slots.find("a0")
    slots.cache.clear()
    fromfile = np.fromfile

    def read_and_change(path, dtype):
        data = fromfile(path, dtype)
        os.utime(path, ns=(0, 0))
        return data

    monkeypatch.setattr("numpy.fromfile", read_and_change)
    with pytest.raises(AdapterError, match="'a0' in .* were changed"):
        slots.acquire(entry)
    assert slots.resident == [None, None]


def test_a_link_to_the_files_or_other_rights_are_no_change(slots, tmp_path):
    entry = slots.find("a0")
    slots.cache.clear()  # it has to be read again
    os.link(entry.folder / WEIGHTS, tmp_path / "backup")
    (entry.folder / WEIGHTS).chmod(0o400)
    assert slots.acquire(entry) is not None
    assert slots.counts["cache_hits"] == 0


def test_who_is_evicted_follows_the_least_recent_use(slots, tmp_path):
    """Against a model in a few lines: a list of the resident, oldest first."""
    choose = random.Random(3)
    resident, running = [], []
    for _ in range(300):
        if running and choose.random() < 0.5:
            slots.release(running.pop(choose.randrange(len(running))))
            continue
        entry = slots.find(f"a{choose.randrange(5)}")
        free = [e for e in resident if e not in running]
        slot = slots.acquire(entry)
        if entry in resident:
            resident.remove(entry)
        elif len(resident) == 2 and not free:
            assert slot is None
            continue
        elif len(resident) == 2:
            resident.remove(free[0])
        resident.append(entry)
        running.append(entry)
        assert slots.resident[slot] is entry
        assert {e for e in slots.resident if e} == set(resident)
    assert slots.counts["evictions"] > 20


def test_the_cache_stays_in_its_budget_and_saves_reading(slots, tmp_path):
    sizes = {n: e.nbytes for n, e in slots.registered.items()}
    assert sizes["a1"] > sizes["a0"] + sizes["a2"]  # too large to keep
    slots = AdapterSlots(llama(), 1, 6, sizes["a0"] + sizes["a2"])
    for name in sizes:
        slots.register(name, tmp_path / name)
    read = []
    for name in ["a0", "a2", "a0", "a2", "a1", "a0", "a0", "a2", "a1"]:
        before = slots.counts["disk_loads"]
        slots.acquire(slots.find(name))
        slots.release(slots.find(name))
        read.append(slots.counts["disk_loads"] - before)
        held = sum(e.nbytes for e in slots.cache)
        assert held <= slots.cache_bytes
    # a1 fills the budget alone and more, so it empties the cache
    assert read == [1, 1, 0, 0, 1, 1, 0, 1, 1]
    assert slots.counts["cache_hits"] == 2  # the third 0 was in its slot


def test_sizes_are_those_of_the_numbers(slots):
    entry = slots.find("a2")  # rank 3, two layers of 24 x 24, float64
    assert entry.nbytes == 2 * 3 * (24 + 24) * 8
    before = slots.slot_bytes
    assert before == 0  # made when the first adapter of a layer comes
    slots.acquire(entry)
    assert slots.slot_bytes == 2 * 2 * 6 * (24 + 24) * 8  # of rank max_rank


def test_a_model_of_many_adapters_needs_no_more_slots(slots, tmp_path):
    for name in ("a0", "a1"):
        slots.acquire(slots.find(name))
        slots.release(slots.find(name))
    before = slots.slot_bytes
    for i in range(40):
        slots.register(f"copy{i}", tmp_path / f"a{i % 4}")
    for i in range(40):
        entry = slots.find(f"copy{i}")
        slots.acquire(entry)
        slots.release(entry)
    assert slots.slot_bytes == before


def test_a_name_that_is_forgotten_frees_its_slot_when_unused(slots):
    entry = slots.find("a0")
    slots.acquire(entry)
    slots.unregister("a0")
    assert entry in slots.resident  # a row uses it
    slots.release(entry)
    assert entry not in slots.resident
    assert entry not in slots.cache
    slots.acquire(entry)  # for a request that was accepted before
    assert entry in slots.resident and entry not in slots.cache
    slots.release(entry)
    assert entry not in slots.resident
    with pytest.raises(UnknownAdapter, match="no adapter 'a0'; loaded: a1"):
        slots.find("a0")


@pytest.mark.parametrize(
    "name", ["", "a b", "../a", "a/b", ".a", "-a", "a" * 65, "ä", "a\n", 3]
)
def test_names_are_plain_identifiers(slots, tmp_path, name):
    with pytest.raises(ValueError, match="adapter name .* use 1 to 64"):
        slots.register(name, tmp_path / "a0")


def test_a_taken_name_is_refused(slots, tmp_path):
    with pytest.raises(ValueError, match="'a1' is loaded already, from"):
        slots.register("a1", tmp_path / "a0")
    assert slots.find("a1").folder == tmp_path / "a1"


def edit_config(folder, **change):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def first(tensors, end):
    return next(key for key in tensors if key.endswith(end))


def drop(tensors):
    del tensors[first(tensors, "lora_B.weight")]


def drop_pair(tensors):
    key = first(tensors, "lora_B.weight")
    del tensors[key], tensors[key.replace("lora_B", "lora_A")]


def add_strange(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.ones(3)


def add_pair(tensors):
    for end in ("lora_A", "lora_B"):
        key = first(tensors, f"q_proj.{end}.weight")
        tensors[key.replace("q_proj", "o_proj")] = tensors[key] + 0


def narrow(tensors):
    key = first(tensors, "lora_A.weight")
    tensors[key] = tensors[key][:, :-1].contiguous()


def nan(tensors):
    tensors[first(tensors, "lora_A.weight")][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: edit_config(f, use_dora=True), "DoRA is not a scaling B A"),
        (lambda f: edit_config(f, r=2), "its config says rank 2"),
        (lambda f: edit_config(f, r=7), "its config says rank 7"),
        (lambda f: edit_config(f, target_modules=["nope"]), "matches no mod"),
        (lambda f: edit_config(f, modules_to_save=["norm"]), "whole copies"),
        (lambda f: edit_config(f, peft_type="IA3"), "peft_type is 'IA3'"),
        (lambda f: edit_weights(f, drop), "neither A nor B"),
        (lambda f: edit_weights(f, drop_pair), "no factors in the file for"),
        (lambda f: edit_weights(f, add_strange), "neither A nor B"),
        (lambda f: edit_weights(f, add_pair), "config does not name .*o_proj"),
        (lambda f: edit_weights(f, narrow), "do not fit model.layers.0"),
        (lambda f: edit_weights(f, nan), "NaN or infinity"),
        (lambda f: (f / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
        (
            lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"),
            "pickle that could run code",
        ),
        (lambda f: (f / WEIGHTS).write_bytes(b"x" * 99), "damaged or cut"),
        (lambda f: shutil.rmtree(f), "not an adapter folder"),
    ],
)
def test_what_cannot_be_served_is_refused_with_the_reason(
    slots, tmp_path, change, message
):
    change(tmp_path / "a2")
    before = slots.counts["evictions"], dict(slots.registered)
    with pytest.raises(AdapterError, match=message):
        slots.register("new", tmp_path / "a2")
    assert (slots.counts["evictions"], dict(slots.registered)) == before
    entry = slots.find("a0")
    assert slots.acquire(entry) is not None  # the others are served on


def test_a_rank_above_the_slots_is_refused(tmp_path):
    folder = save(llama(), tmp_path / "a", 1, r=7)
    with pytest.raises(AdapterError, match="rank 7 .* max_rank 6"):
        AdapterSlots(llama(), 2, 6).register("a", folder)


def test_another_base_model_is_refused(tmp_path):
    folder = save(llama(seed=5), tmp_path / "a", 1)
    with pytest.raises(AdapterError, match="trained on another base model"):
        AdapterSlots(llama(), 2, 6).register("a", folder)


def test_an_embedding_is_no_linear_layer(tmp_path):
    folder = save(gpt2(), tmp_path / "a", 1, target_modules=["wte"])
    with pytest.raises(AdapterError, match="wte, which is no linear layer"):
        AdapterSlots(gpt2(), 2, 6).register("a", folder)


def test_values_beyond_the_models_dtype_are_refused(tmp_path):
    folder = save(llama(torch.float32), tmp_path / "a", 1, std=1e6)
    with pytest.raises(AdapterError, match="too large for .*float16"):
        AdapterSlots(llama(torch.float16), 2, 6).register("a", folder)


def test_a_model_with_an_adapter_is_refused():
    model = add_lora(llama(), LoRAConfig(r=2))
    with pytest.raises(RuntimeError, match="remove_lora"):
        AdapterSlots(model, 2, 6)
    AdapterSlots(remove_lora(model) or model, 2, 6)
    with pytest.raises(RuntimeError, match="served already"):
        AdapterSlots(model, 2, 6)


@pytest.mark.parametrize("setting", [(0, 6), (2, 0), (True, 6), (2, 1.5)])
def test_numbers_below_one_are_refused(setting):
    with pytest.raises(ValueError, match="must be an int of at least 1"):
        AdapterSlots(llama(), *setting)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="Embedding has no linear layers"):
        AdapterSlots(torch.nn.Embedding(3, 4), 2, 6)
