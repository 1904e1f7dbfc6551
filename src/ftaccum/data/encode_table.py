"""Encode the rows of a table, in one process or several, and find them again in later runs."""

from collections.abc import Callable, Mapping, Sequence

from datasets import Dataset

from ..errors import DataError

# Takes the columns of a batch of rows, and the rows' positions, and returns new columns.
Encode = Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]


def encode_table(table: Dataset, encode: Encode, n_processes: int, argument: str) -> Dataset:
    """Return the rows that `encode` makes of a table, batch by batch.

    `datasets` stores them beside a table that is on disk. It finds them again if the rows and the pickled `encode` are
    the same.

    Args:
        n_processes: the number of processes that encode; with 1, this process does.
        argument: the argument that the rows came from, for messages and the progress bar.

    Raises:
        DataError: if `encode` raises it, or if it cannot run in other processes.
    """
    n_processes = min(n_processes, len(table))
    options = {"with_indices": True, "batched": True, "remove_columns": table.column_names}
    options["desc"] = f"Tokenizing {argument}"
    if n_processes <= 1:
        return table.map(encode, **options)
    try:
        return table.map(encode, num_proc=n_processes, **options)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"`{argument}` cannot be tokenized in {n_processes} processes: {error!r}. Leave out "
            "`preprocessing_num_workers` to tokenize in this process."
        ) from error
