"""Tests for lora_from_scratch/widgets/batch_scheduler.py and its script."""

import base64
import io
import json
import random
from datetime import datetime
from itertools import product

import numpy as np
import pytest
import traitlets
from adapters_on_disk import save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from widget_pages import (
    ids_of,
    opened,
    requests_of,
    stored,
    table,
    violations,
    write_page,
)

from lora_from_scratch import load_base
from lora_from_scratch.serving.batch import segments
from lora_from_scratch.serving.engine import Engine
from lora_from_scratch.widgets import BatchScheduler
from lora_from_scratch.widgets.batch_scheduler import (
    COLORS,
    PLANS,
    POLICIES,
    schedule,
)

NAMES = ["address", "kjv", "wn", "legal", "poems", "recipes", "sport"]


def workload(seed, n=16, last=18, prompt=30, new=12, adapters=4):
    """Return ``n`` random requests, in order of arrival."""
    draw = random.Random(seed)
    requests = [
        (
            draw.randint(1, last),
            draw.choice([*NAMES[:adapters], None]),
            draw.randint(1, prompt),
            draw.randint(1, new),
        )
        for _ in range(n)
    ]
    return sorted(requests, key=lambda request: request[0])


# rows, slots: requests. The first waits for slots; the second for rows, and
# it may choose among idle slots; the third has many runs, and a pause in which
# nothing happens.
WORKLOADS = {
    (5, 2): workload(1),
    (3, 4): workload(2, adapters=7),
    (12, 7): workload(3, 30, 4, 20, 9, 7)
    + [(40, "kjv", 9, 1), (40, None, 3, 2)],
}
MARKED = [(a, name and f"<{name}>", *n) for a, name, *n in WORKLOADS[5, 2]]
WIDGET = BatchScheduler(MARKED, "<i>16</i> requests", 5, 2)
LARGE = BatchScheduler(WORKLOADS[12, 7], "many", 12, 7)


# The schedule


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """{(rows, slots): what the engine did}; the model's answers end by length.

    Steps with nothing to do are not in an engine's trace, nor in its count.
    """
    root, (model, _) = tmp_path_factory.mktemp("adapters"), load_base("tiny")
    for seed, name in enumerate(NAMES):
        save(model, root / name, seed, r=seed + 1)
    draw, traces = random.Random(0), {}
    for (rows, slots), requests in WORKLOADS.items():
        engine = Engine(
            *load_base("tiny"), max_rows=rows, max_adapters=slots, max_rank=7
        )
        engine.eos_ids = set()
        for name in NAMES:
            engine.load(name, root / name)
        waiting, sent, engine.trace = list(requests), [], []
        for step in range(1, 100):
            while waiting and waiting[0][0] == step:
                _, name, prompt, new = waiting.pop(0)
                ids = [draw.randint(1, 4000) for _ in range(prompt)]
                sent.append(engine.submit(ids, name, new))
            engine.step()
        lengths = [len(request.completion().token_ids) for request in sent]
        assert lengths == [new for *_, new in requests]
        traces[rows, slots] = engine.trace
    return traces


def counted(steps):
    """Return the steps with something to do, by the engine's count."""
    busy = [now for now in steps if now["rows"]]
    return [{**now, "step": i + 1} for i, now in enumerate(busy)]


