"""Tar blocks written by hand: POSIX USTAR, the same bytes as Python's tarfile, much faster."""

from __future__ import annotations

BLOCK = 512
RECORD = 20 * BLOCK  # a tar's length is a multiple of it

_MAX_SIZE = 8**11 - 1  # what 11 octal digits hold
# After the size: time 0, checksum (spaces while it is summed), type of a plain file, no link,
# magic, version, no names of owners, no device, no prefix.
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + bytes(64 + 16 + 155 + 12)
_FIXED_SUM = sum(_BEFORE_SIZE) + sum(_TIME) + 8 * ord(" ") + sum(_AFTER_CHECKSUM)


def header(name: bytes, size: int) -> bytes:
    """Return the 512 bytes before a member: mode 644, owner 0, time 0.

    Args:
        name: Up to 100 bytes.
        size: Bytes of the member, below 8 GiB.
    """
    if len(name) > 100 or not 0 <= size <= _MAX_SIZE:
        raise ValueError(f"a USTAR header cannot hold {name!r} with {size} bytes")
    digits = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(name) + sum(digits)
    return b"%b%b%b%b%06o\0 %b" % (
        name.ljust(100, b"\0"),
        _BEFORE_SIZE,
        digits,
        _TIME,
        checksum,
        _AFTER_CHECKSUM,
    )


def padding(size: int) -> bytes:
    """Return the zeros that fill a member's last block."""
    return bytes(-size % BLOCK)


def end(size: int) -> bytes:
    """Return what closes a tar of ``size`` bytes: two empty blocks, filled to a whole record."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % RECORD)
