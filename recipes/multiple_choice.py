"""Fine-tune a model that chooses the right one of several answers.

    python recipes/multiple_choice.py --config recipes/multiple_choice.yaml    # packaged encoder and reviews
    python recipes/multiple_choice.py --model bert-base-uncased --train_data Rowan/hellaswag \\
        --val_data Rowan/hellaswag --batch_size 4 --effective_batch_size 32
    python recipes/multiple_choice.py --train_data train.jsonl --val_data val.jsonl \\
        --columns context=question,label=right --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/multiple_choice.py \\
        --config recipes/multiple_choice.yaml

It takes any model that `AutoModelForMultipleChoice` loads. The data are files or Hub data sets with a text, a list of
choices, and the number, the letter or the text of the right one. The packaged task is to choose, of four sentences of
film reviews, the one that praises the film. The saved model in OUTPUT_DIR/model loads with
`AutoModelForMultipleChoice.from_pretrained(...)`.
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
        task="multiple-choice",
        model=packaged.MINILM,
        train_data=packaged.CHOICES_TRAIN,
        val_data=packaged.CHOICES_VAL,
    )
