"""Whether figures and widgets came out again, within a stated tolerance."""

import base64
import hashlib
import io

import numpy as np
from PIL import Image

from tools.notebooks import WIDGETS

# Another processor rounds differently, which moves the edge of a line by a
# fraction of a grey level. A curve that moves by 3 pixels is 5 times this.
PIXEL_TOLERANCE = 0.5 / 255  # mean absolute difference, channels in 0..1
NUMBER_TOLERANCE = 1e-3  # relative, for floats in the state of a widget
BYTE_TOLERANCE = 1  # per byte of a widget's binary data


def code_cells(nb):
    """Return the code cells of a notebook."""
    return [cell for cell in nb.cells if cell.cell_type == "code"]


def bundles(cell):
    """Return the displayed outputs of a cell."""
    return [out for out in cell.outputs if "data" in out]


def pngs(cell):
    """Return the PNG files that a cell shows, as text."""
    return [o.data["image/png"] for o in bundles(cell) if "image/png" in o.data]


def pixels(png):
    """Return a PNG as an array (height, width, 4) in 0..1."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGBA")
    return np.asarray(image, dtype=np.float64) / 255


def different_pictures(a, b):
    """Return what differs between two PNG files, or an empty text."""
    if a == b:
        return ""
    a, b = pixels(a), pixels(b)
    if a.shape != b.shape:
        return f"size {a.shape[:2]} became {b.shape[:2]}"
    difference = np.abs(a - b).mean()
    if difference > PIXEL_TOLERANCE:
        return f"mean difference {difference:.5f} > {PIXEL_TOLERANCE:.5f}"
    return ""


def different_values(a, b, where):
    """Return a line for each place where two JSON values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            return [f"{where}: other keys {sorted(a.keys() ^ b.keys())}"]
        pairs = [(f"{where}.{key}", a[key], b[key]) for key in a]
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return [f"{where}: length {len(a)} became {len(b)}"]
        pairs = [
            (f"{where}[{i}]", *ab)
            for i, ab in enumerate(zip(a, b, strict=True))
        ]
    elif isinstance(a, bytes) and isinstance(b, bytes):
        if len(a) != len(b):
            return [f"{where}: {len(a)} bytes became {len(b)}"]
        step = np.frombuffer(a, np.uint8) - np.frombuffer(b, np.uint8)
        worst = int(np.abs(step.view(np.int8).astype(int)).max(initial=0))
        if worst > BYTE_TOLERANCE:
            return [f"{where}: a byte differs by {worst}"]
        return []
    elif isinstance(a, float) and isinstance(b, (int, float)):
        near = np.isclose(a, b, rtol=NUMBER_TOLERANCE, atol=0)
        return [] if near else [f"{where}: {a} became {b}"]
    else:
        same = type(a) is type(b) and a == b
        return [] if same else [f"{where}: {str(a)[:60]} became {str(b)[:60]}"]
    return [
        line for where, a, b in pairs for line in different_values(a, b, where)
    ]


def widget_models(nb, name=None):
    """Return the widgets of a notebook in the order of their making.

    Args:
        nb: the notebook.
        name: its lesson, if it is stored: the order is then in the ids.
    """
    state = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    ids = list(state)
    if name:
        hashes = (f"{name}:{i}".encode() for i in range(len(ids)))
        ids = [hashlib.md5(text).hexdigest() for text in hashes]
        assert set(ids) == set(state), "ids of widgets are not counted"
    models = []
    for model_id in ids:
        model = dict(state[model_id])
        model["buffers"] = {
            "/".join(map(str, buffer["path"])): base64.b64decode(buffer["data"])
            for buffer in model.get("buffers", [])
        }
        models.append(model)
    text_ids = {f"IPY_MODEL_{old}": f"model {i}" for i, old in enumerate(ids)}
    return replaced(models, text_ids)


def replaced(value, names):
    """Return a JSON value with some of its texts replaced."""
    if isinstance(value, dict):
        return {key: replaced(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [replaced(item, names) for item in value]
    return names.get(value, value) if isinstance(value, str) else value


def differences(stored, fresh, name):
    """Return a line for each figure or widget that did not come out again."""
    lines = []
    by_id = {cell.id: cell for cell in code_cells(fresh)}
    for cell in code_cells(stored):
        old, new = pngs(cell), pngs(by_id[cell.id])
        if len(old) != len(new):
            lines.append(f"cell {cell.id}: {len(old)} figures, now {len(new)}")
            continue
        for a, b in zip(old, new, strict=True):
            if what := different_pictures(a, b):
                lines.append(f"cell {cell.id}: {what}")
    a, b = widget_models(stored, name), widget_models(fresh)
    return lines + different_values(a, b, "widgets")
