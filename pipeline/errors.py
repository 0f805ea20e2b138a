"""The errors that a user is shown: what is wrong, with which thing, and what to do."""

from __future__ import annotations

import errno
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager


class UnimodalError(Exception):
    """A problem that the user can mend; shown as one line, without a traceback.

    The message names the thing (path, key, value) and ends with the remedy.
    """

    exit_code = 1
    shared = True
    """Whether all processes of a run have it, so that one of them speaks for all."""


class UsageError(UnimodalError):
    """The command was called wrongly (unknown setting, recipe or combination of options)."""

    exit_code = 2


class MediaError(UnimodalError):
    """One source cannot be read; the source goes to quarantine with this reason."""

    def __init__(self, reason: str, path: object = None) -> None:
        super().__init__(reason if path is None else f"{path}: {reason}")
        self.reason = reason


def first_line(error: Exception) -> str:
    """What an error says, in its first line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def reason(error: Exception) -> str:
    """What to tell the user of a source or clip that failed, without its path, on one line."""
    if isinstance(error, MediaError):
        return error.reason
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    return f"{type(error).__name__}: {error}".splitlines()[0][:500]


def full_disk(error: Exception, folder: object) -> UnimodalError | None:
    """What to tell the user if `error` says that there is no space for `folder`, else None."""
    if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
        return None
    return UnimodalError(
        f"{folder}: the disk is full; free some space and run the same command again"
    )


@contextmanager
def telling_full_disk(folder: object) -> Iterator[None]:
    """A full disk in the block is one line for the user, which names `folder`."""
    try:
        yield
    except OSError as error:
        raise full_disk(error, folder) or error from error


MOST_SHOWN = 3500
"""Characters of a line on a terminal: room for all known settings, not for a whole megabyte."""


def shown(text: object) -> str:
    """Text for a terminal, on one line: what would steer the terminal, or turn words around, is
    spelled out (\\x1b)."""
    line = " ".join(str(text)[: MOST_SHOWN + 1].split("\n")).strip()
    if len(line) > MOST_SHOWN:
        line = f"{line[:MOST_SHOWN]}…"
    return harmless(line)


def harmless(text: str, keep: str = "") -> str:
    """Text whose control characters are spelled out (\\x1b), all but those of `keep`."""
    return "".join(c if printed(c) or c in keep else ascii(c)[1:-1] for c in text)


def printed(c: str) -> bool:
    """Whether a character is seen, or shapes those beside it: not control, direction or private."""
    # Cc, Cf, Co, Cs, Cn; the joiners are letters' business in some scripts.
    return unicodedata.category(c)[0] != "C" or c in "\u200c\u200d"


def on_one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, on one line of at most so many characters; its name if it is mute."""
    return " ".join((str(error) or type(error).__name__).split())[:most]
