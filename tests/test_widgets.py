"""Tests for lora_from_scratch/widgets and book/static/widgets.js."""

import base64
import html
import http.server
import io
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from functools import partial

import nbformat
import numpy as np
import pytest
import torch
import traitlets
from axe_playwright_python.base import AXE_SCRIPT
from nbformat.sign import NotebookNotary
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from playwright.sync_api import expect
from widget_pages import DARK, LOADER, MIME, requests_of, stored, write_page

from lora_from_scratch.spectrum import break_even_rank, energy
from lora_from_scratch.widgets import (
    AblationExplorer,
    MemoryCalculator,
    RankExplorer,
    VariantDiagram,
)
from lora_from_scratch.widgets.rank_explorer import (
    BYTES,
    LEVELS,
    _errors,
    _window,
)

M, N = 37, 52  # no two alike


def noise(m=M, n=N, seed=0):
    return np.random.default_rng(seed).normal(size=(m, n))


def picture(m=M, n=N):
    """Return grey values 0..255 with edges, slopes and some grain."""
    y, x = np.mgrid[0:m, 0:n]
    disc = (y - m / 2) ** 2 + (x - n / 3) ** 2 < (m / 4) ** 2
    grain = np.random.default_rng(0).uniform(0, 20, (m, n))
    return np.rint((80 + 100 * disc + 2 * x * y / n + grain).clip(0, 255))


def update(d=256):
    """Return a (d, d) matrix with the falling spectrum of a real update."""
    U, _, Vt = np.linalg.svd(noise(d, d))
    return (U * (0.01 / np.arange(1, d + 1))) @ Vt


def state_of(widget):
    """Return the values and the decoded bytes that a page stores."""
    model = stored(widget)["state"][widget.model_id]
    buffers = {b["path"][0]: b["data"] for b in model["buffers"]}
    values = {k: v for k, v in model["state"].items() if k != "layout"}
    return values, {k: base64.b64decode(v) for k, v in buffers.items()}


GREY = RankExplorer(picture(), label="a <b>disc</b>", r=8)
SIGNED = RankExplorer(noise(200, 300), label="noise", r=8, max_r=40)


# The numbers


@pytest.mark.parametrize("r", [1, 2, 8, M])
def test_error_and_energy_are_those_of_the_truncated_svd(r):
    W = noise()
    U, s, Vt = np.linalg.svd(W)
    W_r = (U[:, :r] * s[:r]) @ Vt[:r]
    measured = np.linalg.norm(W - W_r) / np.linalg.norm(W)
    error = RankExplorer(W, label="noise").error
    assert error[r] == pytest.approx(measured, abs=1e-5)
    kept = energy(torch.linalg.svdvals(torch.tensor(W)))[r - 1]
    assert 1 - error[r] ** 2 == pytest.approx(float(kept), abs=3e-5)


def test_errors_survive_huge_and_tiny_matrices():
    s = np.array([3.0, 2.0, 1.0])
    for scale in (1e-200, 1.0, 1e200):
        assert _errors(s * scale) == pytest.approx(_errors(s))


@pytest.mark.parametrize("matrix", [picture(), noise(), update(64)])
@pytest.mark.parametrize("r", [1, 5, 30])
def test_the_bytes_give_the_truncated_svd_back(matrix, r):
    U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
    expected = (U[:, :r] * s[:r]) @ Vt[:r]
    drawn = RankExplorer(matrix, label="x", r=r).approximation()
    assert np.linalg.norm(drawn - expected) < 0.01 * np.linalg.norm(matrix)
    low, high = matrix.min(), matrix.max()
    assert np.abs(drawn - expected).max() < 0.03 * (high - low)


def test_the_curve_goes_past_break_even():
    for m, n in [(96, 144), (256, 256), (16, 1024)]:
        error = RankExplorer(noise(m, n), label="x").error
        assert len(error) - 1 >= min(m, n, break_even_rank(m, n))


def test_of_a_large_matrix_a_part_is_drawn_and_all_is_measured():
    W = noise(200, 300)
    widget = RankExplorer(W, label="large", r=3)
    h, w = widget.drawn
    assert h < 200 and w < 300
    U, s, Vt = np.linalg.svd(W, full_matrices=False)
    expected = ((U[:, :3] * s[:3]) @ Vt[:3])[:h, :w]
    assert np.abs(widget.approximation() - expected).max() < 0.02
    left = np.sqrt((s[3:] ** 2).sum() / (s**2).sum())
    assert widget.error[3] == pytest.approx(left, abs=1e-5)


