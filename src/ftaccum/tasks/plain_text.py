"""Tasks whose rows are plain text: one column, which is also what the model learns."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..data.labels import LABELS
from ..errors import SettingsError
from .columns import Role
from .reading.rows import columns_of
from .task import EncodingOptions, Task


class PlainText(Task):
    """A task on one column of text, whose labels are its own tokens."""

    roles: ClassVar[Mapping[str, Role]] = {"text": Role(("text",), required=False)}
    reads_text = streams = True

    def encode(self, rows: Any, argument: str, processor: Any, model: Any, options: EncodingOptions) -> Any:  # noqa: ARG002
        """Return the rows with the column of text that was named, or else with all columns but labels."""
        return rows.select_columns(self.columns_to_read(rows, options.text_columns))

    def columns_to_read(self, rows: Any, text_columns: Sequence[str] | None) -> list[str]:
        """Return the columns that may hold the text.

        Args:
            text_columns: the setting.

        Raises:
            SettingsError: if the setting and the role `text` both name a column.
        """
        names = columns_of(rows)
        if text_columns is None and "text" in names:
            return ["text"]
        if "text" in self.given and text_columns is not None:
            raise SettingsError(
                [
                    f"`text_columns` names {', '.join(map(repr, text_columns))}, and `columns` names "
                    f"{self.given['text']!r} as text. Leave one of them out."
                ]
            )
        return [name for name in names if name not in LABELS or name in (text_columns or ())]
