"""Search for accumulation steps and learning rate at a fixed physical batch, and train with the best trial.

    python recipes/search.py --config recipes/search.yaml            # packaged encoder, 1,024 film reviews
    python recipes/search.py --config recipes/search.yaml --n_trials 40                # resumes the search
    python recipes/search.py --config recipes/search.yaml --workers 2                  # two processes, a trial each
    python recipes/search.py --model bert-base-uncased --train_data reviews.csv --batch_size 16 \\
        --storage postgresql://me@host/searches --study_name reviews                      # run this on many machines
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/search.py ...  # two processes per trial

The options are those of `ftaccum search`. It writes `report.html` with curves and tables and `study.db` for
`optuna-dashboard` into OUTPUT_DIR. With `--refit` it trains the best trial again and saves the model in `best/model`.

The first command takes about ten minutes on 2 CPU cores with bf16 units: 20 trials, pruned to 12,288 of 20,480 rows.
The best trial had k = 1, a learning rate of 8.9e-5, a validation loss of 0.443 and an accuracy of 80.5% on the 512
held-out sentences.
"""

from accelerate import PartialState
from optuna import Study

import packaged
from ftaccum import ScriptOptions, load_task, run_script, search


def main(options: ScriptOptions) -> Study:
    packaged.prepare(*options.data.values())
    study = search(**load_task(**options.data).search_arguments(), **options.settings)
    if study.best_trials:
        best = study.best_trial
        PartialState().print(f"Held-out accuracy of the best: {best.user_attrs['metrics']['accuracy']:.1%}")
    return study


if __name__ == "__main__":
    run_script(
        main,
        __doc__,
        task="text-classification",
        searches=True,
        model=packaged.MINILM,
        train_data=packaged.MOVIES_TRAIN,
        output_dir="outputs/search",
    )
