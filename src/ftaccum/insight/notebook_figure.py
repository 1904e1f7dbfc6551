"""A matplotlib figure that notebooks show although pyplot has not made it. Importing this module loads matplotlib."""

import io

from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that a notebook shows as the last expression of a cell.

    IPython shows a plain `Figure` only after `%matplotlib inline`.
    """

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()
