"""Search for accumulation steps and learning rate at a fixed physical batch, and train with the best trial.

    python recipes/search.py --config recipes/search.yaml              # packaged encoder and reviews
    python recipes/search.py --config recipes/search.yaml --n_trials 40                # resumes the search
    python recipes/search.py --config recipes/search.yaml --workers 2                  # two processes, a trial each
    python recipes/search.py --model bert-base-uncased --train_data nyu-mll/glue:sst2 --text_columns sentence \\
        --batch_size 16
    python recipes/search.py --model bert-base-uncased --train_data reviews.csv --batch_size 16 \\
        --storage postgresql://me@host/searches --study_name reviews                      # run this on many machines
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/search.py \\
        --config recipes/search.yaml --output_dir outputs/search2                         # two processes per trial

The options are those of `ftaccum search`. It writes `report.html` with curves and tables, and `study.db` for
`optuna-dashboard`, into OUTPUT_DIR. With `--refit` it trains the best trial again and saves the model in
OUTPUT_DIR/best/model, which loads with `pipeline("text-classification", model=...)`. It takes any model that
`AutoModelForSequenceClassification` loads, and files or Hub data sets with a text and a label column.
"""

from optuna import Study

import ftaccum
import packaged


def main(options: ftaccum.ScriptOptions) -> Study:
    packaged.prepare(*options.data.values())
    return ftaccum.search(**ftaccum.load_task(**options.data).search_arguments(), **options.settings)


if __name__ == "__main__":
    ftaccum.run_script(
        main,
        __doc__,
        task="text-classification",
        for_search=True,
        model=packaged.MINILM,
        train_data=packaged.MOVIES_TRAIN,
        output_dir="outputs/search",
    )
