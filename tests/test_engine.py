"""Rows that join, run and leave give what they would give alone."""

import gc
import itertools
import shutil
import threading
import weakref

import pytest
import torch
from adapters_on_disk import greedy, save
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lora_from_scratch import (
    AdapterError,
    load_adapter,
    quantize_model,
    remove_lora,
)
from lora_from_scratch.serving.engine import (
    Engine,
    QueueFull,
    UnknownAdapter,
)
from lora_from_scratch.serving.request import draw, settled

V, LENGTH, EOS = 31, 40, 30
LETTERS = "abcdefghijklmnopqrstuvwxyz .,-$"  # one for each token
PROMPTS = ["the whale", "a", "in the beginning", "no, a dog", "x"]


class Letters:
    """A tokenizer with a token for every letter; $ ends a text."""

    eos_token_id = EOS

    def __call__(self, text, verbose=False):
        """Return the ids of a text."""
        return {"input_ids": [LETTERS.index(c) for c in text]}

    def decode(self, ids, skip_special_tokens):
        """Return the text of ids."""
        assert skip_special_tokens
        return "".join(LETTERS[i] for i in ids if i != EOS)


def gpt2(dtype):
    config = GPT2Config(
        vocab_size=V,
        n_positions=LENGTH,
        n_embd=24,
        n_layer=2,
        n_head=3,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return GPT2LMHeadModel(config).to(dtype)


def llama(dtype):
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config).to(dtype)


def build(kind=gpt2, dtype=torch.float64):
    """Return a model that seldom ends a text, in eval mode."""
    torch.manual_seed(0)
    model = kind(dtype).eval()
    for p in model.parameters():
        p.data *= 4  # an untrained model says the same whatever it is asked
    return model


@pytest.fixture(scope="module", params=[gpt2, llama], ids=["gpt2", "llama"])
def world(request, tmp_path_factory):
    """A model, five adapters of different ranks and layers, and an engine."""
    root = tmp_path_factory.mktemp("adapters")
    model = build(request.param)
    some = ["c_attn"] if request.param is gpt2 else ["q_proj", "up_proj"]
    folders = {
        f"a{i}": save(
            model,
            root / f"a{i}",
            i,
            r=i + 1,
            target_modules=some if i == 2 else "all-linear",
            use_rslora=i == 3,
        )
        for i in range(5)
    }
    plain = build(request.param)
    engine = Engine(model, Letters(), max_adapters=3, max_rank=5, max_rows=4)
    for name, folder in folders.items():
        engine.load(name, folder)
    return plain, folders, engine


def alone(world, prompt, name, n):
    """Return the tokens of a prompt by itself, up to the end of text."""
    plain, folders, _ = world
    ids = Letters()(prompt)["input_ids"]
    found = greedy(plain, ids, n, folders.get(name))
    return found[: found.index(EOS)] if EOS in found else found


def test_many_requests_over_few_rows_and_slots_equal_each_alone(world):
    engine = world[2]
    names = [None, *world[1]]
    asked = list(itertools.product(PROMPTS, names))
    found = engine.generate(*zip(*asked, strict=True), 9)
    different = set()
    for (prompt, name), completion in zip(asked, found, strict=True):
        expected = alone(world, prompt, name, 9)
        assert completion.token_ids == expected
        assert completion.n_prompt_tokens == len(prompt)
        different.add((prompt, tuple(expected)))
    assert len(different) > 3 * len(PROMPTS)  # adapters do matter


