"""Which URLs are read, where a redirect may lead, and how a URL is printed."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

from fastclr.config import ConfigError

PROTOCOLS = ("http", "https", "s3", "gs", "az", "file", "memory")

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 inside IPv6 (RFC 6052)
# Where clouds hand out credentials to whoever asks from their machine.
_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local: AWS, Azure, Google and most others
        "fe80::/10",
        "fd00:ec2::254/128",  # AWS
        "fd20:ce::254/128",  # Google
        "100.100.100.200/32",  # Alibaba
        "192.0.0.192/32",  # Oracle
        "168.63.129.16/32",  # Azure
    )
)


def redacted(url: str) -> str:
    """Return a URL fit to print: without user, password, query and fragment.

    Signed URLs carry their signature in the query. What cannot be told apart is left out too.
    """
    bare = re.split("[?#]", url, maxsplit=1)[0]
    mark = url[len(bare) : len(bare) + 1]
    scheme, slashes, rest = bare.partition("://")
    authority, slash, path = rest.partition("/")
    _, at, host = authority.rpartition("@")
    later = url[len(scheme + slashes + authority) :]
    if "@" in later and (at or ":" in authority):
        return f"{scheme}://***"  # a password with @ and / or ? in it
    if not slashes and "@" in url and ":" in url:
        return "***"
    if at:
        bare = f"{scheme}://***@{host}{slash}{path}"
    text = bare + (f"{mark}***" if mark else "")
    return text if text.isprintable() else ascii(text)


def redacted_urls(text: str) -> str:
    """Return a text with the URLs in it redacted."""
    return _URL_IN_TEXT.sub(lambda found: redacted(found[0]), text)


def redacted_text(text: str) -> str:
    """Return another program's words, with the URLs in them redacted, on one short line."""
    line = " ".join(redacted_urls(text).split())
    return line if len(line) <= 200 else line[:200] + "..."


def protocol_of(url: str) -> str:
    """Return which of :data:`PROTOCOLS` reads a URL; a plain path is a ``file``.

    Raises:
        ConfigError: If it is another protocol (``pipe:`` would run a shell), chained, or no URL.
    """
    scheme = _SCHEME.match(url)
    protocol = scheme[1].lower() if scheme else "file"
    if protocol not in PROTOCOLS or not url or not url.isprintable():
        raise ConfigError(
            f"{redacted(url)!r} cannot be read: only {', '.join(PROTOCOLS)} URLs and plain paths "
            "of printable characters are; others could run programs. Name such a URL."
        )
    if protocol in ("http", "https"):
        try:
            parts = urlsplit(url)
            usable = bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"{redacted(url)!r} names no host: give {protocol}://HOST/PATH.")
    return protocol


def is_internal(address: str) -> bool:
    """Whether an IP address is not one of the public internet (loopback, private, link-local)."""
    return not all(ip.is_global and not ip.is_multicast for ip in _meanings(address))


def _meanings(address: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Return an address and the IPv4 addresses that it wraps."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 4:
        return [ip]
    if ip.ipv4_mapped:
        return [ip.ipv4_mapped]
    wrapped = [ip.sixtofour, *(ip.teredo or ())]
    if ip in _NAT64:
        wrapped.append(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
    return [ip, *(inner for inner in wrapped if inner)]


def refused(addresses: Sequence[str]) -> str | None:
    """Say why a host is not asked; None if it may be.

    Hosts of the own network are asked only if ``FASTCLR_ALLOW_INTERNAL=1`` says so, whoever named
    them: a flag, a listing or a table. Where clouds hand out credentials nobody asks.

    Args:
        addresses: All IP addresses of the host, as they will be connected to.
    """
    for address in addresses:
        if any(ip in network for ip in _meanings(address) for network in _METADATA):
            return f"{address} is link-local or a cloud's metadata server, which is never asked"
    if os.environ.get("FASTCLR_ALLOW_INTERNAL") == "1":
        return None
    for address in filter(is_internal, addresses):
        return (
            f"{address} is an internal address: set FASTCLR_ALLOW_INTERNAL=1 if your own storage "
            "is there"
        )
    return None


def redirect_refused(
    old: str, new: str, addresses: Sequence[str], *, named_is_internal: bool
) -> str | None:
    """Say why a redirect is not followed; None if it may be.

    A server of the internet must not make this machine ask its own network for it: with
    ``FASTCLR_ALLOW_INTERNAL=1`` too, only an internal host leads to an internal one.

    Args:
        old: URL that was asked.
        new: URL it points to.
        addresses: All IP addresses of the new host, as they will be connected to.
        named_is_internal: Whether the first URL of the chain lies in the own network.
    """
    schemes = urlsplit(old).scheme, urlsplit(new).scheme
    if schemes[0] != schemes[1] and schemes != ("http", "https"):
        return f"it changes {schemes[0]} to {schemes[1]}"
    if not named_is_internal:
        for address in filter(is_internal, addresses):
            return f"{address} is an internal address, {redacted(old)} is none"
    return refused(addresses)
