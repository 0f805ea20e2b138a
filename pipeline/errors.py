"""The errors that a user is shown: what is wrong, with which thing, and what to do."""

from __future__ import annotations


class UnimodalError(Exception):
    """A problem that the user can mend; shown as one line, without a traceback.

    The message names the thing (path, key, value) and ends with the remedy.
    """

    exit_code = 1


class UsageError(UnimodalError):
    """The command was called wrongly (unknown setting, recipe or combination of options)."""

    exit_code = 2


class MediaError(UnimodalError):
    """One source cannot be read; the source goes to quarantine with this reason."""

    def __init__(self, reason: str, path: object = None) -> None:
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason
