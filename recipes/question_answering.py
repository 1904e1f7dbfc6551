"""Fine-tune a model that finds the answer to a question in a text.

    python recipes/question_answering.py --config recipes/question_answering.yaml      # packaged encoder and questions
    python recipes/question_answering.py --model bert-base-uncased --train_data rajpurkar/squad \\
        --val_data rajpurkar/squad --max_length 384 --batch_size 8 --effective_batch_size 64
    python recipes/question_answering.py --train_data train.jsonl --val_data val.jsonl --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/question_answering.py \\
        --config recipes/question_answering.yaml

It takes any model that `AutoModelForQuestionAnswering` loads and that has a fast tokenizer. The data are files or Hub
data sets in the form of SQuAD. A text that is too long for the model is split into windows.

No package has questions that people wrote. The contexts of the packaged data are real addresses, and the questions are
generated from the labels of their words: "Which part is the city?". The saved model in OUTPUT_DIR/model loads with
`AutoModelForQuestionAnswering.from_pretrained(...)`.
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
        task="question-answering",
        model=packaged.MINILM,
        train_data=packaged.QUESTIONS_TRAIN,
        val_data=packaged.QUESTIONS_VAL,
    )
