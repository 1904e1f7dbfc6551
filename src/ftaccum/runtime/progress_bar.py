"""The class of all progress bars: widgets in a notebook that can show them, text elsewhere."""

import warnings

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # in a notebook without ipywidgets, bars are text
    from tqdm.auto import tqdm

__all__ = ["tqdm"]
