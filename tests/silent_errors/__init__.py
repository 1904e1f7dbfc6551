"""Kinds of use that once trained on a wrong gradient, wrong data or a wrong rate without a word.

Each module holds the cases of a few kinds. A case trains through the public API and returns how far the result is from
plain PyTorch's, or raises the error that refuses it. `tests/test_silent_errors.py` runs them all, and
`scripts/silent_error_table.py` prints them as a table, also for another version of the package.
"""
