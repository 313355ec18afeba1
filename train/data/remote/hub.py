"""Tokenizers by their name on a hub of models: huggingface.co, or the one that HF_ENDPOINT names."""

import logging
import re
from pathlib import Path

from train.errors import UserError

_WHY = {401: "not there, or private: set HF_TOKEN", 403: "you have no access to it", 404: "not there"}
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_hub_name(name: str) -> bool:
    """Whether a name can only be a hub's, as `owner/name` or `owner/name@revision`: nothing here is called so."""
    return bool(_NAME.fullmatch(name)) and not name.startswith((".", "-")) and not Path(name).exists()


def from_hub(name: str, *files: str) -> Path:
    """Folder with the first of the named files of a hub's repository, and those of the others that it has.

    They are kept in the library's own cache, which is asked when the hub cannot be reached.

    Raises:
        UserError: the hub cannot be reached and the files are not in the cache, or it refuses, or has no such file.
    """
    # Of tokenizers' dependencies.
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    # It reports each of its tries, for half a minute, and at last raises; that is told below.
    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    repository, _, revision = name.partition("@")
    first, *others = files
    try:
        found = Path(hf_hub_download(repository, first, revision=revision or None)).parent
        for file in others:
            try:
                hf_hub_download(repository, file, revision=revision or None)
            except (EntryNotFoundError, LocalEntryNotFoundError):
                continue
    except (OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            why = f"answers {status} for its {first} ({_WHY.get(status, _told(cause))})"
        else:
            why = f"cannot be reached ({_told(cause)}); give a tokenizer.json"
        raise UserError(f"tokenizer {name}: no such file or folder here, and {constants.ENDPOINT} {why}") from None
    return found


def _told(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