@pytest.mark.parametrize("sizes", WORKLOADS)
def test_it_is_what_the_engine_does(traces, sizes):
    steps = schedule(WORKLOADS[sizes], *sizes)
    assert counted(steps) == traces[sizes]
    assert len(traces[sizes]) > 15
    evicted = any(now["evicted"] for now in steps)
    assert evicted == (sizes != (12, 7))
    assert (len(counted(steps)) < len(steps)) == (sizes == (12, 7))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    requests=st.lists(
        st.tuples(
            st.integers(1, 12),
            st.sampled_from([*"ABCDEF", None]),
            st.integers(1, 9),
            st.integers(1, 6),
        ),
        min_size=1,
        max_size=14,
    ),
    rows=st.integers(1, 6),
    slots=st.integers(1, 4),
    policy=st.sampled_from(POLICIES),
)
def test_laws_of_the_schedule(requests, rows, slots, policy):
    requests.sort(key=lambda request: request[0])
    trace = schedule(requests, rows, slots, policy)
    tokens = [[] for _ in requests]
    joined, left, resident, before = [], [], [None] * slots, []
    for now in trace:
        n_joined = len(now["joined"])
        batch = [(n, name) for n, name, _ in now["rows"]]
        n_decoded = len(batch) - n_joined
        decoded, new = batch[:n_decoded], batch[n_decoded:]
        assert [n for n, _, _ in now["joined"]] == [n for n, _ in new]
        assert {n for n, _ in decoded} == set(before)
        for n, name, so_far in now["rows"]:
            assert requests[n][1] == name
            tokens[n].append(so_far - requests[n][2] + 1)
        # slots: all in use are resident, only what no row uses is evicted
        used = {name for _, name in batch} - {None}
        assert used <= set(now["slots"]) and len(batch) <= rows
        assert len(set(now["slots"]) - {None}) == slots - now["slots"].count(
            None
        )
        assert not set(now["evicted"]) & {name for _, name in decoded}
        lost = set(resident) - set(now["slots"]) - {None}
        assert lost <= set(now["evicted"])
        assert None not in now["slots"] or not now["evicted"]
        resident = now["slots"]
        # first come first served, and nobody waits without a reason
        joined += sorted(n for n, _ in new)
        assert joined == list(range(len(joined)))
        here = sum(arrival <= now["step"] for arrival, *_ in requests)
        assert now["waiting"] == here - len(joined)
        if now["waiting"]:
            name = requests[len(joined)][1]
            full = name not in [None, *resident] and used == set(resident)
            held = policy == "static" and decoded
            assert full or len(batch) == rows or held
        if policy == "static" and decoded:
            assert not new
        # the order in the batch, and what is counted
        places = [-1 if a is None else resident.index(a) for _, a in new]
        assert places == sorted(places)
        runs = segments([name for _, name in decoded])
        assert now["runs"] == len(runs)
        lengths = [requests[n][2] for n, _ in new]
        longest = max(lengths, default=0)
        assert now["prefill_tokens"] == [sum(lengths), longest * n_joined]
        lengths = [n for _, _, n in now["rows"]] or [0]
        padded = len(batch) * max(lengths)
        assert now["kv_tokens"] == [sum(lengths), padded]
        assert (now["plan"] is None) == (not decoded)
        left += now["left"]
        before = [n for n, _ in batch if n not in now["left"]]
    assert sorted(left) == list(range(len(requests)))
    for (_, _, _, new), got in zip(requests, tokens, strict=True):
        assert got == list(range(1, new + 1))
    assert [now["step"] for now in trace] == list(range(1, len(trace) + 1))


def decoded_of(now):
    """Return the rows of a step that were in the batch before it."""
    return now["rows"][: len(now["rows"]) - len(now["joined"])]


def test_the_least_recently_used_slot_that_no_row_uses_is_taken():
    """A is used longest but last; B is idle longest; C comes, then A again."""
    requests = [
        (1, "A", 3, 1),
        (2, "B", 3, 1),
        (3, "A", 3, 4),
        (4, "C", 3, 1),
        (5, "B", 3, 3),
        (6, "C", 3, 1),
        (9, "A", 3, 1),
    ]
    trace = schedule(requests, max_rows=2, max_adapters=2)
    slots = [now["slots"] for now in trace[:7]]
    assert slots[:2] == [["A", None], ["A", "B"]]
    assert slots[2:5] == [["A", "B"], ["A", "C"], ["A", "B"]]
    assert [now["evicted"] for now in trace[3:5]] == [["B"], ["C"]]
    # step 6: rows use both slots; step 7: A has left, C takes its slot
    assert trace[5]["waiting"] == 1 and trace[5]["evicted"] == []
    assert slots[6] == ["C", "B"] and trace[6]["evicted"] == ["A"]


def test_the_last_row_takes_the_place_of_one_that_leaves():
    requests = [(1, None, 2, n) for n in (4, 1, 3, 1, 5)]
    trace = schedule(requests, max_rows=5, max_adapters=1)
    rows = [[n for n, _, _ in now["rows"]] for now in trace]
    assert rows[:2] == [[0, 1, 2, 3, 4], [0, 4, 2]]


def test_joining_an_empty_batch_only_takes_longer():
    for rows, slots in [(5, 2), (3, 4)]:
        requests = WORKLOADS[rows, slots]
        steps = [len(schedule(requests, rows, slots, p)) for p in POLICIES]
        assert steps[0] < steps[1]


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    n = len(WIDGET.trace())
    assert repr(WIDGET) == (
        "BatchScheduler('<i>16</i> requests', 16 requests, max_rows=5, "
        f"max_adapters=2): {n} steps"
    )
    evicted = sum(len(now["evicted"]) for now in WIDGET.trace())
    assert evicted > 1
    assert f"{n} steps" in WIDGET.alt()
    assert f"evicted: {evicted}" in WIDGET.alt()


