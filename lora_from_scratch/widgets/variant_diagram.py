"""One adapted layer per method: what is frozen, trained, shared, and its shape.

A method is a list of parts. The number it trains in a layer is the sum of the
sizes of its trained parts: r (d_in + d_out) for LoRA, + d_out for DoRA, + r for
AdaLoRA, d_out r for LoRA-FA, d_out + r for VeRA, d_out d_in for all of W.
Sources: LoRA arXiv:2106.09685, rsLoRA 2312.03732, LoRA+ 2402.12354, DoRA
2402.09353, AdaLoRA 2303.10512, VeRA 2310.11454, LoRA-FA 2308.03303, DyLoRA
2210.07558, PiSSA 2404.02948.
Taught in: notebooks/08_variants.ipynb
"""

import traitlets
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lora_from_scratch.widgets.base import StaticWidget, asset

MOST = 65_536  # the largest side of a layer that can be asked for
STATES = {  # of a part: in words, and as hatching in print
    "trained": ("trained", ""),
    "frozen": ("frozen", "///"),
    "drawn": ("drawn at random, frozen", "..."),
    "shared": ("random, frozen, shared by all layers", "ooo"),
}

# A part: symbol, shape, state, how it starts. "_" lowers what follows.
W0 = ("W_0", ("d_out", "d_in"), "frozen", "pretrained")
A = ("A", ("r", "d_in"), "trained", "starts random")
B = ("B", ("d_out", "r"), "trained", "starts at zero")
M = ("m", ("d_out",), "trained", "starts at ‖W_0‖")
SCALE = "α / r"

METHODS = {
    "LoRA": {
        "parts": [W0, A, B],
        "scale": SCALE,
        "formula": "h = W_0 x + (α / r) B A x",
        "idea": "The change of a large matrix is learned as the product of "
        "two thin ones. B starts at zero, so training starts at the "
        "pretrained layer.",
    },
    "rsLoRA": {
        "parts": [W0, A, B],
        "scale": "α / √r",
        "formula": "h = W_0 x + (α / √r) B A x",
        "idea": "Divided by √r and not by r, the update keeps its size when "
        "the rank grows.",
    },
    "LoRA+": {
        "parts": [W0, A, (*B[:3], "starts at zero, λ times faster")],
        "scale": SCALE,
        "formula": "h = W_0 x + (α / r) B A x; learning rates: η for A, λ η "
        "for B",
        "idea": "The layer is LoRA's. Only the optimizer differs: B has a "
        "learning rate λ times as high as A's.",
    },
    "DoRA": {
        "parts": [W0, A, B, M],
        "scale": SCALE,
        "formula": "h = (m / ‖V‖) ∘ V x, V = W_0 + (α / r) B A; ‖V‖ has the "
        "length of each row and counts as a constant in the backward pass",
        "idea": "Length and direction of every row are learned apart: m "
        "holds the lengths, B A turns the rows.",
    },
    "AdaLoRA": {
        "parts": [
            W0,
            A,
            ("E", ("r",), "trained", "starts at zero"),
            (*B[:3], "starts random"),
        ],
        "scale": SCALE,
        "formula": "h = W_0 x + (α / r) B (E ∘ A x)",
        "idea": "E weighs the r directions. While training, the least useful "
        "of the whole model are set to zero, so that layers end with "
        "different ranks.",
    },
    "VeRA": {
        "parts": [
            W0,
            ("A", ("r", "d_in"), "shared", ""),
            ("λ_d", ("r",), "trained", "starts at 0.1"),
            ("B", ("d_out", "r"), "shared", ""),
            ("λ_b", ("d_out",), "trained", "starts at zero"),
        ],
        "scale": "",
        "formula": "h = W_0 x + λ_b ∘ B (λ_d ∘ A x)",
        "idea": "A and B are drawn once for all layers and never trained. A "
        "layer learns only how much of each direction and of each output to "
        "use; the rank is chosen much larger.",
    },
    "LoRA-FA": {
        "parts": [W0, ("A", ("r", "d_in"), "drawn", ""), B],
        "scale": SCALE,
        "formula": "h = W_0 x + (α / r) B A x",
        "idea": "A stays as it was drawn. For the backward pass the layer "
        "then has to keep A x, with r numbers a token, and not x, with d_in.",
    },
    "DyLoRA": {
        "parts": [
            W0,
            (*A[:3], "starts random, filled: b in use"),
            (*B[:3], "starts at zero, filled: b in use"),
        ],
        "scale": "α / b",
        "formula": "h = W_0 x + (α / b) B[:, :b] A[:b] x; b is drawn from "
        "1 … r at every step",
        "idea": "Each step trains only with the first b directions. "
        "Afterwards any smaller rank can be cut out without training again.",
    },
    "PiSSA": {
        "parts": [
            ("W_res", ("d_out", "d_in"), "frozen", "what A and B leave of W_0"),
            (*A[:3], "starts from the SVD of W_0"),
            (*B[:3], "starts from the SVD of W_0"),
        ],
        "scale": SCALE,
        "formula": "h = W_res x + (α / r) B A x, W_res = W_0 − (α / r) B A "
        "at the start",
        "idea": "A and B start as the r strongest directions of W_0, and the "
        "frozen matrix keeps the rest: together they are still the "
        "pretrained layer.",
    },
    "full fine-tuning": {
        "parts": [("W", ("d_out", "d_in"), "trained", "starts pretrained")],
        "scale": "",
        "formula": "h = W x",
        "idea": "Every number of the matrix may change. This is what the "
        "others are compared with.",
    },
}


