"""Hand-offs on the Hugging Face Hub, by the optional package huggingface_hub."""

import re
import sys
from pathlib import Path

from pretrain.outcome import ExitCode, UserError

_FINAL = {
    "ImportError", "ModuleNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "GatedRepoError",
    "HFValidationError",
}  # fmt: skip
"""What is raised where asking again is pointless."""


def fetch(name: str, files: list[str]) -> Path | None:
    """Download files of ``ORGANIZATION/NAME[@REVISION]`` into the Hub's cache on this machine, unless they are there.

    The commit that was taken is printed on stderr: a branch moves, and without a network the newest in the cache is
    taken. None: it is no such name. UserError: there is none, it cannot be reached, or huggingface_hub is missing.
    """
    if (parts := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)) is None:
        return None
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional

        folder = Path(snapshot_download(parts[1], revision=parts[2], allow_patterns=files))
    except Exception as error:  # noqa: BLE001 - its own, the HTTP library's and the system's, a dozen kinds
        reason, kind = " ".join(f"{error}".split())[:400], type(error).__name__
        way = "check the name and the network, and log in with `hf auth login` if it is private"
        if isinstance(error, ImportError):
            way = "pip install --constraint constraints.txt huggingface_hub, or give the path of a folder"
        raise UserError(
            f"{name} is not a folder, and it cannot be fetched from the Hugging Face Hub ({kind}: {reason}): {way}",
            ExitCode.WILL_FAIL_AGAIN if kind in _FINAL else ExitCode.RETRY,
        ) from None
    print(f"{name}: commit {folder.name} of the Hugging Face Hub", file=sys.stderr)  # noqa: T201
    return folder
