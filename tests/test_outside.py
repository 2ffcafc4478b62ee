"""The outside proofs: scripts that hang together, a page that is up to date.

The proofs themselves run by `make outside-vllm` and its sisters, in their own
environments. Here are no network, no vLLM and no Ray: only what was recorded,
and what the scripts do without them.
"""

import importlib
import re
import sys

import pytest
import torch

from tools.notebooks import ROOT
from tools.outside_page import PAGE, page_text, results
from tools.pages import table

FOLDER = ROOT / "tests" / "outside"
PROOFS = ("vllm", "ray", "torchrun")
each_proof = pytest.mark.parametrize("proof", (*PROOFS, "openai"))


def script(name, monkeypatch):
    """Import a script of tests/outside as it imports its neighbours."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    return importlib.import_module(name)


def pins(path):
    """Return {package: version} of a file of requirements."""
    return dict(re.findall(r"^([\w\[\]-]+)==(\S+)$", path.read_text(), re.M))


# ------------------------------ the page


def test_the_tables_are_those_of_the_recorded_files():
    text = PAGE.read_text(encoding="utf-8")
    assert page_text(text) == text, "run: python tools/outside_page.py"


def test_a_page_without_a_place_for_a_table_is_an_error():
    text = PAGE.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="outside.md has the blocks"):
        page_text(text.replace("% begin ray_death", ""))


def test_only_columns_of_numbers_are_set_right():
    lines = table(("a", "b"), ("3e-07", "x"), ("1,000", "1"))
    assert lines[1] == "| ---: | --- |"


@each_proof
def test_every_result_says_how_where_and_when(proof):
    made = results(proof)["made"]
    assert made["command"] == f"make outside-{proof}"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", made["date"])
    assert made["hardware"] and made["versions"]["torch"]
    assert made["seconds"] > 0


# What the prose around the tables says; a new recording may prove it wrong.


def test_prose_vllm_gets_only_the_base_rows_of_a_mixed_batch_wrong():
    found = results("vllm")
    ways = found["compared"]
    n = len(found["adapters"]) * len(found["prompts"])
    assert ways["peft"]["rows"] == n  # PEFT's base model is ours
    for way in ("engine, mixed", "vllm, each alone", "vllm, mixed"):
        assert ways[way]["rows"] == n + len(found["prompts"])
    wrong = ways.pop("vllm, mixed")["differing"]
    assert {row["adapter"] for row in wrong} == {"base"}
    assert len(wrong) == len(found["prompts"])
    assert not any(way["differing"] for way in ways.values())
    answers = found["different_answers"].values()
    assert set(answers) == {1 + len(found["adapters"])}


def test_prose_a_refused_load_is_harmless_and_a_refused_request_is_not():
    refused = results("vllm")["refused"]
    assert "rank 32 is greater than max_lora_rank" in refused["load"]["rank 32"]
    assert "does not yet support DoRA" in refused["load"]["DoRA"]
    assert refused["base_request_after_load"] is None
    for error in refused["base_request_after_request"].values():
        assert error.startswith("EngineDeadError")
    assert "does not support LoRA" in refused["GPT-2"]


def test_prose_the_header_saves_loads_and_no_answer_is_wrong():
    found = results("ray")
    aware, blind = found["routing"]["aware"], found["routing"]["blind"]
    assert found["different_answers"] == found["adapters"] == 8
    assert found["held_per_replica"] == 4 and found["replicas"] == 2
    assert found["adapters"] <= aware["loads"] < blind["loads"] / 2
    assert aware["wrong"] == blind["wrong"] == found["death"]["wrong"] == 0
    assert len(aware["replicas"]) == len(blind["replicas"]) == 2


def test_prose_a_killed_replica_costs_a_second_try():
    death = results("ray")["death"]
    assert death["failed_tries"] and death["never_answered"] == 0
    total = death["answered_at_once"] + death["answered_after_retry"]
    assert total == death["requests"]
    assert death["new_replica_after_seconds"] is not None


def test_prose_only_lora_gradients_travel_and_they_are_right():
    steps = results("torchrun")["one_step"]
    for name, step in steps.items():
        size = {"float32": 4, "float64": 8}[step["dtype"]]
        gradients = step["trainable_numbers"] * size
        limit = 1e-13 if size == 8 else 1e-5
        assert step["worst_gradient_error"] < limit
        if name.startswith("ddp"):
            assert step["step_bytes"] == {"all_reduce": gradients}
            assert step["held_bytes_per_process"] == step["model_bytes"]
        else:
            assert step["step_bytes"]["reduce_scatter"] == gradients
            half = step["model_bytes"] / 2
            assert step["held_bytes_per_process"] == pytest.approx(half, 0.01)
    lora, full = steps["fsdp2 lora float32"], steps["fsdp2 full float32"]
    gathered = [step["step_bytes"]["all_gather"] for step in (lora, full)]
    assert gathered[0] > gathered[1]  # the adapter on top of the same base
    assert gathered[0] > 10 * lora["step_bytes"]["reduce_scatter"]


def test_prose_two_processes_train_the_adapter_of_one():
    for way in results("torchrun")["training"].values():
        assert way["worst_loss_difference"] < 1e-4
        assert way["worst_logit_difference"] < 1e-2
        assert way["last_loss"] < way["first_loss"]
        one, two = (
            way[f"check_loss_{n}"] for n in ("one_process", "two_processes")
        )
        assert two == pytest.approx(one, abs=1e-4)
        assert one < way["check_loss_base"]


def test_prose_every_answer_to_openais_client_is_right():
    found = results("openai")
    assert len(found["checks"]) > 10 and all(found["checks"].values())
    assert found["refused"]["an unknown model"][0] == "NotFoundError"
    assert all(error != "none" for error, _ in found["refused"].values())


# ------------------------------ the scripts


@pytest.mark.parametrize("proof", PROOFS)  # openai is in requirements.txt
def test_every_proof_has_a_command_and_pinned_requirements(proof):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rule = re.search(rf"^outside-{proof}:.*\n((?:\t.*\n)+)", makefile, re.M)
    scripts = re.findall(r"\S+\.py", rule[1])
    assert len(scripts) == 2
    assert all((ROOT / name).is_file() for name in scripts)
    path = FOLDER / f"requirements-{proof}.txt"
    lines = [
        line
        for line in path.read_text().splitlines()
        if line and not line.startswith("#")
    ]
    found, ours = pins(path), pins(ROOT / "requirements.txt")
    assert len(found) == len(lines)
    for package in found.keys() & ours.keys():
        assert found[package] == ours[package], package


def test_pytest_collects_nothing_of_the_proofs():
    assert not [*FOLDER.glob("test_*.py"), *FOLDER.glob("*_test.py")]


def test_rows_are_every_pair_mixed_up_and_come_back_in_place(monkeypatch):
    greedy = script("vllm_greedy", monkeypatch)
    mixed = greedy.rows({"one": None, "two": None})
    n = len(greedy.PROMPTS)
    assert len(set(mixed)) == len(mixed) == 3 * n
    assert all(a[0] != b[0] for a, b in zip(mixed, mixed[1:], strict=False))
    tokens = [[i, len(name)] for name, i in mixed]
    found = greedy.table(mixed, tokens)
    assert found["two"] == [[i, 3] for i in range(n)]


def test_differing_rows_are_named_with_the_first_other_token(monkeypatch):
    greedy = script("vllm_greedy", monkeypatch)
    same = [[5, 6, 7]] * len(greedy.PROMPTS)
    ended = [[5, 6, 7, 2]] * len(greedy.PROMPTS)
    other = [*same[:-1], [5, 9, 7]]
    assert greedy.differing({"a": ended}, {"a": same}, end=2) == []
    assert greedy.differing({"a": other}, {"a": ended, "b": same}, end=2) == [
        {
            "adapter": "a",
            "prompt": greedy.PROMPTS[-1],
            "first_different_token": 1,
        }
    ]


def test_the_adapters_for_vllm_differ_in_everything_it_could_ignore(
    monkeypatch,
):
    configs = [
        config
        for config, _ in script("vllm_greedy", monkeypatch).ADAPTERS.values()
    ]
    n = len(configs)
    assert len({c.r for c in configs}) == n
    assert len({c.lora_alpha / c.r for c in configs}) > 1
    assert len({c.target_modules for c in configs}) == n
    assert {c.use_rslora for c in configs} == {True, False}
    assert max(c.r for c in configs) <= 16  # vLLM's max_lora_rank


def test_bytes_are_counted_from_what_a_call_is_given(monkeypatch):
    from torch import distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    Collectives = script("torchrun_lora", monkeypatch).Collectives
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with Collectives() as found:
            dist.all_reduce(torch.zeros(3))
            dist.all_reduce(torch.zeros(2, dtype=torch.float64))
            dist.all_gather_into_tensor(torch.zeros(14), torch.zeros(7))
            dist.reduce_scatter_tensor(torch.zeros(5), torch.zeros(10))
    finally:
        dist.destroy_process_group()
    assert found.bytes == {
        "all_reduce": 3 * 4 + 2 * 8,
        "all_gather": 7 * 4,
        "reduce_scatter": 10 * 4,
    }


def test_a_record_is_whole_and_says_what_made_it(monkeypatch, tmp_path):
    record = script("record", monkeypatch)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    record.record("x", 1.6, {"found": {"é": 1}})
    assert [path.name for path in tmp_path.iterdir()] == ["outside_x.json"]
    text = (tmp_path / "outside_x.json").read_text(encoding="utf-8")
    assert '"make outside-x"' in text and "é" in text
    assert '"seconds": 2' in text
