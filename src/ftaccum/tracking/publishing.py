"""Upload the model of a finished run, without losing anything if that fails."""

import shlex
from contextlib import suppress
from dataclasses import replace

from ..runtime.log import logger
from ..runtime.run_dir import RunDir
from .hub import address_of, describe_error, upload_model
from .result import Result


def publish(result: Result, run_dir: RunDir, repository: str) -> list[str]:
    """Upload the model that a run has saved.

    This raises no errors: the run is complete, and its model is saved.

    Args:
        result: the result, as it is saved in the folder.
        run_dir: the folder of the run. If the upload fails, the result there is replaced.
        repository: the full name of the repository.

    Returns:
        the sentences of `unwritten`, with one more if the model was not uploaded.
    """
    if result.unwritten:
        why, folder = "some outputs of the run could not be written", "FOLDER"  # `model` may be that of an earlier run
    else:
        logger.info(f"Uploading the model to {address_of(repository)}")
        try:
            upload_model(run_dir.model, repository)
        except (Exception, KeyboardInterrupt) as error:
            why, folder = describe_error(error), shlex.quote(str(run_dir.model))
        else:
            logger.info(f"The model is on the hub: {address_of(repository)}")
            return result.unwritten
    fault = f"The model was not uploaded to {repository!r}: {why}. To upload it, run `hf upload {repository} {folder}`."
    unwritten = [*result.unwritten, fault]
    with suppress(OSError):
        replace(result, unwritten=unwritten).save(run_dir.result)
    return unwritten
