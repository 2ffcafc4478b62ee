"""Tests for lora_from_scratch/widgets/diffusion_explorer.py and its script."""

import base64
import io

import numpy as np
import pytest
import torch
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

from lora_from_scratch.widgets import DiffusionExplorer

WEIGHTS, STOPS, HITS, N = [0, 0.5, 1], [20, 5, 1, 0], [0, 2, 5], 6
SETTINGS = dict(
    weights=WEIGHTS, stops=STOPS, hits=HITS, concept="a seven", label="Sevens"
)


def pictures():
    """Return pictures whose gray tells weight, stop and number."""
    grid = torch.zeros(len(WEIGHTS), len(STOPS), N, 4, 3)
    for i in range(len(WEIGHTS)):
        for j in range(len(STOPS)):
            for k in range(N):
                grid[i, j, k] = (20 * i + 5 * j + k) / 100
    return grid


@pytest.fixture
def widget():
    return DiffusionExplorer(pictures(), **SETTINGS)


def test_pixels_are_the_pictures_and_it_starts_at_the_trained_weight(widget):
    assert widget.shape == [3, 4, N, 4, 3]
    levels = np.frombuffer(widget.pixels, np.uint8).reshape(widget.shape)
    values = levels / 255 * 4 - 2
    assert np.abs(values - pictures().numpy()).max() < 0.01
    assert (widget.at_weight, widget.at_stop) == (2, 3)
    far = DiffusionExplorer(100 * pictures(), **SETTINGS)
    assert max(far.pixels) == 255


def test_text_and_stand_in_picture(widget):
    assert repr(widget) == (
        "DiffusionExplorer('Sevens', weights=3, stops=4, pictures=6)"
    )
    assert "weight 0.5: 2 of 6" in widget.alt()
    data, metadata = widget._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.width > 400 and metadata["image/png"]["alt"] == widget.alt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pictures": torch.zeros(3, 4, 6, 4)}, "must be"),
        ({"pictures": torch.zeros(3, 4, 0, 4, 3)}, "must be"),
        ({"pictures": pictures() * torch.nan}, "NaN"),
        ({"weights": [0, 1]}, "weights has 2 entries"),
        ({"stops": [0]}, "stops has 1 entries"),
        ({"hits": [1, 2, 3, 4]}, "hits has 4 entries"),
        ({"label": ""}, "must say"),
        ({"concept": ""}, "must say"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    with pytest.raises(ValueError, match=message):
        DiffusionExplorer(**{"pictures": pictures(), **SETTINGS, **change})


def test_it_asks_for_nothing_and_is_small(widget):
    assert requests_of(widget) == []
    assert len(str(stored(widget))) < 40_000


def grays(view):
    """Return the light of the first pixel of every picture."""
    return view.evaluate(
        "e => [...e.querySelectorAll('canvas')].map("
        "c => c.getContext('2d').getImageData(0, 0, 1, 1).data[0])"
    )


def test_two_sliders_on_a_page_without_a_kernel(browser, widget, tmp_path):
    path = write_page(
        tmp_path, widget, DiffusionExplorer(pictures(), **SETTINGS)
    )
    levels = np.frombuffer(widget.pixels, np.uint8).reshape(widget.shape)
    with opened(browser, path) as page:
        first = page.locator(".lfs").first
        weight, stop = first.locator("input[type=range]").all()
        said = first.locator("output")
        assert "Weight 1, finished" in said.inner_text()
        assert grays(first) == (255 - levels[2, 3, :, 0, 0]).tolist()
        weight.focus()
        page.keyboard.press("ArrowLeft")
        stop.focus()
        page.keyboard.press("Home")
        assert "Weight 0.5, 20 steps to go" in said.inner_text()
        assert "2 of these 6" in said.inner_text()
        assert weight.get_attribute("aria-valuetext") == "weight 0.5"
        assert grays(first) == (255 - levels[1, 0, :, 0, 0]).tolist()
        assert "Weight 1" in page.locator("output").last.inner_text()
        rows = table(first)
        assert rows[2] == ["0.5", "2 of 6"] and len(rows) == 4
        ids = ids_of(page)
        assert len(ids) == len(set(ids)) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width_and_no_barrier(browser, widget, tmp_path, scheme):
    path = write_page(tmp_path, widget)
    size = {"width": 360, "height": 800}
    with opened(browser, path, color_scheme=scheme, viewport=size) as page:
        assert violations(page) == []
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size["width"]
