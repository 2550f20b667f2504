"""One try to read an object over http(s), from the byte that is wanted on.

Not fsspec's http file system: on a loopback server it returned the short half of a body cut without
a Content-Length as if it were whole, would wait 300 s for a server that hangs, and had followed a
redirect to another host before anyone could look at its address. The standard library's reader has
none of that once every read has a time-out and redirects are taken by hand.
"""

from __future__ import annotations

import base64
import functools
import http.client
import io
import os
import socket
import ssl
from collections.abc import Mapping
from contextlib import closing
from typing import Any
from urllib.parse import quote, unquote, urljoin, urlsplit

from pipelines.errors import StorageError
from pipelines.remote.retries import (
    Again,
    Changed,
    Deadline,
    Final,
    Patience,
    refusal,
)
from pipelines.remote.transfer import Transfer
from pipelines.remote.urls import (
    is_internal,
    protocol_of,
    redacted,
    redirect_refused,
    refused,
)

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
_TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # what OpenSSL's defaults are replaced by
BLOCK = 1 << 18  # bytes asked of the socket at a time


def read(url: str, transfer: Transfer, deadline: Deadline, patience: Patience) -> None:
    """Read what is missing of an object into a transfer.

    Args:
        url: What to read.
        transfer: Where its bytes go.
        deadline: When to give up.
        patience: Time-outs.

    Raises:
        Again: If this try failed; what came before the failure stays.
        Final: If another try is useless.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastclr", "Connection": "close"}
    if transfer.received:
        headers["Range"] = f"bytes={transfer.received}-"
        if transfer.version.startswith('"'):
            headers["If-Match"] = transfer.version
    try:
        with closing(_Hop(url, deadline, patience).follow(headers)) as hop:
            _begin(hop.response, transfer)
            while block := hop.response.read1(BLOCK):
                transfer.add(block)
    except StorageError:  # of the sink
        raise
    except ssl.SSLCertVerificationError as error:
        raise Final(f"its certificate is not trusted: {error.verify_message}") from None
    except TimeoutError:
        raise Again(f"no byte came for {patience.read_seconds:g} s, or time was up") from None
    except socket.gaierror as error:
        raise Again(f"its host was not found ({error.strerror})") from None
    except (OSError, http.client.HTTPException) as error:
        raise Again(_said(error, transfer)) from None
    transfer.check_end()


def head(url: str, deadline: Deadline, patience: Patience) -> Mapping[str, str]:
    """Return the headers of an object.

    Raises:
        OSError: If they do not come.
        HTTPException: If what comes is no http.
        Final: If the answer is another, or a redirect leads where it must not.
        Again: Likewise, where asking again may help.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": "fastclr", "Connection": "close"}
    with closing(_Hop(url, deadline, patience, "HEAD").follow(headers)) as hop:
        if hop.response.status != 200:
            raise refusal(hop.response.status, None)
        return {name.lower(): value for name, value in hop.response.headers.items()}


def _said(error: Exception, transfer: Transfer) -> str:
    """Say what broke a connection; never the request, which may hold credentials."""
    text = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}{f' ({text})' if text else ''} after {transfer.received} bytes"


def _begin(response: http.client.HTTPResponse, transfer: Transfer) -> None:
    """Check status, length, range and version before the first byte of a body."""
    status, headers = response.status, response.headers
    if status in (412, 416) and transfer.received:
        raise Changed(f"status {status} when going on: it changed while it was read")
    if status not in (200, 206):
        raise refusal(status, headers.get("Retry-After"))
    if headers.get("Content-Encoding", "identity") != "identity":
        raise Final(f"it comes {headers['Content-Encoding']!r}-encoded, which was not asked for")
    version = headers.get("ETag") or headers.get("Last-Modified") or ""
    length = headers.get("Content-Length", "")
    if status == 206:
        _check_range(headers.get("Content-Range", ""), transfer)
        if version != transfer.version:
            raise Changed(f"it changed while it was read: {transfer.version}, now {version}")
        return
    if transfer.received:  # 200: the server knows no ranges, or sends the new object
        transfer.restart()
    total = int(length) if length.isdecimal() else None
    transfer.begin(total, version, ends_itself=response.chunked)


def _check_range(content_range: str, transfer: Transfer) -> None:
    """Check that a part is the one asked for, of an object of the same size."""
    unit, _, rest = content_range.partition(" ")
    span, _, total = rest.partition("/")
    first = span.partition("-")[0]
    fits = unit == "bytes" and first == str(transfer.received) and transfer.received > 0
    if fits and transfer.total is None and total.isdecimal():  # it came in chunks before
        transfer.total = int(total)
    if not fits or total != str(transfer.total):
        raise Changed(
            f"bytes from {transfer.received} of {transfer.total} were asked for, "
            f"{content_range[:60]!r} came"
        )