@torch.inference_mode()
def test_law_7_every_order_and_mixture(world):
    plain, folders, engine = world
    ids = torch.randint(
        0, V, (3, 5), generator=torch.Generator().manual_seed(3)
    )
    slots, expected = {None: None}, {None: plain(ids).logits}
    for name in ("a1", "a3"):
        slots[name] = engine.slots.acquire(engine.slots.find(name))
        load_adapter(plain, folders[name])
        expected[name] = plain(ids).logits
        remove_lora(plain)
    for names in itertools.product(slots, repeat=3):
        for tokens in (5, 1):  # segments, and the mask
            engine.slots.route([slots[n] for n in names], tokens)
            found = engine.model(ids[:, :tokens]).logits
            for i, name in enumerate(names):
                assert_close(found[i], expected[name][i, :tokens])
    for name in ("a1", "a3"):
        engine.slots.release(engine.slots.find(name))


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [gpt2, llama])
def test_law_7_base_rows_keep_every_bit(kind, dtype, tmp_path):
    model, plain = build(kind, dtype), build(kind, dtype)
    for i in range(2):
        save(model, tmp_path / f"a{i}", i)
    engine = Engine(model, Letters(), max_adapters=2, max_rank=4)
    for i in range(2):
        engine.load(f"a{i}", tmp_path / f"a{i}")
        engine.slots.acquire(engine.slots.find(f"a{i}"))
    for tokens in (7, 1):
        ids = torch.randint(0, V, (4, tokens))
        engine.slots.route([1, None, 0, None], tokens)
        found, expected = model(ids).logits, plain(ids).logits
        assert torch.equal(found[[1, 3]], expected[[1, 3]])
        assert not torch.equal(found[0], expected[0])


def test_pieces_join_to_the_whole_answer(world):
    engine, pieces = world[2], []
    request = engine.submit("a dog", "a1", 8, on_piece=pieces.append)
    while not request.done.is_set():
        engine.step()
    completion = request.completion()
    assert "".join(p.text for p in pieces) == completion.text
    assert sum((p.token_ids for p in pieces), []) == completion.token_ids
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == completion.finish_reason
    assert len(pieces) > 3


def test_a_stop_text_ends_the_answer_and_is_never_sent(world):
    engine = world[2]
    (whole,) = engine.generate(["a dog"], ["a1"], 12)
    stop = whole.text[3:5]
    pieces = []
    request = engine.submit(
        "a dog", "a1", 12, stop=[stop, "never"], on_piece=pieces.append
    )
    while not request.done.is_set():
        engine.step()
    found = request.completion()
    assert found.finish_reason == "stop"
    assert found.text == whole.text[: whole.text.index(stop)]
    assert "".join(p.text for p in pieces) == found.text


@pytest.mark.parametrize(
    ("text", "stop", "n"),
    [
        ("abc", (), 3),
        ("abc", ("cd",), 2),
        ("abc", ("bcd", "x"), 1),
        ("abc", ("cd", "bce"), 1),
        ("abc\ufffd", (), 3),
        ("abc\ufffd", ("cd",), 2),
        ("", ("a",), 0),
    ],
)
def test_what_may_still_change_is_held_back(text, stop, n):
    assert settled(text, stop) == n


def test_the_end_of_text_token_ends_an_answer_and_is_not_in_it(tmp_path):
    model = build(llama)
    engine = Engine(model, Letters())
    ids = Letters()("a dog")["input_ids"]
    (first,) = greedy(build(llama), ids, 1)
    engine.eos_ids = {first}
    (found,) = engine.generate(["a dog"], [None], 7)
    assert (found.text, found.token_ids) == ("", [])
    assert found.finish_reason == "stop"
    engine.eos_ids = set()
    (found,) = engine.generate(["a dog"], [None], 7)
    assert (len(found.token_ids), found.finish_reason) == (7, "length")


def test_prompt_and_answer_fill_the_last_position(world):
    prompt = "abcdefghij" * 3
    (found,) = world[2].generate([prompt], ["a2"], LENGTH - len(prompt))
    expected = alone(world, prompt, "a2", LENGTH - len(prompt))
    assert found.token_ids == expected


def test_a_seed_repeats_a_draw_whoever_shares_the_batch(world):
    engine = world[2]
    draws = dict(max_new_tokens=12, temperature=1.5)
    (first,) = engine.generate(["a dog"], ["a1"], seed=7, **draws)
    crowd = engine.generate(
        ["a dog", *PROMPTS],
        ["a1", None, "a0", "a3", "a1", "a2"],
        seed=7,
        **draws,
    )
    (other,) = engine.generate(["a dog"], ["a1"], seed=8, **draws)
    assert crowd[0].token_ids == first.token_ids != other.token_ids


