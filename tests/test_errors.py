"""The lines of other libraries' errors that messages of ftaccum quote."""

import pytest

from ftaccum.errors import first_line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("It fails. Badly.\nThe rest.", "It fails. Badly"),
        ("\n  \n  It fails\n", "It fails"),
        ("", "ValueError"),
        (".\n", "ValueError"),
    ],
)
def test_the_first_line_of_an_error_is_never_empty(message: str, line: str) -> None:
    assert first_line(ValueError(message)) == line
