"""What every widget of the book shares: text, picture, script and style.

A widget is data from Python plus one script that draws it. All the interaction
is in the script, so that the widget also works on a page that has no kernel;
``book/static/widgets.js`` starts it there from the stored state. Where no
script runs (GitHub, nbviewer, print from a notebook) a PNG takes its place.

A new widget is three files: ``name.py`` with a subclass of ``StaticWidget``,
``name.js`` and ``name.css``. The script may use what ``base.js`` defines.
Taught in: no lesson; the widgets are part of the book, not of its subject.
"""

import re
from base64 import b64encode
from io import BytesIO
from pathlib import Path

import anywidget
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


def asset(file: str) -> str:
    """Return a script or style: the shared part, then the widget's own.

    Comments and indentation are left out, because a page holds this text once
    per widget; so no string in these files may hold a comment sign.

    Args:
        file: a file of this folder, ``"name.js"`` or ``"name.css"``.
    """
    folder = Path(__file__).parent
    both = (folder / f"base{Path(file).suffix}", folder / file)
    text = "\n".join(path.read_text(encoding="utf-8") for path in both)
    text = re.sub(
        r"/\*.*?\*/|^\s*//.*?$|\s//\s.*?$", "", text, flags=re.M | re.S
    )
    return "\n".join(filter(None, map(str.strip, text.splitlines())))


class StaticWidget(anywidget.AnyWidget):
    """A widget whose text and picture do not need a browser.

    A subclass sets ``_esm`` and ``_css`` with ``asset``, keeps its data in
    synced traits, and defines ``__repr__``, ``alt`` and ``figure``.
    """

    def __repr__(self) -> str:
        """Return one line that is the same on every run and processor."""
        raise NotImplementedError

    def alt(self) -> str:
        """Return what the picture shows, for someone who cannot see it."""
        raise NotImplementedError

    def figure(self) -> Figure:
        """Return the picture that stands in where no script runs."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs):
        data, metadata = super()._repr_mimebundle_(**kwargs)
        data["image/png"] = png(self.figure())
        return data, {**metadata, "image/png": {"alt": self.alt()}}


def png(figure: Figure) -> str:
    """Return ``figure`` as a PNG file in base64, with no version or date.

    256 colours are enough for a stand-in, and a third of the bytes.
    """
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    file = BytesIO()
    few = image.quantize(256, Image.Quantize.MAXCOVERAGE, dither=0)
    few.save(file, "png", optimize=True)
    return b64encode(file.getvalue()).decode()
