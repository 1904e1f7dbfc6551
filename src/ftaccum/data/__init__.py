"""Whatever the user hands over → rows → collated, counted micro-batches."""

from ..objective import Sample
from .checking import Ranges, check_sample, labelled, sample_of
from .collating import Collation, Collator, PaddingCollator
from .loading import Loader, MicroBatch
from .rows import Rows, as_rows, length_of, mean_length, synthetic_rows
from .text import is_raw_text, tokenized

__all__ = [
    "Collation",
    "Collator",
    "Loader",
    "MicroBatch",
    "PaddingCollator",
    "Ranges",
    "Rows",
    "Sample",
    "as_rows",
    "check_sample",
    "is_raw_text",
    "labelled",
    "length_of",
    "mean_length",
    "sample_of",
    "synthetic_rows",
    "tokenized",
]