def test_a_page_grows_by_at_most_40_kB():
    assert len(json.dumps(stored(LARGE))) <= 40_000


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    widget = BatchScheduler(WORKLOADS[3, 4], "x", 3, 4)
    data, metadata = widget._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 30
    assert data["text/plain"] == repr(widget)
    assert metadata["image/png"]["alt"] == widget.alt()
    widget.max_rows = 2  # the picture follows
    assert widget._repr_mimebundle_()[0]["image/png"] != data["image/png"]


def test_the_script_asks_for_nothing():
    assert requests_of(WIDGET) == []


def luminance(color):
    """Return the relative luminance of WCAG 2."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4
        for x in parts
    ]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@pytest.mark.parametrize("color", COLORS)
def test_a_black_letter_can_be_read_on_every_color(color):
    assert (luminance(color) + 0.05) / 0.05 >= 4.5


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(requests=[]), r"must be 1\.\.64, got 0"),
        (dict(requests=[(1, None, 1, 1)] * 65), r"1\.\.64, got 65"),
        (dict(requests=7), "must be a list of .arrival, adapter, .* got 7"),
        (dict(requests=[7]), "request 0 must be .arrival, .* got 7"),
        (
            dict(requests=[(1, "A", 2)]),
            r"request 0 must be .*, got \(1, 'A', 2",
        ),
        (dict(requests=[(1, 3, 2, 2)]), "request 0: adapter must be .*got 3"),
        (dict(requests=[(1, "", 2, 2)]), "adapter must be .*got ''"),
        (dict(requests=[(0, "A", 2, 2)]), r"arrival .* 1\.\.200, got 0"),
        (dict(requests=[(1.5, "A", 2, 2)]), r"arrival .* 1\.\.200, got 1.5"),
        (dict(requests=[(True, "A", 2, 2)]), r"arrival .* got True"),
        (dict(requests=[(1, "A", 513, 2)]), r"prompt tokens .*512, got 513"),
        (dict(requests=[(1, "A", 2, 0)]), r"new tokens .*1\.\.64, got 0"),
        (
            dict(requests=[(1, f"a{i}", 1, 1) for i in range(27)]),
            "name 27 adapters; 26",
        ),
        (dict(max_rows=0), r"max_rows must be an int in 1\.\.16, got 0"),
        (dict(max_rows=17), r"max_rows must be an int in 1\.\.16, got 17"),
        (dict(max_adapters=2.0), r"max_adapters .* 1\.\.8, got 2.0"),
        (dict(label=""), "label must say"),
    ],
)
def test_what_cannot_be_shown_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        BatchScheduler(**{"requests": [(1, "A", 2, 2)], "label": "x", **given})


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_rows", 17), ("max_adapters", 0), ("policy", "x"), ("step", 0)],
)
def test_what_is_set_later_is_checked_too(name, value):
    with pytest.raises(traitlets.TraitError, match=name):
        setattr(BatchScheduler([(1, "A", 2, 2)], "x"), name, value)


def test_requests_are_sorted_by_arrival_and_numpy_counts_are_taken():
    rows = [(np.int64(4), "B", 2, 3), (2, None, np.int32(7), 1)]
    widget = BatchScheduler(iter(rows), "x", np.int64(3))
    assert widget.requests == [[2, None, 7, 1], [4, "B", 2, 3]]
    json.dumps(stored(widget))


# In a page without a kernel


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    return write_page(folder, WIDGET, LARGE, WIDGET)


@pytest.fixture(scope="module")
def path_to_one(tmp_path_factory):
    return write_page(tmp_path_factory.mktemp("one"), WIDGET)


def by_script(page, settings):
    """Return what the script's ``schedule`` says of each setting."""
    text = page.evaluate(
        """async ([script, settings]) => {
          const blob = new Blob([script], { type: "text/javascript" });
          const { schedule } = await import(URL.createObjectURL(blob));
          return JSON.stringify(settings.map(schedule));
        }""",
        [WIDGET._esm, settings],
    )
    return json.loads(text)  # as a string: playwright is slow with objects