@pytest.mark.parametrize("max_r", [1, 7, 64])
@pytest.mark.parametrize(
    "shape", [(96, 144), (256, 256), (4096, 64), (8, 9000), (1, 1), (2000, 1)]
)
def test_what_is_drawn_fits_and_is_not_cut_without_need(shape, max_r):
    max_r = min(max_r, *shape)
    h, w = _window(*shape, max_r)

    def cost(h, w):
        return h * w + max_r * (h + w)

    assert 1 <= h <= shape[0] and 1 <= w <= shape[1]
    assert cost(h, w) <= BYTES
    if (h, w) != shape:
        assert cost(h + 1, w + 1) > BYTES
        assert h >= min(64, shape[0]) and w >= min(64, shape[1])


def test_a_picture_of_96_by_144_is_drawn_whole():
    assert RankExplorer(picture(96, 144), label="x").drawn == [96, 144]


def test_zero_is_the_middle_colour_of_a_signed_matrix():
    W = noise()
    W[4, 7] = 0.0
    widget = RankExplorer(W, label="signed")
    levels = np.frombuffer(widget.original, np.uint8).reshape(M, N)
    assert widget.signed
    assert levels[4, 7] == LEVELS / 2
    assert widget.limits[0] == -widget.limits[1]
    assert ((levels > LEVELS / 2) <= (W > 0)).all()


def test_a_picture_is_grey_from_its_darkest_to_its_brightest_value():
    widget = RankExplorer(picture(), label="grey")
    assert not widget.signed
    assert widget.limits == [picture().min(), picture().max()]


@pytest.mark.parametrize("value", [0.3, 1, 200])
def test_a_constant_matrix_can_be_shown(value):
    widget = RankExplorer(np.full((4, 6), value), label="constant")
    assert widget.error[1] == 0
    assert np.isfinite(widget.approximation()).all()


def test_a_tensor_in_training_can_be_shown():
    W = torch.tensor(noise(), dtype=torch.bfloat16, requires_grad=True)
    widget = RankExplorer(W, label="tensor", r=3)
    same = RankExplorer(W.detach().double().numpy(), label="tensor", r=3)
    assert state_of(widget) == state_of(same)


# What a notebook stores


def test_text_is_stable_and_says_what_is_shown():
    texts = {repr(RankExplorer(noise(), label="noise", r=3)) for _ in range(2)}
    assert texts == {"RankExplorer('noise', shape=(37, 52), r=3)"}


def test_state_does_not_depend_on_the_signs_an_svd_happens_to_return(
    monkeypatch,
):
    before = state_of(RankExplorer(noise(), label="x"))
    svd = np.linalg.svd

    def other_signs(W, full_matrices):
        U, s, Vt = svd(W, full_matrices=full_matrices)
        sign = np.where(np.arange(len(s)) % 3, -1.0, 1.0)
        return U * sign, s, Vt * sign[:, None]

    monkeypatch.setattr(np.linalg, "svd", other_signs)
    assert state_of(RankExplorer(noise(), label="x")) == before


@pytest.mark.parametrize("matrix", [picture(), noise(), noise() @ noise().T])
def test_rounding_on_another_processor_hardly_moves_the_state(matrix):
    values, data = state_of(RankExplorer(matrix, label="x"))
    other = matrix * (1 + 1e-13 * noise(*matrix.shape, seed=1))
    new_values, new_data = state_of(RankExplorer(other, label="x"))
    for key in ("error", "scale", "limits"):
        assert new_values[key] == pytest.approx(values[key], rel=1e-3)
    for key, old in data.items():
        a = np.frombuffer(old, np.int8).astype(int)
        b = np.frombuffer(new_data[key], np.int8).astype(int)
        assert np.abs(a - b).max() <= 1, key


