"""Pictures on their way out of noise, under two sliders: step and weight.

Everything is stored: for each weight of the adapter and each stop on the way
from noise to picture, the same few pictures, a byte per pixel. The starting
noise and the noise of the steps are the same at all weights, so that what
differs is the adapter's doing.
Source: Ho et al. 2020, algorithm 2.
Taught in: notebooks/18_diffusion.ipynb
"""

import numpy as np
import traitlets
from matplotlib.figure import Figure

from lora_from_scratch.widgets.base import StaticWidget, asset

LIMIT = 2.0  # noise beyond -2..2 is drawn as black or white


class DiffusionExplorer(StaticWidget):
    """Show stored pictures; the reader moves the step and the weight.

    Args:
        pictures: (n_weights, n_stops, n, h, w), values about -1 (paper) to 1
            (ink), an array or a tensor.
        weights: the adapter's weight in each row, growing.
        stops: steps that are still to go at each stop, falling to 0.
        hits: of the n finished pictures at each weight, how many show the
            concept.
        concept: what is counted, such as "a seven".
        label: the widget's title.

    Raises:
        ValueError: if a length does not fit the pictures, a value is not
            finite, or a name is empty.
    """

    _esm = asset("diffusion_explorer.js")
    _css = asset("diffusion_explorer.css")

    label = traitlets.Unicode().tag(sync=True)
    concept = traitlets.Unicode().tag(sync=True)
    shape = traitlets.List(traitlets.Int()).tag(sync=True)  # of pictures
    weights = traitlets.List(traitlets.Float()).tag(sync=True)
    stops = traitlets.List(traitlets.Int()).tag(sync=True)
    hits = traitlets.List(traitlets.Int()).tag(sync=True)
    pixels = traitlets.Bytes().tag(sync=True)  # uint8, 0 paper, 255 ink
    at_weight = traitlets.Int(0).tag(sync=True)  # places in the lists
    at_stop = traitlets.Int(0).tag(sync=True)

    def __init__(self, pictures, weights, stops, hits, concept, label):
        if hasattr(pictures, "detach"):
            pictures = pictures.detach().cpu().double()
        values = np.asarray(pictures, dtype=np.float64)
        if values.ndim != 5 or 0 in values.shape:
            raise ValueError(
                "pictures must be (n_weights, n_stops, n, h, w), got shape "
                f"{values.shape}"
            )
        if not np.isfinite(values).all():
            raise ValueError("pictures hold NaN or infinite entries")
        for name, found, n in (
            ("weights", weights, values.shape[0]),
            ("stops", stops, values.shape[1]),
            ("hits", hits, values.shape[0]),
        ):
            if len(found) != n:
                raise ValueError(
                    f"{name} has {len(found)} entries, the pictures need {n}"
                )
        if not label or not concept:
            raise ValueError("label and concept must say what is shown")
        levels = 255 * (values.clip(-LIMIT, LIMIT) + LIMIT) / (2 * LIMIT)
        weights = [float(w) for w in weights]
        super().__init__(
            label=label,
            concept=concept,
            shape=list(values.shape),
            weights=weights,
            stops=[int(s) for s in stops],
            hits=[int(h) for h in hits],
            pixels=np.rint(levels).astype(np.uint8).tobytes(),
            at_weight=weights.index(1.0) if 1.0 in weights else 0,
            at_stop=values.shape[1] - 1,
        )

    def __repr__(self) -> str:
        n_weights, n_stops, n, *_ = self.shape
        return (
            f"DiffusionExplorer({self.label!r}, weights={n_weights}, "
            f"stops={n_stops}, pictures={n})"
        )

    def alt(self) -> str:
        """Return what the stand-in picture shows, in words."""
        n = self.shape[2]
        found = "; ".join(
            f"weight {w:g}: {h} of {n}"
            for w, h in zip(self.weights, self.hits, strict=True)
        )
        shown = f"Finished pictures that show {self.concept}: {found}."
        return f"{self.label}. {shown}"

    def figure(self) -> Figure:
        """Return the finished pictures, a row for each weight."""
        n_weights, _, n, h, w = self.shape
        levels = np.frombuffer(self.pixels, np.uint8).reshape(self.shape)
        figure = Figure(
            figsize=(6, 0.6 * n_weights + 0.5), dpi=100, layout="constrained"
        )
        figure.suptitle(self.label, fontsize=11)
        axes = figure.subplots(n_weights, 1, squeeze=False)[:, 0]
        for ax, row, weight in zip(axes, levels, self.weights, strict=True):
            strip = np.full((h + 2, n * (w + 2)), 128, np.uint8)
            for i, picture in enumerate(row[-1]):
                strip[1:-1, i * (w + 2) + 1 : (i + 1) * (w + 2) - 1] = picture
            ax.imshow(255 - strip, cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            ax.set_ylabel(f"{weight:g}", rotation=0, ha="right", va="center")
        return figure