@pytest.mark.parametrize("sizes", WORKLOADS)
def test_the_script_too_is_what_the_engine_does(page, traces, sizes):
    setting = dict(requests=WORKLOADS[sizes], plans=PLANS, policy="continuous")
    setting |= dict(maxRows=sizes[0], maxAdapters=sizes[1])
    steps = counted(by_script(page, [setting])[0])
    keys = list(traces[sizes][0])
    assert [{k: now[k] for k in keys} for now in steps] == traces[sizes]


def test_the_script_schedules_as_python_does(page):
    workloads = [
        *WORKLOADS.values(),
        *(workload(seed, n=24, adapters=7) for seed in range(10, 16)),
    ]
    grid = list(product(workloads, (1, 4, 9), (1, 3, 8), POLICIES))
    found = by_script(
        page,
        [
            {
                "requests": requests,
                "maxRows": rows,
                "maxAdapters": slots,
                "policy": policy,
                "plans": PLANS,
            }
            for requests, rows, slots, policy in grid
        ],
    )
    plans = set()
    for setting, steps in zip(grid, found, strict=True):
        expected = schedule(*setting)
        keys = list(expected[0])
        assert [{k: now[k] for k in keys} for now in steps] == expected
        plans |= {now["plan"] for now in expected}
    assert len(grid) == 162 and plans == {None, "base", "segments", "slots"}


def show(widget, step):
    """Move the slider of a widget to a step."""
    widget.locator("input[type=range]").fill(str(step))
    return widget.locator("output").first.inner_text()


def spoken(requests, n):
    name = requests[n][1]
    names = sorted({r[1] for r in requests} - {None})
    return f"{n} ({'base' if name is None else chr(65 + names.index(name))})"


@pytest.mark.parametrize("which", [0, 1])
def test_the_sentence_says_who_joins_decodes_leaves_and_waits(page, which):
    widget = page.locator(".lfs").nth(which)
    python = (WIDGET, LARGE)[which]
    trace, requests = python.trace(), python.requests
    said = widget.locator("output").first
    assert said.get_attribute("aria-live") == "polite"
    reasons = set()
    for now in trace:
        text = show(widget, now["step"])
        assert text.startswith(f"Step {now['step']} of {len(trace)}. ")
        for n, _, _ in now["joined"]:
            assert spoken(requests, n) in text.split(" join")[0]
        assert ("prefill" in text) == bool(now["joined"])
        useful, padded = now["prefill_tokens"]
        if padded > useful:
            assert f"{useful} tokens and {padded - useful} of padding" in text
        for n in now["left"]:
            assert spoken(requests, n) in text.split("complete")[0]
        n_decoded = len(decoded_of(now))
        if n_decoded:
            assert f" {n_decoded} row" in text
        if now["runs"]:
            assert f"in {now['runs']} run" in text
        assert ("evicted" in text) == bool(now["evicted"])
        assert (" waits" in text) == bool(now["waiting"])
        assert ("Nothing to do" in text) == (not now["rows"])
        reasons |= {w for w in ("no row is free", "every slot") if w in text}
    assert reasons == {"no row is free", *["every slot"] * (which == 0)}


def test_queue_and_slots_are_listed(page):
    widget = page.locator(".lfs").first
    names = WIDGET.adapters
    letters = {name: chr(65 + names.index(name)) for name in names}
    letters[None] = "–"
    before = [None, None]
    seen = set()
    for now in WIDGET.trace():
        show(widget, now["step"])
        queue = widget.locator(".sch-queue")
        assert queue.locator(".sch-tag").count() == now["waiting"]
        places = widget.locator(".sch-slots li")
        chips = places.locator(".sch-chip").all_inner_texts()
        assert chips == [letters[name] for name in now["slots"] if name]
        items = places.all_inner_texts()
        for item, name, old in zip(items, now["slots"], before, strict=True):
            users = sum(row[1] == name for row in now["rows"])
            if name is None:
                assert item.endswith("free")
                continue
            assert (f"{users} row" in item) == bool(users)
            assert ("idle" in item) == (not users)
            if old not in (name, None) and users:
                assert item.endswith(f"took the place of {letters[old]}")
                seen.add("evicted")
        before = now["slots"]
    assert seen == {"evicted"}


def test_a_title_and_an_adapter_are_text_and_not_markup(page):
    widget = page.locator(".lfs").first
    assert widget.locator(".lfs-title").inner_text() == "<i>16</i> requests"
    names = widget.locator(".sch-add button").all_inner_texts()
    assert any("<kjv>" in name for name in names)


