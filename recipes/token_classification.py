"""Fine-tune a token classifier: a tag for each word.

    python recipes/token_classification.py --config recipes/token_classification.yaml   # packaged encoder and addresses
    python recipes/token_classification.py --model bert-base-cased --train_data lhoestq/conll2003 \\
        --val_data lhoestq/conll2003 --batch_size 16 --effective_batch_size 64
    python recipes/token_classification.py --train_data train.jsonl --val_data val.jsonl --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/token_classification.py \\
        --config recipes/token_classification.yaml

It takes any model that `AutoModelForTokenClassification` loads and that has a fast tokenizer. The data are files or Hub
data sets with a list of words and a list of tags in each row. The tags may be names such as "B-PER", plain classes or
class numbers. The packaged data are addresses in which each word is tagged as house number, street, city and so on. The
saved model in OUTPUT_DIR/model loads with `pipeline("token-classification", model=...)`.
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
        task="token-classification",
        model=packaged.MINILM,
        train_data=packaged.ADDRESSES_TRAIN,
        val_data=packaged.ADDRESSES_VAL,
    )
