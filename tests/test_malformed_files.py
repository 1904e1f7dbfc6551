"""Malformed data files: each message has the reader's reason, the file, the place and the option to use."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from malformed_files import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.fault)
def test_a_malformed_file_is_refused_with_its_place(case: Case, tmp_path: Path) -> None:
    message = case.message(tmp_path)
    assert [words for words in case.words if words not in message] == [], message
    assert message.startswith("`train_data")
