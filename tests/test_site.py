"""The documentation site: its pages, its reference, what is generated from declarations, and the checks of a build."""

import json
import re
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import ftaccum
from ftaccum.apps.options import OPTIONS
from ftaccum.settings.recipe import Recipe

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "extensions"))

from check_site import faults_of
from teaching_outputs import texts_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"

needs_sphinx = pytest.mark.skipif(find_spec("sphinx") is None, reason="the extra `docs` is not installed")


def pages() -> set[str]:
    return {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md") if "_build" not in page.parts}


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = {"index"}
    for page in pages():
        for body in re.findall(r"^```\{toctree\}\n(.*?)^```$", (DOCS / f"{page}.md").read_text("utf-8"), re.M | re.S):
            for entry in re.findall(r"^(?!:)(?:.*<)?([\w/*]+)>?$", body, re.M):
                listed |= {
                    str(found.relative_to(DOCS).with_suffix(""))
                    for found in DOCS.glob(f"{Path(page).parent}/{entry}.md")
                }
    assert pages() - listed == set()


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(page.read_text("utf-8") for page in (DOCS / "reference").glob("*.md"))
    documented = set(re.findall(r"^\.\. auto\w+:: (?:ftaccum\.)?(\w+)", reference, re.M))
    assert set(ftaccum.__all__) - documented == set()


@needs_sphinx
def test_the_table_of_arguments_is_generated_from_the_declarations() -> None:
    from declared_arguments import with_declared_rows

    page = (DOCS / "arguments.md").read_text("utf-8")
    assert with_declared_rows(page) == page
    row = next(line for line in page.splitlines(True) if line.startswith("| `n_epochs`"))
    assert row in with_declared_rows(page.replace(row, "| `n_epochs` | 4 | other | Recipe |\n"))
    assert row in with_declared_rows(page.replace(row, ""))  # a new setting
    assert with_declared_rows(page.replace(row, f"{row}| `gone` | 1 | no setting any more | Recipe |\n")) == page


@needs_sphinx
def test_the_site_lists_every_option_of_a_command() -> None:
    from declared_options import options_by_group

    for command, kinds in OPTIONS.items():
        listed = re.findall(r"^\| `--(\w+)", options_by_group(command), re.M)
        assert sorted(listed) == sorted({f.name for kind in kinds for f in fields(kind)})
    assert "`0.01`" in options_by_group("train")
    assert not {f.name for f in fields(Recipe)} & set(re.findall(r"`--(\w+)", options_by_group("preview", "train")))


@needs_sphinx
def test_links_lead_to_pages_of_the_site() -> None:
    from repository_links import adapted, included_pages

    found = included_pages(DOCS)
    assert found == {ROOT / "CHANGELOG.md": "changelog.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
    text = "[a](docs/data.md#x) [b](CHANGELOG.md) [c](#y) [d](https://a.b/c) [e](scripts/test) [`f`](recipes)\n"
    fence = "```\n[g](docs/data.md)\n```\n"
    adapted_text = "[a](data.md#x) [b](changelog.md) [c](#y) [d](https://a.b/c) [e](../scripts/test) `f`\n"
    assert adapted(text + fence, ROOT, DOCS, DOCS, found) == adapted_text + fence


def test_a_link_to_a_missing_page_or_anchor_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text('<h1 id="top"></h1><a href="b.html#here"></a><a href="#top"></a><img src="c.svg">')
    (tmp_path / "b.html").write_text('<a href="a.html#gone"></a><a href="https://example.org/x"></a>')
    assert sorted(faults_of(tmp_path)) == [
        "a.html: the link 'b.html#here' leads to no anchor.",
        "a.html: the link 'c.svg' leads to no file.",
        "b.html: the link 'a.html#gone' leads to no anchor.",
    ]


def test_the_text_of_an_executed_page_leaves_out_figures_and_what_varies() -> None:
    def cell(*outputs: object, **metadata: object) -> dict[str, object]:
        return {"cell_type": "code", "metadata": metadata, "outputs": outputs}

    def shown(**data: str) -> dict[str, object]:
        return {
            "output_type": "display_data",
            "data": {k.replace("_", "/"): v for k, v in data.items()},
            "metadata": {},
        }

    printed = {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]}
    logged = {"output_type": "stream", "name": "stderr", "text": "c\n"}
    glued = {
        "output_type": "display_data",
        "data": {"application/papermill.record/text/plain": "0.5"},
        "metadata": {"scrapbook": {"name": "loss"}},
    }
    notebook = {
        "cells": [
            cell(printed, logged, shown(text_plain="x  1", text_html="<b>")),
            cell(shown(text_plain="<Figure>", image_svg="<svg>"), glued),
            cell(printed, tags=["varies"]),
            {"cell_type": "markdown", "metadata": {}},
        ]
    }
    assert list(texts_of(json.loads(json.dumps(notebook)))) == ["a\nb", "x  1", "loss = 0.5"]
