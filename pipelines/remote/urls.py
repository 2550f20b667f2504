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


def internal_refused(addresses: Sequence[str]) -> str | None:
    """Say why a host that is not trusted is not asked; None if it may be."""
    if os.environ.get("FASTCLR_ALLOW_INTERNAL") == "1":
        return None
    for address in filter(is_internal, addresses):
        return f"{address} is an internal address (FASTCLR_ALLOW_INTERNAL=1 would allow it)"
    return None


def link_local_refused(addresses: Sequence[str]) -> str | None:
    """Say why a host that was named is not asked: clouds hand out credentials there."""
    return internal_refused([a for a in addresses if any(ip.is_link_local for ip in _meanings(a))])


def redirect_refused(
    old: str, new: str, addresses: Sequence[str], *, named_is_internal: bool
) -> str | None:
    """Say why a redirect is not followed; None if it may be.

    A server that is not trusted must not make this machine ask its own network for it: internal
    addresses are refused unless the URL that was named is internal itself, link-local ones (where
    clouds hand out credentials) even then. ``FASTCLR_ALLOW_INTERNAL=1`` lifts both.

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
        return internal_refused(addresses)
    return link_local_refused(addresses)
