"""What all figures share: colours that colour-blind readers tell apart, sizes of type, and how they become files."""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from throughline.files import replacing

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

SEQUENTIAL = "viridis"
# Blue is below zero, orange above; both ends are equally dark, the middle is a grey that shows on white and on black.
DIVERGING_STOPS = ("#0b4f9c", "#5b9bd5", "#c9c9c4", "#f0a04b", "#b34700")
MODEL_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#6a51a3", "#7f7f7f")  # Okabe and Ito
MODEL_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
MISSING_COLOR = "#c8c8c8"
IMAGE_DPI = 150  # of the png, and of images within the others
SMALL, NORMAL, LARGE = 7.0, 8.5, 10.5  # points

_SETTINGS: dict[Any, Any] = {
    "font.size": NORMAL,
    "axes.titlesize": NORMAL,
    "axes.labelsize": NORMAL,
    "figure.titlesize": LARGE,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "text.parse_math": False,  # a token may be "$"
    "svg.fonttype": "none",  # text stays text: it can be searched and edited
    "svg.hashsalt": "throughline",  # ids from the content alone, so that the bytes can be reproduced
    "pdf.fonttype": 42,  # the font's own outlines, which journals ask for and programs can edit
}


@contextmanager
def styled() -> Iterator[None]:
    """Within the block, matplotlib draws in throughline's style."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of that many inches, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def sequential() -> "Colormap":
    """From little to much; what is missing (NaN) is grey."""
    import matplotlib

    return matplotlib.colormaps[SEQUENTIAL].with_extremes(bad=MISSING_COLOR)


def diverging() -> "Colormap":
    """From below zero (blue) to above zero (orange)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("blue-orange", DIVERGING_STOPS)


def color_limits(arrays: Iterable[np.ndarray]) -> tuple[float, float]:
    """The values at both ends of a colour scale that all `arrays` share.

    Starts at zero unless something is below it, and then goes no further below zero than above: an explained variance
    can be as negative as it likes and would leave no colours for the rest.
    """
    finite = np.concatenate([np.asarray(a, float)[np.isfinite(a)].ravel() for a in arrays] or [np.zeros(0)])
    if not finite.size:
        return 0.0, 1.0
    lowest, highest = float(finite.min()), float(finite.max())
    high = 1.0 if 0.25 <= highest <= 1 else (highest if highest > 0 else 1.0)
    return max(min(lowest, 0.0), -high), high


def show_token(text: str) -> str:
    """A token with its white space made visible."""
    for blank, sign in ((" ", "·"), ("\n", "↵"), ("\t", "⇥"), ("\r", "␍")):
        text = text.replace(blank, sign)
    return text or "∅"


def shorten(text: str, length: int) -> str:
    """`text`, cut to `length` characters with an ellipsis if it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def shorten_name(model: str, length: int) -> str:
    """A model's name without its owner if it is too long, then cut."""
    return shorten(model if len(model) <= length else model.rpartition("/")[2], length)


def luminance(color: Sequence[float]) -> float:
    """Perceived brightness of an RGB colour, 0 to 1; numbers on it are black above one half."""
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def save_figure(figure: "Figure", stem: Path) -> list[Path]:
    """Write `stem`.png, .svg and .pdf, each at once or not at all; the same figure gives the same bytes.

    `figure.savefig` would draw each of them twice, once to see where things are; here that is done once for all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    written, engine, dpi = [], figure.get_layout_engine(), figure.dpi
    try:
        with styled(), warnings.catch_warnings():
            # A token in a script that the font lacks shows as a box, as it would in an editor.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.dpi = IMAGE_DPI
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # places are in inches: all files have the same
            for kind, canvas, metadata in (
                ("png", FigureCanvasAgg, {"Software": None}),
                ("svg", FigureCanvasSVG, {"Date": None}),
                ("pdf", FigureCanvasPdf, {"CreationDate": None}),
            ):
                figure.dpi = IMAGE_DPI  # printing changes it
                # Not with_suffix: a model name may have a dot in it.
                path = stem.with_name(f"{stem.name}.{kind}")
                with replacing(path) as temporary:
                    getattr(canvas(figure), f"print_{kind}")(temporary, metadata=metadata)
                written.append(path)
    finally:
        FigureCanvasAgg(figure)  # a canvas makes itself the figure's
        figure.set_layout_engine(engine)
        figure.dpi = dpi
    return written