def test_the_drawing_has_a_square_for_every_row_of_every_step(page):
    widget = page.locator(".lfs").first
    trace = WIDGET.trace()
    step = next(now for now in trace if len(now["joined"]) and now["runs"])
    show(widget, step["step"])
    svg = widget.locator("svg")
    heads = svg.locator(".sch-head").all_text_contents()
    assert heads[0] == f"decode, plan: {step['plan']}"
    useful, padded = step["prefill_tokens"]
    assert heads[1] == f"prefill: {useful} of {padded} tokens are useful"
    first, last = map(
        int, heads[2].removeprefix("the batch in steps ").split(" to ")
    )
    shown = [now for now in trace if first <= now["step"] <= last]
    assert step in shown and len(shown) > 20
    letters = svg.locator(".sch-letter, .sch-none").all_text_contents()
    expected = [row[1] for row in step["rows"]]
    expected += [row[1] for now in shown for row in now["rows"]]
    names = WIDGET.adapters
    assert letters == [
        "–" if name is None else chr(65 + names.index(name))
        for name in expected
    ]
    label = svg.get_attribute("aria-label")
    assert label.startswith(f"The batch in step {step['step']}: request ")
    assert label.count("request ") == len(step["rows"])


def test_the_table_holds_every_request(page):
    widget = page.locator(".lfs").nth(1)
    show(widget, 9)
    head, *rows = table(widget)
    assert len(head) == 8 and len(rows) == len(LARGE.requests) == 32
    trace = LARGE.trace()
    joins = {n: now["step"] for now in trace for n, _, _ in now["joined"]}
    ends = {n: now["step"] for now in trace for n in now["left"]}
    for n, ((arrival, name, prompt, new), row) in enumerate(
        zip(LARGE.requests, rows, strict=True)
    ):
        assert row[0] == str(n)
        assert row[1].endswith("base model" if name is None else name)
        numbers = [arrival, prompt, new, joins[n], joins[n] - arrival, ends[n]]
        assert row[2:] == list(map(str, numbers))
    here = widget.locator("tr.lfs-here th").all_inner_texts()
    running = [n for n, _, _ in trace[8]["rows"]]
    assert sorted(map(int, here)) == sorted(running)


def test_the_two_policies_are_compared(page):
    widget = page.locator(".lfs").first
    said = widget.locator("output").last
    steps = []
    for policy in POLICIES:
        trace = schedule(WIDGET.requests, 5, 2, policy)
        rows = sum(len(now["rows"]) for now in trace)
        busy = sum(bool(now["rows"]) for now in trace)
        assert f"{100 * rows / busy / 5:.0f} %" in said.inner_text()
        steps.append(len(trace))
    text = said.inner_text()
    assert text.startswith(f"All 16 answers take {steps[0]} steps if ")
    assert f"and {steps[1]} if they join an empty batch only" in text
    widget.get_by_label("requests join").select_option("static")
    assert said.inner_text() == text
    assert f"of {steps[1]}" in widget.locator("output").first.inner_text()


def test_keys_alone_reach_every_control(page):
    widget = page.locator(".lfs").first
    controls = widget.locator("select, button, input").all()
    assert len(controls) == 3 + 4 + 1 + 2 + 5
    controls[0].focus()
    for control in controls:
        assert control.evaluate("e => e === document.activeElement")
        page.keyboard.press("Tab")
    slider = widget.get_by_label("step", exact=False).first
    n = len(WIDGET.trace())
    said = widget.locator("output").first
    for key, step in [("End", n), ("ArrowLeft", n - 1), ("Home", 1)]:
        slider.press(key)
        assert slider.get_attribute("aria-valuetext") == f"{step} of {n}"
        assert said.inner_text().startswith(f"Step {step} of {n}.")
    for name, choice in [("rows of the batch", "9"), ("adapter slots", "4")]:
        before = widget.inner_text()
        widget.get_by_label(name).select_option(choice)
        assert widget.inner_text() != before
    n = len(schedule(WIDGET.requests, 9, 4))
    assert said.inner_text().startswith(f"Step 1 of {n}.")


def test_buttons_step_and_stop_at_both_ends(page):
    widget = page.locator(".lfs").first
    said = widget.locator("output").first
    n = len(WIDGET.trace())
    back, step = (
        widget.get_by_role("button", name=name) for name in ("Back", "Step")
    )
    assert back.get_attribute("aria-disabled") == "true"
    back.click(force=True)
    assert said.inner_text().startswith("Step 1 of")
    step.press("Enter")
    step.click()
    assert said.inner_text().startswith("Step 3 of")
    back.click()
    assert said.inner_text().startswith("Step 2 of")
    show(widget, n)
    assert step.get_attribute("aria-disabled") == "true"
    step.click(force=True)
    assert said.inner_text().startswith(f"Step {n} of")
    widget.get_by_role("button", name="Reset").click()
    assert said.inner_text().startswith("Step 1 of")