class _Hop:
    """A connection and its answer; :meth:`follow` goes on to where redirects lead.

    The host is resolved once, its addresses are judged, and those very addresses are connected to:
    a name that resolves differently the second time changes nothing.
    """

    def __init__(
        self, url: str, deadline: Deadline, patience: Patience, method: str = "GET"
    ) -> None:
        self.url, self._deadline, self._patience = url, deadline, patience
        self._method = method
        self._parts = urlsplit(url)
        self._tls = self._parts.scheme == "https"
        self._port = self._parts.port or (443 if self._tls else 80)
        self.origin = (self._parts.scheme, self._parts.hostname, self._port)
        host = self._parts.hostname or ""
        found = socket.getaddrinfo(host, self._port, type=socket.SOCK_STREAM)
        self.addresses = [str(entry[4][0]) for entry in found]
        self.response: http.client.HTTPResponse
        self._raw: socket.socket | None = None

    def follow(self, headers: dict[str, str]) -> _Hop:
        """Ask, and follow at most 5 redirects; return the hop with the last answer, to be closed.

        Raises:
            Final: If the URL or a redirect leads where it must not.
            Again: If there are too many of them.
        """
        if reason := refused(self.addresses):
            raise Final(f"it is not asked: {reason}")
        named, hop = self, self
        named_is_internal = any(map(is_internal, named.addresses))
        authorization = _basic(named.url)
        try:
            for _ in range(MAX_REDIRECTS + 1):
                # Credentials of the URL are for the host that it names alone.
                mine = authorization if hop.origin == named.origin else {}
                hop._ask(headers | mine)
                location = hop.response.headers.get("Location")
                if hop.response.status not in REDIRECTS or not location:
                    return hop
                hop.close()
                hop = hop._next(location, named_is_internal)
            raise Again(f"more than {MAX_REDIRECTS} redirects")
        except BaseException:
            hop.close()
            raise

    def _next(self, location: str, named_is_internal: bool) -> _Hop:
        """Return the hop a redirect leads to, judged but not yet connected."""
        where = "its redirect"
        try:
            url = urljoin(self.url, location)
            where = f"its redirect to {redacted(url)}"
            # Once before the name is looked up: other schemes have no host.
            reason = redirect_refused(self.url, url, (), named_is_internal=named_is_internal)
            if reason:
                raise Final(f"{where} is not followed: {reason}")
            protocol_of(url)
        except ValueError:
            raise Final(f"{where} is no URL") from None
        hop = _Hop(url, self._deadline, self._patience, self._method)
        reason = redirect_refused(self.url, url, hop.addresses, named_is_internal=named_is_internal)
        if reason:
            raise Final(f"{where} is not followed: {reason}")
        return hop

    def _ask(self, headers: dict[str, str]) -> None:
        """Connect, send the request and read the head of the answer."""
        host = self._parts.hostname or ""
        connection = http.client.HTTPConnection(host, self._port)
        # http.client leaves port 443 out of the Host header only in its own https class.
        connection.default_port = 443 if self._tls else 80
        self._raw = self._connect(host)
        timed: Any = _TimedSocket(self._raw, self._deadline, self._patience.read_seconds)
        connection.sock = timed
        path = quote(self._parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = quote(self._parts.query, safe="/%:@!$&'()*+,;=~?")
        connection.request(self._method, path + (f"?{query}" if query else ""), headers=headers)
        self.response = connection.getresponse()

    def _connect(self, host: str) -> socket.socket:
        """Return a connected socket; the addresses are tried one after the other."""
        error = OSError("no address")
        for address in dict.fromkeys(self.addresses):
            limit = self._deadline.limit(self._patience.connect_seconds)
            try:
                raw = socket.create_connection((address, self._port), timeout=limit)
            except OSError as failed:
                error = failed
                continue
            if not self._tls:
                return raw
            try:
                return _trust(*map(os.environ.get, _TRUST)).wrap_socket(raw, server_hostname=host)
            except BaseException:
                raw.close()
                raise
        raise error

    def close(self) -> None:
        """Close the connection."""
        if self._raw is not None:
            self._raw.close()


@functools.lru_cache(maxsize=4)
def _trust(file: str | None, folder: str | None) -> ssl.SSLContext:
    """Return whose certificates are believed, read once (which takes milliseconds)."""
    return ssl.create_default_context()


def _basic(url: str) -> dict[str, str]:
    """Return the Authorization header for a URL with user and password, if it has them."""
    parts = urlsplit(url)
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode()}


class _TimedSocket(io.RawIOBase):
    """A socket as http.client wants it, each of whose reads ends in time.

    A socket's own time-out is for one read: a server that sends a header a byte a second would
    never meet it. Here every read's time-out shrinks with what is left of the deadline.
    """

    def __init__(self, raw: socket.socket, deadline: Deadline, read_seconds: float) -> None:
        self._raw, self._deadline, self._read_seconds = raw, deadline, read_seconds

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return the reader of the answer."""
        return io.BufferedReader(self)

    def sendall(self, data: bytes) -> None:
        """Send a request."""
        self._raw.settimeout(self._deadline.limit(self._read_seconds))
        self._raw.sendall(data)

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read what is there, or wait for it within the limits."""
        self._raw.settimeout(self._deadline.limit(self._read_seconds))
        return self._raw.recv_into(buffer)

    def close(self) -> None:
        """Leave it open: http.client closes its socket while it still reads the answer."""
