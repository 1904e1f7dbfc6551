"""Train a language model on plain text, with an update of a given number of tokens.

    python recipes/causal_lm.py --config recipes/causal_lm.yaml             # a small Llama from scratch, a dictionary
    python recipes/causal_lm.py --model HuggingFaceTB/SmolLM2-135M --train_data HuggingFaceFW/fineweb-edu:sample-10BT \\
        --streaming --validation_split 0 --max_updates 1000 --max_length 2048 --batch_size 4 --tokens_per_update 524288
    python recipes/causal_lm.py --train_data corpus.txt --packing --max_length 512 --tokens_per_update 65536
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/causal_lm.py --config recipes/causal_lm.yaml

It takes any model that `AutoModelForCausalLM` loads, and files or Hub data sets with a text column. `--packing` joins
the texts and splits them into rows of `--max_length` tokens. The saved model in OUTPUT_DIR/model loads with
`pipeline("text-generation", model=...)`.
"""

import math

from accelerate import PartialState

import ftaccum
import packaged


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    packaged.prepare(*options.data.values())
    loaded = ftaccum.load_task(**options.data)
    result = ftaccum.test_fine_tuning(**loaded.arguments(), **options.settings)
    if result.val_loss_history:
        before, after = math.exp(result.initial_loss), math.exp(result.val_loss_history[-1])
        PartialState().print(f"Held-out perplexity: {before:.1f} before, {after:.1f} after")
    return result


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="causal-lm",
        model=packaged.SMALL_LLAMA,
        train_data=packaged.GLOSSES_TRAIN,
        val_data=packaged.GLOSSES_VAL,
    )
