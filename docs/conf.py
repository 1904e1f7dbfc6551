"""Configuration of the documentation site, which `scripts/docs` builds."""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / "src"), str(DOCS / "extensions")]

import ftaccum  # noqa: E402

project = "ftaccum"
author = "The authors of ftaccum"
copyright = "the authors of ftaccum, Apache-2.0"
version = release = ftaccum.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "repository_links",
    "declared_arguments",
    "declared_options",
    "docstrings",
    "table_cells",
]
exclude_patterns = ["_build", "examples", "teaching/outputs"]

# Pages: Markdown as GitHub shows it. `repository_links` adapts links to files outside this folder.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# Teaching pages: executed in each build, in a temporary folder, with this checkout's package.
nb_execution_mode = os.environ.get("FTACCUM_DOCS_EXECUTION", "force")
nb_execution_timeout = 600
suppress_warnings = [] if nb_execution_mode == "force" else ["myst-nb.lexer"]  # known from the kernel
nb_execution_raise_on_error = False  # a failed page is a warning, which fails the build, with its traceback
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_merge_streams = True  # a cell's printed lines are one block
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT / "recipes"), str(DOCS / "teaching")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Reference: docstrings in Google's style, with Markdown's backticks for code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_inherit_docstrings = False
autoclass_content = "both"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
nitpick_ignore_regex = [  # other projects' names, and types of attributes that are not public
    (r"py:.*", r"(torch|optuna|transformers|datasets|pandas|matplotlib)\..*"),
    (r"py:class", r"ftaccum\.(planning|apps)\..*"),
]
python_maximum_signature_line_length = 88

smartquotes_action = "D"  # dashes, but no other quotes: code and options are quoted in texts

html_theme = "furo"
html_title = "ftaccum"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
