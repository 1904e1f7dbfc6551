"""Fine-tune an image classifier.

    python recipes/image_classification.py --config recipes/image_classification.yaml   # packaged digits, new model
    python recipes/image_classification.py --model google/vit-base-patch16-224 --train_data AI-Lab-Makerere/beans \\
        --val_data AI-Lab-Makerere/beans --batch_size 16 --effective_batch_size 64
    python recipes/image_classification.py --model google/vit-base-patch16-224 --train_data photos \\
        --output_dir outputs/mine
    accelerate launch --config_file recipes/two_cpu_processes.yaml recipes/image_classification.py \\
        --config recipes/image_classification.yaml

It takes any model that `AutoModelForImageClassification` loads. The data are folders with a sub-folder of images for
each class, files with a column of image paths, or Hub data sets with images. No package has a pretrained image model,
so the default is a small vision transformer with random weights. The saved model in OUTPUT_DIR/model loads with
`pipeline("image-classification", model=...)`.
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
        task="image-classification",
        model=packaged.SMALL_VIT,
        train_data=packaged.DIGITS_TRAIN,
        val_data=packaged.DIGITS_VAL,
    )