def test_directions_beyond_the_rank_are_zeros_not_rounding_errors():
    W = (noise(M, 4) @ noise(4, N)).astype(np.float32)  # rank 4
    widget = RankExplorer(W, label="rank 4")
    left = np.frombuffer(widget.left, np.int8).reshape(-1, M)
    assert np.abs(left[3]).max() == 127
    assert not left[4:].any()
    assert set(widget.error[4:]) == {0.0}


@pytest.mark.parametrize(
    "shape", [(96, 144), (256, 256), (768, 256), (64, 1024)]
)
def test_a_widget_adds_at_most_60_kB_to_a_page(shape):
    widget = RankExplorer(noise(*shape), label="a matrix", r=8)
    assert len(json.dumps(stored(widget))) <= 60_000


def test_where_no_script_runs_there_is_a_picture_with_its_text():
    widget = RankExplorer(picture(), label="a disc", r=4)
    data, metadata = widget._repr_mimebundle_()
    file = io.BytesIO(base64.b64decode(data["image/png"]))
    pixels = np.asarray(Image.open(file).convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels)) > 100
    assert len(file.getvalue()) < 80_000
    assert data["text/plain"] == repr(widget)
    assert data[f"{MIME}view+json"]["model_id"] == widget.model_id
    alt = metadata["image/png"]["alt"]
    e = widget.error[4]
    for words in ("a disc", "rank 4", f"{4 * (M + N)} numbers", f"{e:.1%}"):
        assert words in alt
    widget.r = 9  # the picture follows
    assert widget._repr_mimebundle_()[0]["image/png"] != data["image/png"]


def test_the_script_asks_for_nothing():
    assert requests_of(RankExplorer) == []


# Bad input


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones(5), r"2 axes, got shape \(5,\)"),
        (np.ones((3, 4, 5)), r"2 axes, got shape \(3, 4, 5\)"),
        (3.0, r"2 axes, got shape \(\)"),
        (np.ones((0, 4)), r"empty, its shape is \(0, 4\)"),
        (np.array([[1.0, np.nan], [np.inf, 2.0]]), "2 NaN or infinite"),
        (np.zeros((3, 4)), "all zeros"),
        (np.ones((3, 4), dtype=complex), "real numbers, got complex128"),
        ([["a", "b"]], "real numbers, got <U1"),
    ],
)
def test_a_wrong_matrix_is_named(matrix, message):
    with pytest.raises(ValueError, match=message):
        RankExplorer(matrix, label="wrong")


@pytest.mark.parametrize("r", [0, -1, M + 1, 2.0, "3", None])
def test_r_outside_the_slider_is_an_error(r):
    with pytest.raises(ValueError, match=f"int in 1..{M}, got {r}"):
        RankExplorer(noise(), label="x", r=r)


@pytest.mark.parametrize("max_r", [0, 2.5])
def test_a_wrong_end_of_the_slider_is_an_error(max_r):
    with pytest.raises(ValueError, match=f"max_r .* got {max_r}"):
        RankExplorer(noise(), label="x", max_r=max_r)


def test_a_widget_needs_a_label():
    with pytest.raises(ValueError, match="label"):
        RankExplorer(noise(), label="")


def test_r_cannot_be_set_past_the_slider():
    widget = RankExplorer(noise(), label="x", max_r=10)
    with pytest.raises(traitlets.TraitError, match=r"in 1..10, got 11"):
        widget.r = 11
    assert widget.r == 1


