"""Addresses: which are refused, where redirects may lead, and that no password leaks."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from pipelines.remote import StorageError, fetch, redacted, web
from pipelines.remote.urls import (
    is_internal,
    protocol_of,
    redacted_text,
    redirect_refused,
    refused,
)
from tests.pipelines.flaky import flaky, self_signed
from tests.pipelines.transfers import CANARY, DATA, QUICK, SHORT

# As they are written


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{CANARY}@host/a.tar",
        f"https://{CANARY}@host:8080/a.tar",
        f"https://user:{CANARY}@[::1]:80/a",
        f"http://host/a?X-Amz-Signature={CANARY}&b=1",
        f"http://host/a#{CANARY}",
        f"http://user:a/{CANARY}@host/x",
        f"http://user:a?{CANARY}@host/x",
        f"http://user:1?{CANARY}@host/x",
        f"http://user:1/{CANARY}@host/x",
        f"user:{CANARY}@host/x",
        f"http://a@b:{CANARY}@host/x",
        f"s3://{CANARY}@bucket/key",
    ],
)
def test_secrets_of_a_url_are_not_printed(url):
    assert CANARY not in redacted(url)
    if "://" in url:
        assert CANARY not in redacted_text(f"cannot connect to {url}: refused")
    with pytest.raises((ConfigError, StorageError)) as caught:
        fetch("ftp" + url[url.index(":") :])
    assert CANARY not in str(caught.value)


def test_what_is_no_secret_stays():
    assert redacted("https://u:p@host:81/dir/a.tar?x=1") == "https://***@host:81/dir/a.tar?***"
    for url in ("s3://bucket/some@place/a.tar", "http://[::1]:8000/a", "/data/a b.tar", "gs://b/k"):
        assert redacted(url) == url


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12))
@settings(max_examples=100, deadline=None)
@example("@/")
@example("@x?")
@example("?")
def test_no_form_of_password_is_printed(other):
    for url in (f"https://me:{other}{CANARY}@host/a", f"https://me:{CANARY}{other}@host/a"):
        assert CANARY not in redacted(url)


@pytest.mark.parametrize(
    "url",
    [
        "pipe:cat /etc/passwd",
        "ftp://host/a",
        "simplecache::s3://bucket/a",
        "zip://a.zip::http://host/b",
        "git://x",
        "github://a:b@c/d",
        "data:,x",
        "http://",
        "http:///path",
        "https://host:99999/a",
        "http://[::1/a",
        "http://host/a\nX: y",
        "",
    ],
)
def test_other_protocols_are_refused(url):
    with pytest.raises(ConfigError, match=r"only|no host"):
        fetch(url)


def test_what_looks_like_an_option_or_a_command_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-", "--output=x", "$(touch PWNED)", "{0..999999999}"):
        assert protocol_of(name) == "file"
        with pytest.raises(StorageError, match="FileNotFoundError"):
            fetch(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "internal"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("169.254.169.254", True),
        ("100.64.0.1", True),
        ("0.0.0.0", True),
        ("224.0.0.1", True),
        ("::1", True),
        ("fe80::1%eth0", True),
        ("fd00::1", True),
        ("::ffff:10.0.0.1", True),
        ("64:ff9b::a00:1", True),
        ("2002:7f00:1::", True),
        ("8.8.8.8", False),
        ("2606:4700::1111", False),
        ("::ffff:8.8.8.8", False),
    ],
)
def test_internal_addresses(address, internal):
    assert is_internal(address) is internal


@pytest.mark.parametrize(
    ("old", "new", "addresses", "named_internal", "is_refused"),
    [
        ("https://a/", "http://a/", ("8.8.8.8",), False, True),
        ("http://a/", "https://a/", ("8.8.8.8",), False, False),
        ("http://a/", "file:///etc/passwd", (), True, True),
        ("http://a/", "ftp://a/", ("8.8.8.8",), False, True),
        ("https://a/", "https://b/", ("8.8.8.8", "10.0.0.1"), False, True),
        ("https://a/", "https://b/", ("10.0.0.1",), True, False),
        ("https://a/", "https://b/", ("169.254.169.254",), True, True),
        ("https://a/", "https://b/", ("::ffff:169.254.169.254",), True, True),
        ("https://a/", "https://b/", ("8.8.8.8",), True, False),
    ],
)
def test_where_redirects_may_lead(monkeypatch, old, new, addresses, named_internal, is_refused):
    monkeypatch.setenv("FASTCLR_ALLOW_INTERNAL", "1")
    why = redirect_refused(old, new, addresses, named_is_internal=named_internal)
    assert (why is not None) is is_refused
    monkeypatch.delenv("FASTCLR_ALLOW_INTERNAL")
    why = redirect_refused(old, new, addresses, named_is_internal=named_internal)
    assert (why is not None) is (is_refused or any(map(is_internal, addresses)))


@pytest.mark.parametrize(
    ("address", "without", "with_it"),
    [
        ("127.0.0.1", True, False),
        ("10.1.2.3", True, False),
        ("fd00::1", True, False),
        ("8.8.8.8", False, False),
        ("2606:4700::1111", False, False),
        ("169.254.169.254", True, True),
        ("::ffff:169.254.169.254", True, True),
        ("64:ff9b::a9fe:a9fe", True, True),
        ("fe80::1%eth0", True, True),
        ("fd00:ec2::254", True, True),
        ("100.100.100.200", True, True),
        ("168.63.129.16", True, True),
    ],
)
def test_which_addresses_are_asked(monkeypatch, address, without, with_it):
    for setting, is_refused in ((None, without), ("0", without), ("yes", without), ("1", with_it)):
        monkeypatch.delenv("FASTCLR_ALLOW_INTERNAL", raising=False)
        if setting:
            monkeypatch.setenv("FASTCLR_ALLOW_INTERNAL", setting)
        assert (refused(["8.8.8.8", address]) is not None) is is_refused


# https


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls") / "cert.pem")


def test_https_is_read_and_its_certificate_checked(certificate, monkeypatch):
    with flaky(certificate=certificate) as server:
        server.objects["/a.bin"] = DATA
        server.plans["/a.bin"] = ["cut"]
        with pytest.raises(StorageError, match=r"certificate is not trusted: self.signed.*1 tries"):
            fetch(server.url("/a.bin"), patience=QUICK)
        assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert fetch(server.url("/a.bin"), patience=QUICK) == DATA
        assert server.requests[0].headers["Host"] == f"127.0.0.1:{server.port}"
        server.always["/a.bin"] = "stall"
        with pytest.raises(StorageError, match="no byte came"):
            fetch(server.url("/a.bin"), patience=SHORT)


def test_https_does_not_lead_to_http(server, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with flaky(certificate=certificate) as safe:
        safe.redirects["/r"] = server.url("/a.bin")
        with pytest.raises(StorageError, match=r"changes https to http.*1 tries"):
            fetch(safe.url("/r"), patience=QUICK)
        assert not server.requests
        safe.objects["/b.bin"] = b"safe"
        server.redirects["/up"] = safe.url("/b.bin")
        assert fetch(server.url("/up"), patience=QUICK) == b"safe"


# Redirects and hosts, over the wire


def test_redirects_are_followed_five_times(server):
    server.redirects |= {f"/r{k}": f"/r{k - 1}" for k in range(1, 7)} | {"/r0": "/a.bin"}
    assert fetch(server.url("/r4"), patience=QUICK) == DATA
    with pytest.raises(StorageError, match="more than 5 redirects"):
        fetch(server.url("/r5"), patience=SHORT)


@pytest.mark.parametrize(
    "target",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:169.254.169.254]/",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "http://[::1/",
        "gopher:x",
    ],
)
def test_a_bad_redirect_is_refused_before_connecting(server, monkeypatch, target):
    connected = []
    connect = socket.create_connection
    monkeypatch.setattr(
        socket, "create_connection", lambda a, **k: (connected.append(a[:2]), connect(a, **k))[1]
    )
    server.redirects["/r"] = target
    with pytest.raises(StorageError, match=r"its redirect.*(not followed|no URL)"):
        fetch(server.url("/r"), patience=QUICK)
    here = ("127.0.0.1", server.port)
    # Sets of other tests may still read ahead, at other ports of this host.
    assert [a for a in connected if a[0] != here[0] or a == here] == [here]
    assert len(server.requests) == 1


@pytest.mark.parametrize("setting", [None, "1"])
@pytest.mark.parametrize("host", ["169.254.169.254", "[::ffff:169.254.169.254]", "[fe80::1]"])
def test_where_clouds_hand_out_credentials_nobody_asks(host, setting, monkeypatch):
    monkeypatch.delenv("FASTCLR_ALLOW_INTERNAL", raising=False)
    if setting:
        monkeypatch.setenv("FASTCLR_ALLOW_INTERNAL", setting)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(StorageError, match=r"is not asked: .* is link-local.*1 tries"):
        fetch(f"http://{host}/latest/meta-data/", patience=SHORT)


LOOPBACK = ("127.0.0.1", "localhost", "127.1", "0x7f000001")


@pytest.mark.parametrize("host", [*LOOPBACK, "me:pw@127.0.0.1", "10.0.0.1", "[::1]", "[fd00::1]"])
def test_the_own_network_is_asked_only_where_that_is_allowed(server, monkeypatch, host):
    url = f"http://{host}:{server.port}/a.bin"
    if "127" in host or host in LOOPBACK:
        assert fetch(url, patience=QUICK) == DATA
        server.requests.clear()
    monkeypatch.delenv("FASTCLR_ALLOW_INTERNAL")
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("connected"))
    with pytest.raises(StorageError, match=r"is not asked: .* is an internal address.*1 tries"):
        fetch(url, patience=QUICK)
    assert not server.requests


def test_the_public_internet_does_not_send_us_into_our_network(server, monkeypatch):
    monkeypatch.setattr(web, "is_internal", lambda address: False)  # the named host seems public
    for host in LOOPBACK:
        server.redirects["/r"] = f"http://{host}:{server.port}/a.bin"
        with pytest.raises(StorageError, match=r"is an internal address, .* is none"):
            fetch(server.url("/r"), patience=QUICK)
    assert len(server.hits("/r")) == len(LOOPBACK) and not server.hits("/a.bin")


def test_a_host_is_resolved_once_and_connected_to_by_address(server, monkeypatch):
    looked_up = []
    look_up = socket.getaddrinfo

    def once(host, *args, **options):
        if host == "shards.example":
            looked_up.append(host)
            host = "127.0.0.1"
        else:
            assert host == "127.0.0.1", host
        return look_up(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    assert fetch(f"http://shards.example:{server.port}/a.bin", patience=QUICK) == DATA
    assert len(looked_up) == 1
    assert server.requests[0].headers["Host"] == f"shards.example:{server.port}"


def test_a_password_is_for_its_own_host_alone(server):
    with flaky() as other:
        other.objects["/b.bin"] = b"other"
        server.redirects |= {"/own": "/a.bin", "/away": other.url("/b.bin")}
        named = f"http://me:{CANARY}%40@127.0.0.1:{server.port}"
        assert fetch(f"{named}/own", patience=QUICK) == DATA
        assert fetch(f"{named}/away", patience=QUICK) == b"other"
        assert all("Authorization" in request.headers for request in server.requests)
        assert "Authorization" not in other.requests[0].headers


def test_odd_names_reach_the_server(server):
    server.objects["/%C3%A4%20b/c+d.bin?x=a%2Fb&y=1"] = DATA
    assert fetch(server.url("/ä b/c+d.bin?x=a%2Fb&y=1"), patience=QUICK) == DATA