class VariantDiagram(StaticWidget):
    """Draw a layer under a method, for sides and a rank the reader chooses.

    Biases are left out; no method here trains them.

    Args:
        variant: a key of ``METHODS``, such as ``"DoRA"``; shown first.
        d_in: inputs of the layer, 1..65536.
        d_out: outputs of the layer, 1..65536.
        r: rank, 1..min(d_in, d_out).

    Raises:
        ValueError: if ``variant`` is unknown or a number is out of range.
    """

    _esm = asset("variant_diagram.js")
    _css = asset("variant_diagram.css")

    variant = traitlets.Unicode().tag(sync=True)
    d_in = traitlets.Int().tag(sync=True)
    d_out = traitlets.Int().tag(sync=True)
    r = traitlets.Int().tag(sync=True)
    methods = traitlets.Dict().tag(sync=True)
    states = traitlets.Dict().tag(sync=True)
    most = traitlets.Int(MOST).tag(sync=True)

    def __init__(
        self,
        variant: str = "LoRA",
        d_in: int = 768,
        d_out: int = 2304,
        r: int = 8,
    ):
        if variant not in METHODS:
            raise ValueError(
                f"variant must be one of {list(METHODS)}, got {variant!r}"
            )
        for name, value in (("d_in", d_in), ("d_out", d_out), ("r", r)):
            most = min(d_in, d_out) if name == "r" else MOST
            if not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(
                    f"{name} must be an int in 1..{most}, got {value}"
                )
        super().__init__(
            variant=variant,
            d_in=d_in,
            d_out=d_out,
            r=r,
            methods=METHODS,
            states={key: words for key, (words, _) in STATES.items()},
        )

    def __repr__(self) -> str:
        return (
            f"VariantDiagram({self.variant!r}, d_in={self.d_in}, "
            f"d_out={self.d_out}, r={self.r}): "
            f"{self.n_trainable():,} trained numbers"
        )

    def n_trainable(self) -> int:
        """Return how many numbers the method trains in this layer."""
        parts = METHODS[self.variant]["parts"]
        return sum(
            self._size(shape)
            for _, shape, state, _ in parts
            if state == "trained"
        )

    def _size(self, shape):
        """Return the product of the named sides."""
        size = 1
        for name in shape:
            size *= getattr(self, name)
        return size

    def _sides(self, shape):
        """Return a shape in numbers: ``"8 × 768"``."""
        return " × ".join(f"{getattr(self, name):,}" for name in shape)

    def alt(self) -> str:
        """Return the diagram as a list in words."""
        method = METHODS[self.variant]
        parts = "; ".join(
            f"{symbol} ({self._sides(shape)}) {STATES[state][0]}"
            + (f", {start}" if start else "")
            for symbol, shape, state, start in method["parts"]
        )
        return (
            f"{self.variant}, one layer: {parts}. {method['formula']}. It "
            f"trains {self.n_trainable():,} numbers. {method['idea']}"
        ).replace("_", " ")

    def figure(self) -> Figure:
        """Return the parts side by side, with their shapes and states."""
        method = METHODS[self.variant]
        figure = Figure(figsize=(7.6, 2.9), dpi=100, layout="constrained")
        ax = figure.subplots()
        longest = max(self.d_in, self.d_out)
        for i, (symbol, shape, state, start) in enumerate(method["parts"]):
            sides = [getattr(self, name) / longest for name in shape]
            height, width = (max(0.07, side) for side in (*sides, 0)[:2])
            words, hatch = STATES[state]
            ax.add_patch(
                Rectangle(
                    (1.6 * i - width / 2, -height / 2),
                    width,
                    height,
                    facecolor="C0" if state == "trained" else "0.9",
                    edgecolor="0.3",
                    hatch=hatch,
                )
            )
            label = [f"{symbol}: {self._sides(shape)}"]
            label += words.split(", ") + start.split(", ")
            ax.text(
                1.6 * i,
                -0.62,
                "\n".join(label).replace("_0", "₀"),
                ha="center",
                va="top",
                fontsize=8,
            )
        ax.set(xlim=(-0.8, 1.6 * len(method["parts"]) - 0.8), ylim=(-1.5, 0.6))
        ax.set_aspect("equal")
        ax.set_axis_off()
        formula = method["formula"].split(";")[0].replace("_0", "₀")
        figure.suptitle(
            f"{self.variant}: {formula}\n"
            f"{self.n_trainable():,} trained numbers",
            fontsize=10,
        )
        return figure
