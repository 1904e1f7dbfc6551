"""Whatever the user hands over → rows → collated, counted micro-batches."""

from ..objective import Sample
from .checking import Ranges, check_lengths, check_sample, labelled, sample_of, sample_positions
from .collating import Collation, Collator, PaddingCollator
from .feeding import Feed, Portion, Portions
from .loading import Loader, MicroBatch, Share
from .packing import PackingCollator
from .rows import Rows, as_rows, length_of, mean_length, synthetic_rows
from .streaming import Stream, StreamRows, is_split, is_stream
from .text import is_raw_text, most_tokens, tokenized

__all__ = [
    "Collation",
    "Collator",
    "Feed",
    "Loader",
    "MicroBatch",
    "PackingCollator",
    "PaddingCollator",
    "Portion",
    "Portions",
    "Ranges",
    "Rows",
    "Sample",
    "Share",
    "Stream",
    "StreamRows",
    "as_rows",
    "check_lengths",
    "check_sample",
    "is_raw_text",
    "is_split",
    "is_stream",
    "labelled",
    "length_of",
    "mean_length",
    "most_tokens",
    "sample_of",
    "sample_positions",
    "synthetic_rows",
    "tokenized",
]