class Asked:
    """What ``draw`` needs of a request."""

    def __init__(self, temperature, top_p=1.0):
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(5)


def test_draws_follow_softmax_of_logits_over_temperature():
    logits = torch.tensor([1.0, 0.2, -0.5, 2.0, -3.0])
    asked, n = Asked(0.7), 4000
    counts = torch.bincount(
        torch.tensor([draw(logits, asked) for _ in range(n)]), minlength=5
    )
    p = torch.exp(logits / 0.7)
    p = p / p.sum()
    error = (counts / n - p).abs()
    assert (error < 4 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_top_p_keeps_the_fewest_tokens_that_hold_so_much():
    logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3]))
    for top_p, kept in ((0.4, {1}), (0.6, {1, 3}), (0.81, {0, 1, 3})):
        asked = Asked(1.0, top_p)
        assert {draw(logits, asked) for _ in range(300)} == kept


@pytest.mark.parametrize("temperature", [1e-308, 1e-30])
def test_a_tiny_temperature_is_greedy_and_breaks_nothing(temperature):
    assert draw(torch.tensor([1.0, 3.0, 2.0]), Asked(temperature)) == 1


def test_rows_slots_and_order_in_the_trace(world):
    engine = world[2]
    engine.trace = []
    names = ["a0", "a1", "a2", "a3", None, "a0", "a4", "a1", None]
    numbers = [engine.submit("the", n, 6).number for n in names]
    while engine.step():
        pass
    trace, engine.trace = engine.trace, None
    joined = [row[0] for step in trace for row in step["joined"]]
    started = {row[0]: step["step"] for step in trace for row in step["joined"]}
    assert sorted(joined) == sorted(numbers)  # each once
    times = [started[n] for n in numbers]
    assert times == sorted(times)  # nobody overtakes
    for step in trace:
        assert len(step["rows"]) <= engine.max_rows
        assert all(
            name in [None, *step["slots"]] for _, name, _ in step["rows"]
        )
        useful, padded = step["kv_tokens"]
        assert useful == sum(n for *_, n in step["rows"]) <= padded
    assert any(step["waiting"] and len(step["rows"]) < 4 for step in trace)


def test_a_cancelled_request_leaves_and_the_others_stay_right(world):
    engine = world[2]
    first, second, third = (
        engine.submit("the whale", name, 10) for name in ("a0", "a1", "a3")
    )
    waiting = [engine.submit("a", "a2", 5) for _ in range(3)]
    engine.step()
    engine.step()
    engine.cancel(first)
    engine.cancel(waiting[1])
    while engine.step():
        pass
    assert first.completion().finish_reason == "cancelled"
    assert len(first.completion().token_ids) == 2
    assert waiting[1].completion().token_ids == []
    for request, name in ((second, "a1"), (third, "a3")):
        got = request.completion().token_ids
        assert got == alone(world, "the whale", name, 10)
    assert engine.stats()["rows"] == engine.stats()["waiting"] == 0
    assert not engine.slots.users  # nothing stays pinned


def test_an_adapter_that_overflows_fails_alone(tmp_path):
    model, plain = build(dtype=torch.float32), build(dtype=torch.float32)
    good = save(model, tmp_path / "good", 1)
    bad = save(model, tmp_path / "bad", 2, std=1e36)
    engine = Engine(model, Letters(), max_adapters=2, max_rank=4, max_rows=3)
    engine.load("good", good)
    engine.load("bad", bad)
    ids = Letters()("the whale")["input_ids"]
    for _ in range(2):  # the second time in rows that the first one left
        requests = [
            engine.submit("the whale", n, 6) for n in ("bad", "good", None)
        ]
        while engine.step():
            pass
        with pytest.raises(RuntimeError, match="output of bad is not finite"):
            requests[0].completion()
        for request, folder in zip(requests[1:], (good, None), strict=True):
            expected = greedy(plain, ids, 6, folder)
            assert request.completion().token_ids == expected
    found = engine.generate(["the whale"] * 3, [None] * 3, 6)
    assert [f.token_ids for f in found] == [greedy(plain, ids, 6)] * 3


