"""WebDataset shards, also our own packed sets: one image a sample, its class from .cls or .json."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from fastclr.config import ConfigError
from pipelines.sources.images import Listing, SourceImage, SourceOptions, not_empty
from pipelines.sources.opening import shown
from pipelines.sources.tables import class_from
from pipelines.sources.tars import Member, members_of

_IMAGES = ("jpg", "jpeg", "png", "webp")
_MAX_LABEL_BYTES = 1 << 20


def list_samples(
    tars: Iterable[tuple[str, Path]],
    source: str,
    options: SourceOptions,
    class_names: list[str] | None = None,
) -> Listing:
    """List the samples of WebDataset tars, tar after tar, in their order.

    Args:
        tars: What each was given by, and where it lies on local disk; taken one by one.
        source: What all were given by, for messages.
        options: ``image_column`` names the image's extension where samples have several,
            ``label_column`` a field of the samples' ``.json`` that holds the class.
        class_names: What the numbers in ``.cls`` mean, if the source says it.

    Returns:
        Images named ``shard.tar/key``. A sample without image is an image of 0 bytes.
    """

    def images() -> Iterator[SourceImage]:
        for given, tar in tars:
            members = members_of(tar, shown(given), lambda _: None)
            with tar.open("rb") as stream:
                for key, group in groupby(members, lambda member: _split(member.name)[0]):
                    sample = _Sample(shown(given), key, stream.fileno(), list(group))
                    yield sample.image(str(tar.absolute()), options, class_names)

    return Listing(not_empty(source, images()), class_names if options.labels else None)


def holds_samples(tar: Path, source: str) -> bool:
    """Whether the first files of a tar are an image and its .cls, .json or .txt: WebDataset's.

    Raises:
        ConfigError: If its beginning is damaged.
    """
    with closing(members_of(tar, source, lambda _: None)) as members:
        first = [_split(member.name) for member in islice(members, 4)]
    ends = {end for key, end in first if key == first[0][0]}
    return any(end in _IMAGES for end in ends) and bool(ends & {"cls", "json", "txt"})


def _split(name: str) -> tuple[str, str]:
    """Split a member's name at the first dot of its last part, as WebDataset does."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


class _Sample:
    """The members of one key."""

    def __init__(self, shard: str, key: str, descriptor: int, members: list[Member]) -> None:
        self._where = f"{shard}, sample {key!r},"
        self._name = f"{shard.rpartition('/')[2]}/{key}"
        self._descriptor = descriptor
        self._members = {_split(member.name)[1]: member for member in members}
        if len(self._members) != len(members):
            raise ConfigError(
                f"{self._where} has a member twice ({', '.join(m.name for m in members)[:200]}): "
                "which is meant is unknown. Write the shard anew."
            )

    def image(self, url: str, options: SourceOptions, class_names: list[str] | None) -> SourceImage:
        """Find the image and the class."""
        label = self._label(options) if options.labels else None
        class_name = class_from(label, self._where, class_names)
        member = self._image_member(options)
        if member is None:
            return SourceImage(f"{self._name} (no image member)", class_name, url, 0, 0)
        return SourceImage(self._name, class_name, url, member.offset, member.num_bytes)

    def _image_member(self, options: SourceOptions) -> Member | None:
        """Return the one member that is the image; refuse to choose among several."""
        if options.image_column:
            return self._members.get(options.image_column.lower().lstrip("."))
        plain = [e for e in self._members if e in _IMAGES]
        found = plain or [e for e in self._members if e.rpartition(".")[2] in _IMAGES]
        if len(found) > 1:
            raise ConfigError(
                f"{self._where} has several images ({', '.join(found)}): say which with "
                "--image-column EXTENSION."
            )
        return self._members[found[0]] if found else None

    def _label(self, options: SourceOptions) -> Any:
        """Read the class as the shard has it; None without."""
        if not options.label_column:
            text = self._text("cls")
            return None if text is None else text.strip()
        text = self._text("json")
        try:
            fields = json.loads(text or "{}")
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{self._where} has a .json that is no JSON ({error}).") from error
        if not isinstance(fields, dict) or options.label_column not in fields:
            has = (
                f"; it has {', '.join(map(str, fields))[:300]}" if isinstance(fields, dict) else ""
            )
            raise ConfigError(
                f"{self._where} has no {options.label_column!r} in its .json{has}. Choose another "
                "with --label-column, or switch labels off."
            )
        return fields[options.label_column]

    def _text(self, extension: str) -> str | None:
        """Read a small text member; None without it."""
        member = self._members.get(extension)
        if member is None:
            return None
        if member.num_bytes > _MAX_LABEL_BYTES:
            raise ConfigError(f"{self._where} has {member.num_bytes} bytes in .{extension}.")
        data = os.pread(self._descriptor, member.num_bytes, member.offset)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._where} has no UTF-8 text in .{extension}.") from error
