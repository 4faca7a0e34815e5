"""Hand-offs on the Hugging Face Hub, by the optional package huggingface_hub."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from pretrain.outcome import ExitCode, UserError

_REFUSALS = ("RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError", "HFValidationError")
"""What the library raises where asking again is pointless."""
_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")


def fetch(source: str, files: Sequence[str]) -> Path | None:
    """Download files of a repository into the Hub's cache on this machine, unless they are there.

    The commit that was taken is printed on stderr, since a branch moves, and since without a network the newest in the
    cache is taken. The library reads HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and tokens.

    Args:
        source: ``ORGANIZATION/NAME``, or with a branch, tag or commit ``...@REVISION``; otherwise the main branch.
        files: their names in the repository.

    Returns:
        the folder in the cache that holds them, as far as the repository has them; None: no name of a repository.

    Raises:
        UserError: huggingface_hub is not installed, there is no such repository or revision, or it cannot be reached.
    """
    if (parts := _NAME.fullmatch(source)) is None:
        return None
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional
    except ImportError as error:
        raise UserError(
            f"{source} is not a folder, and to look for it on the Hugging Face Hub huggingface_hub is needed "
            f"({error}): pip install --constraint constraints.txt huggingface_hub, or give the path of a folder"
        ) from None
    try:
        folder = Path(snapshot_download(parts["repository"], revision=parts["revision"], allow_patterns=list(files)))
    except Exception as error:  # noqa: BLE001  (its own, the HTTP library's and the system's, a dozen kinds)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise UserError(
            f"{source} is not a folder, and it cannot be fetched from the Hugging Face Hub ({reason}): check the name "
            "and the network, and log in with `hf auth login` if it is private",
            ExitCode.WILL_FAIL_AGAIN if type(error).__name__ in _REFUSALS else ExitCode.RETRY,
        ) from None
    print(f"{source}: commit {folder.name} of the Hugging Face Hub", file=sys.stderr)  # noqa: T201
    return folder
