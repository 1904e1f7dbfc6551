"""A check that a tokenizer tells where its tokens stand in a text."""

from typing import Any

from ..errors import SettingsError


def check_fast(tokenizer: Any, task: str) -> None:
    """Raise SettingsError if a tokenizer is a slow one, which does not tell the places of its tokens."""
    if not getattr(tokenizer, "is_fast", False):
        raise SettingsError(
            [
                f"`task` is {task!r}, which needs the places of tokens in their text, but {type(tokenizer).__name__} "
                "is a slow tokenizer without them. Give a fast one as `tokenizer`, or choose another model."
            ]
        )