# In a page without a kernel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A page as myst-nb makes it: stored state, markers, the loader."""
    folder = tmp_path_factory.mktemp("page")
    state = stored(GREY, SIGNED)
    broken = json.loads(json.dumps(state["state"][GREY.model_id]))
    broken["state"]["_esm"] = "export default { render() { thing() } }"
    state["state"]["broken"] = broken
    state["state"]["stock"] = {
        "model_module": "@jupyter-widgets/controls",
        "model_name": "IntSliderModel",
        "state": {},
    }
    ids = [GREY.model_id, SIGNED.model_id, GREY.model_id, "broken", "stock"]
    views = "".join(
        f'<script type="{MIME}view+json">{{"model_id": "{id}"}}</script>'
        for id in ids
    )
    text = json.dumps(state).replace("</", "<\\/")
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8">
        <meta name="viewport" content="width=device-width">
        <title>Widgets</title><script defer src="widgets.js"></script>
        <style>{DARK}</style>
        </head><body><main><h1>Widgets</h1>{views}</main>
        <script type="{MIME}state+json">{text}</script></body></html>"""
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "widgets.js").write_bytes(LOADER.read_bytes())
    return folder


@pytest.fixture(scope="module")
def address(folder):
    return (folder / "page.html").as_uri()


def opened(browser, address, **options):
    """Return the page with its widgets drawn; it may reach nothing else."""
    page = browser.new_page(**options)
    page.set_default_timeout(10_000)
    page.outside, page.errors = [], []
    root = address.rpartition("/")[0]

    def gate(route):
        if route.request.url.startswith(root):
            route.continue_()
        elif route.request.url.endswith("/favicon.ico"):
            route.fulfill(status=204)
        else:
            page.outside.append(route.request.url)
            route.abort()

    page.route(re.compile("^(http|file)"), gate)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(address)
    page.locator(".lfs output").nth(2).wait_for()
    page.get_by_role("alert").wait_for()
    return page


@pytest.fixture
def page(browser, address):
    page = opened(browser, address)
    yield page
    assert page.outside == [] and page.errors == []
    page.close()


def sentence(r, widget):
    """Return how the sentence of a widget begins at rank ``r``."""
    m, n = widget.shape
    return f"Rank {r} stores {r * (m + n):,} of {m * n:,} numbers"


def test_keys_move_the_slider_and_change_the_sentence(page):
    said = page.locator(".lfs output").nth(1)
    assert said.get_attribute("aria-live") == "polite"
    assert said.inner_text().startswith(sentence(8, SIGNED))
    page.get_by_label("rank r").nth(1).focus()
    for key, r in [
        ("ArrowRight", 9),
        ("ArrowUp", 10),
        ("ArrowLeft", 9),
        ("ArrowDown", 8),
        ("Home", 1),
        ("ArrowLeft", 1),
        ("End", 40),
        ("ArrowRight", 40),
    ]:
        page.keyboard.press(key)
        assert said.inner_text().startswith(sentence(r, SIGNED)), key
    page.keyboard.press("PageDown")
    lower = page.get_by_label("rank r").nth(1).input_value()
    assert int(lower) < 39
    page.keyboard.press("PageUp")
    assert said.inner_text().startswith(sentence(40, SIGNED))
    e = SIGNED.error[40]
    assert f"{100 * (1 - e**2):.1f} % of the energy" in said.inner_text()
    assert f"relative error {100 * e:.1f} %." in said.inner_text()


def test_mouse_and_buttons_move_the_slider(page):
    widget = page.locator(".lfs").nth(1)
    said, slider = widget.locator("output"), widget.get_by_label("rank r")
    widget.get_by_role("button", name="rank + 1").click()
    assert said.inner_text().startswith(sentence(9, SIGNED))
    assert slider.input_value() == "9"
    widget.get_by_role("button", name="rank − 1").click()
    assert said.inner_text().startswith(sentence(8, SIGNED))
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    page.mouse.up()
    assert said.inner_text().startswith(sentence(40, SIGNED))
    more = widget.get_by_role("button", name="rank + 1")
    assert more.get_attribute("aria-disabled") == "true"
    more.click(force=True)
    assert slider.input_value() == "40"


def test_it_works_from_a_server_too(browser, folder):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/page.html"
        page = opened(browser, address)
        page.get_by_label("rank r").nth(1).press("End")
        said = page.locator(".lfs output").nth(1).inner_text()
        assert said.startswith(sentence(40, SIGNED))
        assert page.outside == [] and page.errors == []
        page.close()
        server.shutdown()


def test_a_finger_on_a_phone_moves_the_slider(browser, address):
    page = opened(
        browser,
        address,
        has_touch=True,
        is_mobile=True,
        viewport={"width": 390, "height": 800},
    )
    widget = page.locator(".lfs").first
    widget.get_by_role("button", name="rank + 1").tap()
    assert widget.locator("output").inner_text().startswith(sentence(9, GREY))
    slider = widget.get_by_label("rank r")
    slider.tap()
    assert 15 < int(slider.input_value()) < 23  # the middle of 1..37
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.close()


@pytest.mark.parametrize(
    ("number", "widget", "matrix"),
    [(0, GREY, picture()), (1, SIGNED, noise(200, 300))],
    ids=["grey", "signed"],
)
def test_the_canvas_shows_the_truncated_svd(page, number, widget, matrix):
    page.get_by_label("rank r").nth(number).fill("13")
    shown = (
        page.locator(".lfs")
        .nth(number)
        .evaluate(
            """(el) => [...el.querySelectorAll("figure canvas")].map(
              (canvas) => canvas.toDataURL("image/png").split(",")[1])"""
        )
    )
    original, drawn = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(png))), dtype=int)
        for png in shown
    )
    h, w = widget.drawn
    assert original.shape == drawn.shape == (h, w, 4)
    low, high = widget.limits
    levels = np.frombuffer(widget.original, np.uint8).reshape(h, w)
    U, s, Vt = np.linalg.svd(matrix, full_matrices=False)
    W_13 = ((U[:, :13] * s[:13]) @ Vt[:13])[:h, :w]
    expected = (LEVELS * (W_13 - low) / (high - low)).clip(0, LEVELS)
    red, blue = drawn[..., 0], drawn[..., 2]
    if widget.signed:
        assert (red > blue)[expected > 131].all()
        assert (red < blue)[expected < 123].all()
        assert (original[levels == 127][:, :3] == 247).all()  # zero
    else:
        grey = 255 / LEVELS
        assert np.abs(red - expected * grey).mean() < 1
        assert np.abs(red - expected * grey).max() < 4
        assert np.abs(original[..., 0] - levels * grey).max() <= 1
        assert (red == blue).all()


def test_two_views_of_one_model_move_together_and_share_no_id(page):
    page.get_by_label("rank r").first.press("End")
    said = page.locator(".lfs output").all_inner_texts()
    assert said[0] == said[2] != said[1]
    assert f"more than the {M * N:,} of the matrix" in said[0]
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)) >= 3


def test_the_table_holds_the_same_numbers(page):
    widget = page.locator(".lfs").nth(1)
    widget.get_by_text("Show the numbers as a table").click()
    rows = [
        row.locator("th, td").all_inner_texts()
        for row in widget.locator("tbody tr").all()
    ]
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    e = SIGNED.error[4]
    kept, lost = f"{100 * (1 - e**2):.1f} %", f"{100 * e:.1f} %"
    assert rows[2] == ["4", kept, lost, "2,000", "3 %"]
    chart = widget.locator("svg").inner_html()
    assert "break-even at r = 120:" in chart  # 200 * 300 / 500


def test_a_label_is_text_and_not_markup(page):
    title = page.locator(".lfs-title").first
    assert title.inner_text() == "a <b>disc</b>"
    assert html.escape("<b>") in title.inner_html()


def test_what_cannot_start_says_so_and_stops_nothing_else(page):
    assert "thing is not defined" in page.get_by_role("alert").inner_text()
    assert page.get_by_text("This output needs a running notebook.").count()
    assert page.locator(".lfs output").count() == 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(browser, address, scheme, width):
    page = opened(
        browser,
        address,
        color_scheme=scheme,
        viewport={"width": width, "height": 900},
    )
    page.locator("summary").nth(1).click()
    page.evaluate(AXE_SCRIPT)
    found = page.evaluate("axe.run('main', { preload: false })")
    assert [v["help"] for v in found["violations"]] == []
    assert len(found["passes"]) > 10
    page.close()


def test_a_drawing_is_made_for_the_width_it_has(browser, tmp_path):
    rows = [{"lr": lr, "seed": 0, "test_loss": lr} for lr in (0.1, 0.2)]
    widgets = (
        GREY,
        MemoryCalculator(),
        VariantDiagram(),
        AblationExplorer(rows, x="lr", lines=(), label="two runs"),
    )
    for width in (360, 800):  # one unit is one pixel, so text keeps its size
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.goto(write_page(tmp_path, *widgets).as_uri())
        page.locator(".lfs output").nth(len(widgets) - 1).wait_for()
        for widget in page.locator(".lfs").all():
            drawing = widget.locator("svg[viewBox]").last
            expect(drawing).to_have_attribute(
                "viewBox", re.compile(f"^0 0 {drawn(drawing)} ")
            )
        page.close()


def drawn(element):
    """Return the width of an element on the page, in whole pixels."""
    return round(element.bounding_box()["width"])


# In JupyterLab


@pytest.fixture
def lab(tmp_path):
    """A JupyterLab with a notebook to run and one with stored state."""
    metadata = {
        "kernelspec": {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
    }
    cells = (
        "import numpy as np\n"
        "from lora_from_scratch.widgets import RankExplorer\n"
        "W = np.random.default_rng(0).normal(size=(200, 300))\n"
        "widget = RankExplorer(W, label='noise', r=8, max_r=40)\n"
        "widget",
        "print('r in Python:', widget.r)",
        "widget.r = 20",
    )
    live = new_notebook(cells=[new_code_cell(c) for c in cells])
    view, _ = SIGNED._repr_mimebundle_()
    output = new_output("execute_result", data=view, execution_count=1)
    cell = new_code_cell("SIGNED", outputs=[output], execution_count=1)
    restored = new_notebook(cells=[cell])
    restored.metadata["widgets"] = {f"{MIME}state+json": stored(SIGNED)}
    (tmp_path / "notebooks").mkdir()
    notary = NotebookNotary(data_dir=str(tmp_path))
    for name, nb in (("live", live), ("stored", restored)):
        nb.metadata.update(metadata)
        nb = nbformat.from_dict(json.loads(json.dumps(nb)))
        nbformat.write(nb, tmp_path / "notebooks" / f"{name}.ipynb")
        notary.sign(nb)  # what `jupyter trust` does
    notary.store.close()

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    names = ("DATA", "CONFIG", "RUNTIME")
    log = (tmp_path / "log").open("w+")
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser"),
            *("--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1"),
            *(f"--port={port}", "--ServerApp.port_retries=0"),
            f"--IdentityProvider.token={token}",
            f"--ServerApp.root_dir={tmp_path / 'notebooks'}",
        ],
        env={
            **os.environ,
            **{f"JUPYTER_{name}_DIR": str(tmp_path) for name in names},
            "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
        },
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        root = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{root}/api?token={token}", timeout=5)
                break
            except OSError:
                if server.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    pytest.fail(f"JupyterLab did not start:\n{log.read()}")
                time.sleep(0.2)
        # A workspace each, or the second page would open the first as well.
        yield (
            lambda name: (
                f"{root}/lab/workspaces/{name}/tree/{name}.ipynb?token={token}"
            )
        )
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()
        log.close()


@pytest.mark.slow
def test_in_jupyterlab_live_and_from_stored_state(browser, lab):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.set_default_timeout(60_000)
    said, slider = page.locator(".lfs output"), page.get_by_label("rank r")
    outside = []
    page.route(
        re.compile(r"^https?://(?!127\.0\.0\.1)"),
        lambda route: (outside.append(route.request.url), route.abort()),
    )

    page.goto(lab("stored"))  # nothing is run here
    said.wait_for()
    assert said.inner_text().startswith(sentence(8, SIGNED))
    slider.press("ArrowRight")
    assert said.inner_text().startswith(sentence(9, SIGNED))

    page.goto(lab("live"))
    page.wait_for_function(
        "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session"
        "?.kernel?.status === 'idle'"
    )

    def run(cell):
        page.evaluate(
            """async (cell) => {
              const { shell, commands } = window.jupyterapp;
              shell.currentWidget.content.activeCellIndex = cell;
              await commands.execute("notebook:run-cell");
            }""",
            cell,
        )

    run(0)
    said.wait_for()
    assert said.inner_text().startswith(sentence(8, SIGNED))
    slider.press("ArrowRight")  # JupyterLab has its own use for this key
    assert said.inner_text().startswith(sentence(9, SIGNED))
    slider.press("End")
    assert said.inner_text().startswith(sentence(40, SIGNED))
    page.get_by_role("button", name="rank − 1").click()
    assert said.inner_text().startswith(sentence(39, SIGNED))
    box = slider.bounding_box()
    page.mouse.click(box["x"] + 1, box["y"] + box["height"] / 2)
    assert said.inner_text().startswith(sentence(1, SIGNED))
    run(1)
    page.get_by_text("r in Python: 1", exact=True).wait_for()
    run(2)
    page.get_by_text(sentence(20, SIGNED)).wait_for()
    assert outside == []
    page.close()