def test_a_forgotten_adapter_finishes_and_its_name_is_free(world):
    _, folders, engine = world
    request = engine.submit("the whale", "a4", 8)
    engine.step()
    engine.unload("a4")
    with pytest.raises(UnknownAdapter, match="no adapter 'a4'; loaded: a0"):
        engine.submit("the whale", "a4", 8)
    engine.load("a4", folders["a3"])  # another one under the same name
    again = engine.submit("the whale", "a4", 8)
    while engine.step():
        pass
    assert request.completion().token_ids == alone(world, "the whale", "a4", 8)
    assert again.completion().token_ids == alone(world, "the whale", "a3", 8)
    engine.unload("a4")
    assert "a4" not in [e and e.name for e in engine.slots.resident]
    engine.load("a4", folders["a4"])
    assert list(engine.adapters) == ["a0", "a1", "a2", "a3", "a4"]


def test_a_file_that_changed_fails_its_requests_only(tmp_path):
    model = build()
    for i in range(2):
        save(model, tmp_path / f"a{i}", i)
    engine = Engine(model, Letters(), max_adapters=1, max_rank=4, cache_bytes=0)
    for i in range(2):
        engine.load(f"a{i}", tmp_path / f"a{i}")
    before = engine.generate(["the"], ["a0"], 5)
    save(build(), tmp_path / "a1", 9)
    lost = engine.submit("the", "a1", 5)
    fine = engine.submit("the", "a0", 5)
    while engine.step():
        pass
    with pytest.raises(AdapterError, match="'a1' .* were changed since"):
        lost.completion()
    assert fine.completion() == before[0]
    shutil.rmtree(tmp_path / "a1")
    with pytest.raises(AdapterError, match="were changed since"):
        engine.generate(["the"], ["a1"], 5)


def test_a_request_that_is_done_lets_its_listener_go(world):
    class Listener:  # like one that serves a client: it knows its request
        def hear(self, piece):
            self.text = piece.text

    engine, listener = world[2], Listener()
    listener.request = engine.submit("the", "a1", 3, on_piece=listener.hear)
    while engine.step():
        pass
    gone = weakref.ref(listener)
    gc.disable()  # a server with much in memory collects cycles rarely
    try:
        del listener
        assert gone() is None
    finally:
        gc.enable()


