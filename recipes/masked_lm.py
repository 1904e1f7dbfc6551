"""Train a masked language model on plain text.

    python recipes/masked_lm.py --config recipes/masked_lm.yaml     # packaged encoder and sentences of film reviews
    python recipes/masked_lm.py --model bert-base-uncased --train_data stanfordnlp/imdb \\
        --max_length 256 --batch_size 16 --effective_batch_size 256
    python recipes/masked_lm.py --train_data corpus.txt --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/masked_lm.py --config recipes/masked_lm.yaml

It takes any model that `AutoModelForMaskedLM` loads and whose tokenizer has a mask token. The data are text files, or
files or Hub data sets with a column of texts. The saved model in OUTPUT_DIR/model loads with
`pipeline("fill-mask", model=...)`.

The packaged encoder was trained to compare sentences and has no head for words. The head is new, except for the
embeddings, which it shares with the encoder.
"""

import ftaccum
import packaged


def main(options: ftaccum.ScriptOptions) -> ftaccum.Result:
    packaged.prepare(*options.data.values())
    loaded = ftaccum.load_task(**options.data)
    return ftaccum.test_fine_tuning(**loaded.arguments(), **options.settings)


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="masked-lm",
        model=packaged.MINILM,
        train_data=packaged.MOVIES_TRAIN,
        val_data=packaged.MOVIES_VAL,
    )
