"""Fine-tune a text classifier.

    python recipes/text_classification.py --config recipes/text_classification.yaml       # packaged encoder and reviews
    python recipes/text_classification.py --model bert-base-uncased --train_data nyu-mll/glue:sst2 \\
        --text_columns sentence --batch_size 16 --effective_batch_size 256
    python recipes/text_classification.py --train_data train.csv --val_data val.csv --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/text_classification.py \\
        --config recipes/text_classification.yaml

It takes any model that `AutoModelForSequenceClassification` loads, and files or Hub data sets with a text and a label
column. The saved model in OUTPUT_DIR/model loads with `pipeline("text-classification", model=...)`.
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
        task="text-classification",
        model=packaged.MINILM,
        train_data=packaged.MOVIES_TRAIN,
        val_data=packaged.MOVIES_VAL,
    )
