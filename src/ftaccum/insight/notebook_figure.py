"""A matplotlib figure that notebooks show although pyplot has not made it. Importing this module loads matplotlib."""

import io
import warnings
from typing import Any

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that a notebook shows as the last expression of a cell.

    IPython shows a plain `Figure` only after `%matplotlib inline`.
    """

    def draw(self, renderer: Any) -> None:
        """Draw the figure, without a warning for each letter that the font lacks, such as in names of runs."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph .* missing from|Matplotlib currently does not support")
            super().draw(renderer)

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
