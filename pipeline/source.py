"""What is curated, as it was when it was listed: a file, a member of a tar or an object."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Source:
    """One file, member of a tar or object, as it was when it was listed."""

    uri: str
    size: int
    mtime_ns: int  # a member's is its tar's; 0 for an object with an etag
    sha256: str | None = None  # known only where another source has the same size, or all is hashed
    copies: tuple[Source, ...] = ()  # other sources with the same bytes
    etag: str | None = None  # an object's; a member's says where it lies in which state of its tar

    @property
    def aliases(self) -> tuple[str, ...]:
        """The other sources with the same bytes."""
        return tuple(copy.uri for copy in self.copies)

    @property
    def identity(self) -> tuple[str, int, int, str | None]:
        """What must be unchanged for earlier work to count."""
        return (self.uri, self.size, self.mtime_ns, self.etag)