def test_a_thread_serves_callers_of_many_threads(world):
    engine = world[2]
    names = [None, *world[1]] * 3
    found = {}

    def ask(i, name):
        found[i] = engine.submit(PROMPTS[i % 5], name, 7).completion()

    engine.start()
    try:
        callers = [
            threading.Thread(target=ask, args=pair) for pair in enumerate(names)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(60)
        assert engine.generate(["the"], ["a1"], 3)[0].token_ids
    finally:
        engine.stop()
    for i, name in enumerate(names):
        assert found[i].token_ids == alone(world, PROMPTS[i % 5], name, 7)


def test_a_step_that_fails_tells_its_requests_and_the_next_one_runs(
    world, monkeypatch
):
    engine = world[2]
    request = engine.submit("the whale", "a1", 4)
    engine.step()

    def fail(**_):  # after it has written what no mask can hide
        engine.cache.keys[0].fill_(torch.nan)
        engine.cache.values[0].fill_(torch.nan)
        return 1 / 0

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            engine.step()
    with pytest.raises(RuntimeError, match="generation failed: division"):
        request.completion()
    assert not engine.slots.users
    # rows of two lengths: the shorter one reads behind its end
    asked = ["the", "the whale"], ["a1", None]
    for found, prompt, name in zip(
        engine.generate(*asked, 4), *asked, strict=True
    ):
        assert found.token_ids == alone(world, prompt, name, 4)


def test_a_listener_that_fails_loses_its_own_request_only(world):
    engine = world[2]

    def gone(piece):
        raise RuntimeError("the client is gone")

    lost = engine.submit("the", "a1", 9, on_piece=gone)
    fine = engine.submit("the", "a2", 9)
    while engine.step():
        pass
    assert lost.completion().finish_reason == "cancelled"
    assert fine.completion().token_ids == alone(world, "the", "a2", 9)


def test_memory_does_not_grow_with_requests(world):
    engine = world[2]
    sizes = []
    for _ in range(3):
        engine.generate(["the whale"] * 6, ["a0", "a1", "a2"] * 2, 9)
        stats = engine.stats()
        sizes.append((stats["kv_bytes"], stats["slot_bytes"]))
    assert sizes[0] == sizes[1] == sizes[2]


def test_a_base_in_four_bits_serves_adapters(tmp_path):
    model, plain = quantize_model(build(llama)), quantize_model(build(llama))
    folder = save(model, tmp_path / "a", 1)
    engine = Engine(model, Letters(), max_rank=4)
    engine.load("a", folder)
    ids = Letters()("the whale")["input_ids"]
    found = engine.generate(["the whale"] * 2, ["a", None], 6)
    assert found[0].token_ids == greedy(plain, ids, 6, folder)
    assert found[1].token_ids == greedy(plain, ids, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [V]}, f"token ids are 0 to {V - 1}, got {V}"),
        ({"prompt": [-1]}, "token ids are 0 to"),
        ({"prompt": [True]}, "token ids are 0 to"),
        ({"prompt": "a" * LENGTH}, f"has {LENGTH} tokens and asks for 3 more"),
        ({"max_new_tokens": 0}, "max_new_tokens must be an int"),
        ({"max_new_tokens": 10**9}, "have room for 40"),
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"temperature": float("nan")}, "temperature must be 0 or more"),
        ({"top_p": 0}, "top_p must be in"),
        ({"seed": 2**70}, "seed must fit 64 bits"),
        ({"stop": [""]}, "stop must be texts"),
    ],
)
def test_bad_requests_name_the_mistake(world, change, message):
    engine = world[2]
    asked = {"prompt": "the", "adapter": None, "max_new_tokens": 3} | change
    with pytest.raises(ValueError, match=message):
        engine.submit(**asked)
    assert engine.stats()["waiting"] == 0


def test_generate_refuses_all_if_one_is_bad(world):
    engine = world[2]
    with pytest.raises(UnknownAdapter, match="no adapter 'nobody'"):
        engine.generate(["the", "a"], ["a1", "nobody"], 3)
    with pytest.raises(TypeError):
        engine.generate(["the", None], ["a1", None], 3)
    with pytest.raises(ValueError, match="2 prompts need 2 adapters, got 1"):
        engine.generate(["the", "a"], ["a1"], 3)
    while engine.step():
        pass
    assert engine.stats()["rows"] == engine.stats()["waiting"] == 0


def test_a_full_queue_says_so():
    engine = Engine(build(), Letters(), max_waiting=2)
    requests = [engine.submit("a", None, 2) for _ in range(2)]
    with pytest.raises(QueueFull, match="2 requests wait already"):
        engine.submit("a", None, 2)
    while engine.step():
        pass
    assert all(r.done.is_set() for r in requests)
    engine.submit("a", None, 2)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="max_rows must be"):
        Engine(build(), Letters(), max_rows=0)
    with pytest.raises(ValueError, match="more than the 40 positions"):
        Engine(build(), Letters(), max_length=41)
    engine = Engine(build(), Letters())
    with pytest.raises(RuntimeError, match="served already"):
        Engine(engine.model, Letters())
    with pytest.raises(ValueError, match="the name of the base model"):
        engine.load(engine.model_name, "anywhere")


def test_stats_are_plain_numbers():
    stats = Engine(build(), Letters()).stats()
    assert all(type(value) is int for value in stats.values())
