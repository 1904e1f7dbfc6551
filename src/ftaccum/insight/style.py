"""The look of figures: their colors in a light and a dark theme, and figures as SVG that follows the theme."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colors of runs, light and dark.
RUN_COLORS = (
    ("#1763c6", "#6fb1ff"),
    ("#c2500a", "#ffa25e"),
    ("#17803f", "#5dd28b"),
    ("#b3234f", "#ff8aa8"),
    ("#7d3fd1", "#c3a0ff"),
    ("#0f7c86", "#56d3dd"),
    ("#876300", "#e2bf4b"),
    ("#a8329b", "#f393e6"),
)
# Colors by CSS variable, light and dark. Figures are drawn in the light ones.
COLORS = {
    "page": ("#ffffff", "#14171c"),
    "ink": ("#20242b", "#e3e6eb"),
    "muted": ("#59616d", "#a3acb9"),
    "code": ("#f3f5f8", "#20252e"),
    "grid": ("#dfe3e8", "#333a45"),
    **{f"c{n}": pair for n, pair in enumerate(RUN_COLORS)},
}
# Lengths of dashes and gaps in the lines of runs, in widths of the line: solid, dashed, dotted, dashed and dotted.
_DASHES: tuple[tuple[float, ...], ...] = ((), (3.7, 1.6), (1.0, 1.65), (6.4, 1.6, 1.0, 1.6))

_LINK = "{http://www.w3.org/1999/xlink}href"


def color_of(n: int) -> str:
    """Return the CSS variable of the color of the nth run. After the last color, the first follows again."""
    return f"c{n % len(RUN_COLORS)}"


def dashes_of(n: int) -> tuple[float, ...]:
    """Return the dashes and gaps in the line of the nth run, which differ between runs of one color."""
    return _DASHES[n // len(RUN_COLORS) % len(_DASHES)]


@contextmanager
def page_style() -> Iterator[None]:
    """Draw and save figures in the style of the page until exit. The user's own style is left out, and comes back.

    Raises:
        ImportError: if matplotlib is missing.
    """
    import matplotlib.style  # slow to import, and an extra
    from cycler import cycler

    ink, muted, grid = (COLORS[name][0] for name in ("ink", "muted", "grid"))
    style = {
        "axes.prop_cycle": cycler(color=[light for light, _ in RUN_COLORS]),
        "axes.axisbelow": True,
        "axes.edgecolor": muted,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.labelcolor": ink,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": "medium",
        "figure.facecolor": COLORS["page"][0],
        "font.size": 10,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.edgecolor": grid,
        "legend.facecolor": COLORS["page"][0],
        "svg.fonttype": "none",  # text stays text, which pages can resize and search
        "text.color": ink,
        "text.parse_math": False,  # a run may be named $a$
        "xtick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.color": muted,
        "ytick.labelcolor": ink,
    }
    with matplotlib.style.context(["default", style]):
        yield


def theme_css() -> str:
    """Return the CSS variables of the two themes."""
    light, dark = (";".join(f"--{name}:{pair[n]}" for name, pair in COLORS.items()) for n in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def as_svg(figure: "Figure", label: str, prefix: str) -> str:
    """Return a figure as an SVG element for a page, whose colors follow the page's theme. Call it in `page_style`.

    Args:
        figure: the figure.
        label: describes the figure to screen readers.
        prefix: begins the ids in it. It must be different for each figure on a page.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    file = io.StringIO()
    figure.patch.set_visible(False)
    # `savefig` draws twice and takes twice as long.
    FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML has no namespaces
    for child in root.findall("metadata"):
        root.remove(child)
    _rename_ids(root, prefix)
    for name in ("width", "height"):  # the page decides
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return _with_variables(ElementTree.tostring(root, encoding="unicode"))


def _rename_ids(root: ElementTree.Element, prefix: str) -> None:
    """Give ids that are used a prefix, and remove the others, because an id may occur only once on a page."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    for element in root.iter():
        if "id" in element.attrib and (found := element.attrib.pop("id")) in used:
            element.set("id", prefix + found)
        if _LINK in element.attrib:
            link = element.attrib.pop(_LINK)
            element.set("href", link.replace("#", f"#{prefix}") if link.startswith("#") else link)
        for name, value in element.attrib.items():
            element.set(name, value.replace("url(#", f"url(#{prefix}"))


def _with_variables(svg: str) -> str:
    variables = {light: f"var(--{name})" for name, (light, _) in COLORS.items()}
    return re.sub("|".join(variables), lambda found: variables[found.group()], svg)
