"""Links that work both in the repository and on the site.

Pages link to each other and to other files of the repository by relative paths, as GitHub resolves them. Some files
outside `docs/` are pages of the site: those that a page of `docs/` includes as a whole, such as CHANGELOG.md. This
extension inserts them, and points links to them at their page. Links to other files download a copy of the file. Links
to folders become plain text, since the site has no page for them.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from sphinx.application import Sphinx

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,}|:{3,}).*?^ {0,3}\1[`~:]*[ \t]*$", re.MULTILINE | re.DOTALL)
_INCLUDE = re.compile(r"^```\{include\} (\S+)\n```$", re.MULTILINE)
_LINK = re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def included_pages(docs: Path) -> dict[Path, str]:
    """Return the files that pages include as a whole, each with its page."""
    pages = {}
    for page in docs.glob("*.md"):
        for name in _INCLUDE.findall(page.read_text(encoding="utf-8")):
            pages[(docs / name).resolve()] = page.name
    return pages


def adapted(text: str, folder: Path, page_folder: Path, docs: Path, pages: dict[Path, str]) -> str:
    """Return a page with its links adapted.

    Args:
        text: Markdown.
        folder: the folder that its links are relative to.
        page_folder: the folder of the page on the site.
        docs: the folder of the site's sources.
        pages: files outside it, with the page that includes each.
    """

    def adapt(link: re.Match[str]) -> str:
        text, target, anchor = link.groups("")
        if re.match(r"\w+:", target):
            return link.group()
        path = (folder / target).resolve()
        if path.is_dir():
            return text
        path = docs / pages[path] if path in pages else path
        return f"[{text}]({PurePosixPath(os.path.relpath(path, page_folder))}{anchor})"

    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [_LINK.sub(adapt, text[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, _LINK.sub(adapt, text[end:])])


def _read(app: Sphinx, docname: str, source: list[str]) -> None:
    docs = Path(app.srcdir)
    pages = included_pages(docs)
    page_folder = (docs / docname).parent

    def insert(include: re.Match[str]) -> str:
        path = (page_folder / include.group(1)).resolve()
        app.env.note_dependency(str(path), docname=docname)
        return adapted(path.read_text(encoding="utf-8"), path.parent, page_folder, docs, pages)

    page = adapted(source[0], page_folder, page_folder, docs, pages)
    source[0] = _INCLUDE.sub(insert, page) if _INCLUDE.search(page) else page


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
