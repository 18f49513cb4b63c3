"""Data files of object stores and web servers, found and opened by fsspec."""

from pathlib import PurePosixPath
from typing import IO, Any

from drumline.errors import DataError

_MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "generation", "checksum",
          "sha256", "ino")  # fmt: skip
"""What file systems of fsspec say of a file that changes with its content."""


class RemoteFile:
    """A file behind a URL, with those of `Path`'s members that readers use.

    `size`: in bytes, None where the server does not say.
    """

    def __init__(self, system: Any, path: str) -> None:
        self._system, self._path = system, path
        self._url = str(system.unstrip_protocol(path))
        self._name = PurePosixPath(path.partition("?")[0])
        self._info: dict[str, Any] = system.info(path)
        self.size: int | None = self._info.get("size")

    def __str__(self) -> str:
        return self._url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFile) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def suffix(self) -> str:
        """The last suffix of its name."""
        return self._name.suffix

    def with_suffix(self, suffix: str) -> PurePosixPath:
        """Its name with another last suffix."""
        return self._name.with_suffix(suffix)

    @property
    def stamp(self) -> list[Any]:
        """What changes when the file does, as far as its server says so."""
        marks = {key: str(self._info[key]) for key in _MARKS if self._info.get(key) is not None}
        return [self._url, self.size, marks]

    def open(self, mode: str) -> IO[bytes]:
        """Open the file to read bytes; it is fetched as it is read."""
        return self._system.open(self._path, mode)  # type: ignore[no-any-return]


def find_remote(pattern: str, options: dict[str, Any]) -> list[RemoteFile]:
    """The files of a URL: itself, what it matches, or all files in it and below, sorted.

    `options`: of the file system. DataError for none, and for what the server or fsspec refuses.
    """
    try:
        from fsspec.core import url_to_fs

        system, path = url_to_fs(pattern, **options)
        magic = "*[" if pattern.startswith(("http://", "https://")) else "*?["
        if any(character in path for character in magic):
            names = system.glob(path)
        elif system.isdir(path) and not system.isfile(path):
            names = system.find(path)
        else:
            names = [path]
        found = [RemoteFile(system, name) for name in sorted(names)]
    except ImportError as error:
        raise DataError(f"data.path: {pattern}: {error}") from None
    except FileNotFoundError:
        raise DataError(f"data.path: {pattern} does not exist") from None
    except Exception as error:  # each file system has its own
        raise DataError(
            f"data.path: {pattern} cannot be read: {type(error).__name__}: {error}"
        ) from None
    if not found:
        raise DataError(f"data.path: {pattern} matches no file")
    return found
