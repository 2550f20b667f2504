"""Storage that fails on purpose: an http server on loopback, also as a proxy before another.

Every fault is a function on the answer that should have been given; which request gets which is a
plan or a hash of path and number, so that runs repeat.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.client
import ipaddress
import socket
import ssl
import struct
import threading
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipelines.order import hash64, uniforms


@dataclass
class Answer:
    """A status, headers and body."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Request:
    """What a server was asked, and the fault it answered with."""

    method: str
    path: str
    headers: dict[str, str]
    fault: str | None
    time: float = field(default_factory=time.monotonic)


class Flaky:
    """A server of ``objects`` with ranges and ETags, or a proxy before ``upstream``.

    Attributes:
        objects: path -> bytes.
        plans: path -> faults of its first requests, one each; None is no fault.
        always: path -> fault of every request.
        draw: path, number -> fault, where no plan says otherwise.
        requests: What came, in order.
        redirects: path -> where it leads.
        etags: Whether objects have ETags.
    """

    def __init__(
        self, upstream: tuple[str, int] | None = None, certificate: Path | None = None
    ) -> None:
        self.objects: dict[str, bytes] = {}
        self.plans: dict[str, list[str | None]] = {}
        self.always: dict[str, str] = {}
        self.draw: Callable[[str, int], str | None] = lambda path, number: None
        self.requests: list[Request] = []
        self.redirects: dict[str, str] = {}
        self.etags = True
        self.upstream = upstream
        self.closing = threading.Event()
        self._numbers: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            self._scheme = "https"
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"{self._scheme}://127.0.0.1:{self.port}{path}"

    def put(self, path: str, body: bytes = b"") -> None:
        """Put an object into the storage behind a proxy."""
        assert self._ask_upstream("PUT", path, {}, body).status == 200

    def hits(self, path: str) -> list[Request]:
        return [request for request in self.requests if request.path == path]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def note(self, method: str, path: str, headers: dict[str, str]) -> str | None:
        """Record a request and return its fault."""
        with self._lock:
            number = self._numbers[path]
            self._numbers[path] += 1
            plan = self.plans.get(path, [])
            if path in self.always:
                fault: str | None = self.always[path]
            else:
                fault = plan[number] if number < len(plan) else self.draw(path, number)
            self.requests.append(Request(method, path, headers, fault))
            return fault

    def answer(self, method: str, path: str, headers: dict[str, str]) -> Answer:
        """Return what a faultless server says."""
        if self.upstream:
            return self._ask_upstream(method, path, headers)
        if path in self.redirects:
            return Answer(302, {"Location": self.redirects[path]})
        data = self.objects.get(path)
        if data is None:
            return Answer(404, {})
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        found = {"ETag": etag} if self.etags else {}
        wanted = headers.get("Range")
        if headers.get("If-Match", etag) != etag:
            return Answer(412, found)
        if not wanted:
            return Answer(200, found, data)
        first = int(wanted.removeprefix("bytes=").partition("-")[0])
        if first >= len(data):
            return Answer(416, found)
        content_range = f"bytes {first}-{len(data) - 1}/{len(data)}"
        return Answer(206, {"Content-Range": content_range, **found}, data[first:])

    def _ask_upstream(
        self, method: str, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> Answer:
        assert self.upstream
        connection = http.client.HTTPConnection(*self.upstream, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            hop = ("connection", "transfer-encoding", "server", "date")
            kept = {k: v for k, v in response.headers.items() if k.lower() not in hop}
            return Answer(response.status, kept, response.read())


@contextlib.contextmanager
def flaky(
    upstream: tuple[str, int] | None = None, certificate: Path | None = None
) -> Iterator[Flaky]:
    """Run a server for a test, on loopback: an internal address, which has to be allowed."""
    server = Flaky(upstream, certificate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTCLR_ALLOW_INTERNAL", "1")
        try:
            yield server
        finally:
            server.close()


def self_signed(file: Path) -> Path:
    """Write a key and a certificate for 127.0.0.1."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=1))
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
    certificate = builder.sign(key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + certificate.public_bytes(pem))
    return file


@contextlib.contextmanager
def flaky_s3(bucket: str, secret: str = "secret") -> Iterator[Flaky]:
    """Run moto's S3 server behind a faulty proxy; the environment points to it."""
    from moto.server import ThreadedMotoServer  # here: it takes seconds

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    with flaky(moto.get_host_and_port()) as proxy, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy.url(""))
        patch.setenv("AWS_ACCESS_KEY_ID", f"id-{secret}")
        patch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        proxy.put(f"/{bucket}")
        yield proxy
    moto.stop()


def drawn(rate: float, seed: int, faults: Iterable[str]) -> Callable[[str, int], str | None]:
    """Return a ``draw`` that gives a share of all requests a fault, by hash."""
    names = sorted(faults)

    def draw(path: str, number: int) -> str | None:
        word = zlib.crc32(path.encode())
        if uniforms(seed, word, number)[0] >= rate:
            return None
        return names[int(hash64(seed, 1, word, number)[0] % len(names))]

    return draw


def _handler(flaky_server: Flaky) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 0

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.close_connection = True
            headers = dict(self.headers.items())
            fault = flaky_server.note(self.command, self.path, headers)
            right = flaky_server.answer(self.command, self.path, headers)
            with contextlib.suppress(OSError):  # the client may be gone
                (FAULTS[fault] if fault else _send)(self, right, flaky_server)

        do_HEAD = do_GET

    return Handler


def _head(handler: Any, answer: Answer, length: int | None) -> None:
    handler.send_response(answer.status)
    for name, value in answer.headers.items():
        if name.lower() != "content-length":
            handler.send_header(name, value)
    if handler.command == "HEAD":
        length = int(answer.headers.get("Content-Length", len(answer.body)))
    if length is not None:
        handler.send_header("Content-Length", str(length))
    handler.send_header("Connection", "close")
    handler.end_headers()


def _send(handler: Any, answer: Answer, server: Flaky) -> None:
    _head(handler, answer, len(answer.body))
    if handler.command != "HEAD":
        handler.wfile.write(answer.body)


def _status(status: int, **headers: str) -> Callable[..., None]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}

    def fault(handler: Any, answer: Answer, server: Flaky) -> None:
        _send(handler, Answer(status, named, b"<html>no</html>"), server)

    return fault


def _reset(handler: Any, answer: Answer, server: Flaky) -> None:
    """Reset the connection before a byte is sent."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def _reset_in_body(handler: Any, answer: Answer, server: Flaky) -> None:
    _cut(handler, answer, server)
    time.sleep(0.02)
    _reset(handler, answer, server)


def _cut(handler: Any, answer: Answer, server: Flaky) -> None:
    """Send half of the body that was announced."""
    _head(handler, answer, len(answer.body))
    handler.wfile.write(answer.body[: len(answer.body) // 2])


def _cut_without_length(handler: Any, answer: Answer, server: Flaky) -> None:
    _head(handler, answer, None)
    handler.wfile.write(answer.body[: len(answer.body) // 2])


def _without_length(handler: Any, answer: Answer, server: Flaky) -> None:
    """Send everything, its end marked by closing alone."""
    _head(handler, answer, None)
    handler.wfile.write(answer.body)


def _chunked(handler: Any, answer: Answer, server: Flaky, cut: bool = False) -> None:
    _head(handler, Answer(answer.status, {**answer.headers, "Transfer-Encoding": "chunked"}), None)
    half = len(answer.body) // 2
    for part in (answer.body[:half], answer.body[half:]):
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
        if cut:
            return
    handler.wfile.write(b"0\r\n\r\n")


def _cut_chunked(handler: Any, answer: Answer, server: Flaky) -> None:
    _chunked(handler, answer, server, cut=True)


def _hang(handler: Any, answer: Answer, server: Flaky) -> None:
    server.closing.wait(20)


def _stall(handler: Any, answer: Answer, server: Flaky) -> None:
    _cut(handler, answer, server)
    server.closing.wait(20)


def _trickle(handler: Any, answer: Answer, server: Flaky) -> None:
    """Send a byte at a time, for ever within the read time-out."""
    _head(handler, answer, len(answer.body))
    for k in range(len(answer.body)):
        handler.wfile.write(answer.body[k : k + 1])
        if server.closing.wait(0.05):
            return


def _trickle_head(handler: Any, answer: Answer, server: Flaky) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    while not server.closing.wait(0.05):
        handler.wfile.write(b"x")


def _wrong_bytes(handler: Any, answer: Answer, server: Flaky) -> None:
    body = bytearray(answer.body)
    body[len(body) // 3] ^= 4
    _send(handler, Answer(answer.status, answer.headers, bytes(body)), server)


def _wrong_length(handler: Any, answer: Answer, server: Flaky) -> None:
    _head(handler, answer, len(answer.body) + 7)
    handler.wfile.write(answer.body)


def _too_long(handler: Any, answer: Answer, server: Flaky) -> None:
    _head(handler, answer, None)
    handler.wfile.write(answer.body + b"more")


def _full_for_range(handler: Any, answer: Answer, server: Flaky) -> None:
    _send(handler, server.answer(handler.command, handler.path, {}), server)


def _wrong_range(handler: Any, answer: Answer, server: Flaky) -> None:
    total = len(server.objects[handler.path])
    headers = {**answer.headers, "Content-Range": f"bytes 1-{total - 1}/{total}"}
    _send(handler, Answer(206, headers, server.objects[handler.path][1:]), server)


def _changes(handler: Any, answer: Answer, server: Flaky) -> None:
    """Send half of an object and put another of the same length in its place."""
    _cut(handler, answer, server)
    server.objects[handler.path] = server.objects[handler.path][::-1]


def _no_http(handler: Any, answer: Answer, server: Flaky) -> None:
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


def _loop(handler: Any, answer: Answer, server: Flaky) -> None:
    _send(handler, Answer(302, {"Location": handler.path}), server)


FAULTS: dict[str, Callable[..., None]] = {
    "500": _status(500),
    "503": _status(503, Retry_After="0"),
    "503 in 1 s": _status(503, Retry_After="1"),
    "503 in 100 s": _status(503, Retry_After="100"),
    "429": _status(429),
    "400": _status(400),
    "401": _status(401),
    "403": _status(403),
    "404": _status(404),
    "410": _status(410),
    "reset": _reset,
    "reset in body": _reset_in_body,
    "cut": _cut,
    "cut without length": _cut_without_length,
    "without length": _without_length,
    "chunked": _chunked,
    "cut chunked": _cut_chunked,
    "hang": _hang,
    "stall": _stall,
    "trickle": _trickle,
    "trickle head": _trickle_head,
    "wrong bytes": _wrong_bytes,
    "wrong length": _wrong_length,
    "too long": _too_long,
    "full for range": _full_for_range,
    "wrong range": _wrong_range,
    "changes": _changes,
    "no http": _no_http,
    "html": _status(200),
    "loop": _loop,
}
