"""Hashes of files, and their way to the disk, in threads beside what is written after them.

A file's hash needs a core and its way to the disk needs the disk, while writing the next file needs
another core: begun as soon as a file is written, both cost little time of their own. Files that
reach the disk at the same time share the file system's commits.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from fastclr.files import keep_from_others, sha256_of, sync

_THREADS = 6  # most of them wait for the disk


class Seals:
    """Hashes and syncs what this rank writes into a folder; a context, at whose end all is over.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="fastclr-seal")
        self._hashes: dict[str, Future[str]] = {}
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Seals:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def begin(self, file: Path) -> None:
        """Begin to hash and sync a file of the folder that is written, and keep it from others."""
        keep_from_others(file)
        name = file.relative_to(self._folder).as_posix()
        self._hashes[name] = self._threads.submit(sha256_of, file)
        self.sync(file)

    def write_text(self, file: Path, text: str) -> None:
        """Write a text that nobody reads before it is on the disk, and begin to sync it."""
        file.write_text(text, encoding="utf-8")
        self.sync(file)

    def sync(self, path: Path) -> None:
        """Begin to sync a file, or a folder's list of names."""
        self._synced.append(self._threads.submit(sync, path))

    def hashes(self) -> dict[str, str]:
        """Wait for the hashes; return them by name.

        Raises:
            OSError: If a file cannot be read.
        """
        return {name: found.result() for name, found in self._hashes.items()}

    def wait(self) -> None:
        """Wait until all that was begun is on the disk.

        Raises:
            OSError: If something cannot be written.
        """
        for done in self._synced:
            done.result()
