"""Check that every link of a built site leads to a file and an anchor in it. Links to other sites are not requested.

    python scripts/check_site.py docs/_build/html [--list]

`--list` prints the pages with their sizes.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Page(HTMLParser):
    """The anchors and links of a page."""

    path: Path
    anchors: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.feed(self.path.read_text(encoding="utf-8"))

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value is not None:
                self.links.append(value)


def faults_of(site: Path) -> Iterator[str]:
    """Yield a sentence for each link that leads nowhere."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html")}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            shown = f"{path.relative_to(site.resolve())}: the link {link!r}"
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{shown} leads to no file."
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                yield f"{shown} leads to no anchor."


def main() -> int:
    site = Path(sys.argv[1])
    pages = sorted(site.rglob("*.html"))
    if "--list" in sys.argv:
        for path in pages:
            print(f"{path.stat().st_size / 1000:8.0f} kB  {path.relative_to(site)}")
    faults = list(faults_of(site))
    print(*faults, f"{len(pages)} pages, {len(faults)} links that lead nowhere.", sep="\n")
    return 1 if faults or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