def test_it_plays_pauses_and_stops_at_the_end(page):
    page.clock.install(time=datetime(2026, 1, 1))
    page.clock.pause_at(datetime(2026, 1, 2))
    widget = page.locator(".lfs").first
    said = widget.locator("output").first
    play = widget.get_by_role("button", name="Play")
    n = len(WIDGET.trace())
    play.click()
    page.clock.run_for(2500)
    assert said.inner_text().startswith("Step 3 of")
    assert said.get_attribute("aria-live") == "off"  # not a word a second
    widget.get_by_role("button", name="Pause").click()
    page.clock.run_for(5000)
    assert said.inner_text().startswith("Step 3 of")
    assert said.get_attribute("aria-live") == "polite"
    play.click()
    page.clock.run_for(1000 * n)
    assert said.inner_text().startswith(f"Step {n} of")
    play.click()  # again from the start
    page.clock.run_for(1000)
    assert said.inner_text().startswith("Step 2 of")
    widget.get_by_role("button", name="Step").click()  # takes over
    page.clock.run_for(5000)
    assert said.inner_text().startswith("Step 3 of")


def test_a_request_can_be_added_and_taken_back(page):
    widget = page.locator(".lfs").first
    given = [tuple(request) for request in WIDGET.requests]
    show(widget, 6)
    widget.get_by_label("prompt tokens").fill("600")
    widget.get_by_label("new tokens").fill("9")
    name = WIDGET.adapters[2]
    widget.locator(".sch-add button").nth(2).click()
    assert widget.get_by_label("prompt tokens").input_value() == "512"
    widget.get_by_role("button", name="base model").click()
    added = sorted(
        [*enumerate([*given, (7, name, 512, 9), (7, None, 512, 9)])],
        key=lambda item: item[1][0],
    )
    trace = schedule([request for _, request in added], 5, 2)
    numbers = [n for n, _ in added]
    rows = table(widget)[1:]
    for now in trace:
        for n, _, _ in now["joined"]:
            assert rows[numbers[n]][5] == str(now["step"])
    assert widget.locator("output").first.inner_text().startswith("Step 6 of")
    widget.get_by_role("button", name="Reset").click()
    assert len(table(widget)) == 17


def test_no_more_than_64_requests(page):
    widget = page.locator(".lfs").nth(1)
    add = widget.get_by_role("button", name="base model")
    add.evaluate("button => Array.from({ length: 33 }, () => button.click())")
    assert len(table(widget)) == 65
    assert add.get_attribute("aria-disabled") == "true"


def test_a_click_on_a_column_shows_its_step(page):
    widget = page.locator(".lfs").first
    svg = widget.locator("svg")
    column = svg.locator(".sch-small", has_text="9").first
    column.scroll_into_view_if_needed()
    box = column.bounding_box()
    x = box["x"] + box["width"] / 2
    page.mouse.click(x, box["y"] + box["height"] + 10)
    said = widget.locator("output").first
    assert said.inner_text().startswith("Step 9 of")
    page.mouse.click(x + 22, box["y"] + 70)
    assert said.inner_text().startswith("Step 10 of")
    top = svg.bounding_box()["y"]
    page.mouse.click(x, top + 30)  # the rows above are no columns
    assert said.inner_text().startswith("Step 10 of")


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    first, _, third = page.locator(".lfs").all()
    show(first, 8)
    first.get_by_label("rows of the batch").select_option("4")
    assert first.inner_text() == third.inner_text()
    assert third.locator("output").first.inner_text().startswith("Step 8 of")
    ids = ids_of(page)
    assert len(ids) == len(set(ids)) == 18


@pytest.mark.parametrize(
    ("width", "scheme"), [(1280, "light"), (1280, "dark"), (320, "light")]
)
def test_axe_finds_nothing_and_nothing_sticks_out(
    browser, path_to_one, scheme, width
):
    size = {"width": width, "height": 900}
    with opened(
        browser, path_to_one, color_scheme=scheme, viewport=size
    ) as page:
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth") == width
        inside = page.locator(".lfs").bounding_box()["width"]
        for text in page.locator("svg text").all():
            box = text.bounding_box()
            assert 0 <= box["x"] and box["x"] + box["width"] <= inside + 20
