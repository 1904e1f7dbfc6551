"""Upload a trained model to the Hugging Face Hub, and check before training that this is possible."""

import json
from concurrent.futures import TimeoutError as NoAnswerError
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from ..errors import SettingsError
from ..insight.model_card import CARD, is_unchanged_card
from ..rules.repository import is_repository_name
from ..runtime.background import start_thread
from ..runtime.log import logger
from .saved_model import ADAPTER

_PATIENCE = 60.0  # seconds for the check: the hub's client itself waits for as long as the network does
# Weights that an earlier upload left there: `from_pretrained` may prefer them to those of the new model.
_WEIGHTS = [
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_model.bin",
    ADAPTER,
]
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."


def check_hub(name: str) -> str:
    """Check that this user can upload to a repository on the hub. Create it if it is missing, as a private one.

    Args:
        name: "user/name", or "name" for a repository of the user.

    Returns:
        the full name of the repository.

    Raises:
        SettingsError: if there is no login, no network, or no permission, with one message for the first of these.
    """
    if constants.HF_HUB_OFFLINE:
        raise _refused(
            name,
            "the hub is in offline mode: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set",
            f"Unset it, or {_afterwards(name)}",
        )
    try:
        return start_thread(lambda: _open_repository(name)).result(timeout=_PATIENCE)
    except SettingsError:
        raise
    except NoAnswerError as error:
        raise _unreachable(name, f"not within {_PATIENCE:.0f} s") from error
    except HfHubHTTPError as error:
        raise _refused_by_hub(name, error) from error
    except Exception as error:
        raise _unreachable(name, describe_error(error)) from error


def upload_model(folder: Path, repository: str) -> None:
    """Upload a model's folder to an existing repository. Remove older weights there, and leave its other files.

    The model card replaces only one that ftaccum wrote and nobody has edited. If the hub refuses its metadata, the
    model is uploaded without it.

    Raises:
        Exception: of many types, if anything fails.
    """
    if not _sends_card(folder, repository):
        _upload(folder, repository, [CARD])
        return
    try:
        _upload(folder, repository, None)
    except ValueError as error:  # the documented error for a card, which is checked before anything is sent
        _upload(folder, repository, [CARD])
        why = " ".join(str(error).split())
        logger.warning(
            f"The hub refuses the metadata of the model card, so {CARD} is not uploaded: {why} "
            f"Correct {str(folder / CARD)!r}, and upload it with `hf upload {repository} FILE {CARD}`."
        )


def _upload(folder: Path, repository: str, ignored: list[str] | None) -> None:
    HfApi().upload_folder(
        repo_id=repository,
        folder_path=folder,
        commit_message="Upload the trained model",
        ignore_patterns=ignored,
        delete_patterns=_WEIGHTS,
    )


def address_of(repository: str) -> str:
    """Return the address of a repository on the hub."""
    return f"{constants.ENDPOINT}/{repository}"


def describe_error(error: BaseException) -> str:
    """Return an error of the hub's client in one line, without the address and the number of the request."""
    if isinstance(error, KeyboardInterrupt):
        return "Ctrl-C stopped it"
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f"HTTP {error.response.status_code}: {(error.server_message or _first_line(error)).rstrip('.')}"
    return f"{type(error).__name__}: {_first_line(error).rstrip('.')}"


def _open_repository(name: str) -> str:
    """Create a repository unless it exists, and return its full name. Raise an error if it cannot be written to."""
    if get_token() is None:
        raise _refused(name, "nobody is logged in to the hub on this machine", _LOG_IN)
    api = HfApi()
    user = api.whoami()["name"]
    repository = name if "/" in name else f"{user}/{name}"
    api.create_repo(repository, private=True, exist_ok=True)
    # Creating a repository that exists succeeds without write access. This announces an upload, and uploads nothing.
    api.preupload_lfs_files(repository, additions=[CommitOperationAdd("config.json", b"")])
    return repository


def _refused_by_hub(name: str, error: HfHubHTTPError) -> SettingsError:
    status = error.response.status_code
    if status == 401:
        return _refused(name, f"the hub does not accept the token ({describe_error(error)})", _LOG_IN)
    if status == 403:
        remedy = (
            "Use a token with write access to it, and the name of a repository of yours or of an organization that "
            "you can write to."
        )
        return _refused(name, f"your token cannot write there ({describe_error(error)})", remedy)
    return _refused(name, f"the hub refuses it ({describe_error(error)})", f"Try again, or {_afterwards(name)}")


def _unreachable(name: str, why: str) -> SettingsError:
    return _refused(name, f"{constants.ENDPOINT} does not answer ({why})", f"Check the network, or {_afterwards(name)}")


def _refused(name: str, why: str, remedy: str) -> SettingsError:
    return SettingsError([f"`push_to_hub` is {name!r}, but {why}. {remedy}"])


def _afterwards(name: str) -> str:
    return f"leave `push_to_hub` out and upload the model after the run: `hf upload {name} FOLDER --private`."


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _sends_card(folder: Path, repository: str) -> bool:
    """Return whether the card in a folder is to be uploaded. If that of the repository stays, log this."""
    if not (folder / CARD).is_file():
        return False
    is_own = is_unchanged_card((folder / CARD).read_text(encoding="utf-8"))
    if not is_own and _has_local_base(folder):
        return False
    there = _card_of(repository)
    if there is None or is_unchanged_card(there):
        return True
    logger.info(
        f"{repository!r} has a {CARD} that was written or edited by hand. It stays as it is; the model card of this "
        f"run is {str(folder / CARD)!r}."
    )
    return False


def _card_of(repository: str) -> str | None:
    """Return the text of a repository's card; None if it has none."""
    if not HfApi().file_exists(repository, CARD):
        return None
    with TemporaryDirectory() as folder:  # `ModelCard.load` keeps it in the cache, and fails on metadata of others
        file = hf_hub_download(repository, CARD, local_dir=folder)
        return Path(file).read_text(encoding="utf-8", errors="replace")


def _has_local_base(folder: Path) -> bool:
    """Return whether a folder has adapters of a model on this machine. The hub refuses PEFT's README.md of these."""
    try:
        base = json.loads((folder / ADAPTER).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError):
        return False
    return not is_repository_name(base) or Path(base).exists()
