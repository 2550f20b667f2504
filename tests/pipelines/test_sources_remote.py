"""Sources behind http and S3, both on loopback: whole or refused, and no credentials shown."""

from __future__ import annotations

import functools
import gzip
import http.server
import io
import os
import socket
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from fastclr.config import ConfigError
from pipelines.remote import Patience
from pipelines.shards import ShardSet
from pipelines.sources import SourceImage, SourceOptions, list_source, opening
from pipelines.sources.opening import beside, scheme_of, shown
from tests.pipelines.flaky import flaky

FILES = {"a/1.png": b"one", "a/sub/2.png": b"two" * 9, "a-b/1.png": b"three", "zürich-ß/x y": b"4"}


def listed(source: str, spool: Path, **options: Any) -> list[SourceImage]:
    return list(list_source(source, SourceOptions(**options), spool))


def refused(source: str, spool: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        listed(source, spool, **options)
    for part in parts:
        assert part in str(caught.value), caught.value
    assert "hunter" not in str(caught.value)
    return str(caught.value)


def contents(images: list[SourceImage]) -> dict[str, bytes]:
    return {image.name: image.read() for image in images}


@pytest.fixture(autouse=True)
def _quick_and_at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on loopback are internal addresses; what is dead is given up soon."""
    monkeypatch.setenv("FASTCLR_ALLOW_INTERNAL", "1")
    for name in ("PATIENCE", "IMAGE_PATIENCE"):
        monkeypatch.setattr(opening, name, Patience(1.0, 1.0, 3.0, 0.01, 0.2))


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; knows no ranges; cuts what has ``cut`` in its name short."""

    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        if "cut" in self.path:
            data = Path(self.translate_path(self.path)).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[:-10])
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """URL of a server, the folder it shows, and the paths it was asked for."""
    (tmp_path / "www").mkdir()
    seen: list[str] = []
    handler = type("Seen", (Handler,), {"seen": seen})
    bound = functools.partial(handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path / "www", seen
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A client of an S3 on loopback; its place is given as a user would, by the environment."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "hunter-key")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "hunter-secret")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        yield client
    server.stop()


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def tar_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in files.items():
            packed.writestr(name, data)
    return stream.getvalue()


ARCHIVES = {
    "x.tar": tar_bytes(FILES),
    "x.tar.gz": gzip.compress(tar_bytes(FILES)),
    "x.zip": zip_bytes(FILES),
}


# http.


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_over_http(served: Any, spool: Path, name: str) -> None:
    url, root, seen = served
    (root / name).write_bytes(ARCHIVES[name])
    os.utime(root / name, (1e9, 1e9))
    images = listed(f"{url}/{name}?token=hunter2", spool)
    assert contents(images) == FILES
    assert all(image.url.startswith(str(spool)) for image in images)
    asked = len(seen)
    assert contents(listed(f"{url}/{name}?token=hunter2", spool)) == FILES
    assert len(seen) == asked, "it was fetched again"


def test_what_changed_is_fetched_again(served: Any, spool: Path) -> None:
    url, root, seen = served
    for files in (FILES, FILES | {"a/new.png": b"new"}):
        (root / "x.tar").write_bytes(tar_bytes(files))
        assert contents(listed(f"{url}/x.tar", spool)) == files
    assert len(seen) == 2


def test_a_table_over_http_names_files_beside_it(served: Any, spool: Path) -> None:
    url, root, _ = served
    (root / "set" / "img").mkdir(parents=True)
    (root / "set" / "img" / "ü #1?.png").write_bytes(b"one")
    (root / "set" / "t.csv").write_text("path,label\nimg/ü #1?.png,x\n")
    (image,) = listed(f"{url}/set/t.csv", spool)
    assert (image.name, image.class_name, image.read()) == ("img/ü #1?.png", "x", b"one")


@pytest.mark.parametrize(
    "cell",
    ["../secret.png", "/etc/passwd", "a/../../b.png", "file:///etc/passwd", "pipe:cat /etc/passwd"],
)
def test_a_remote_table_reaches_nothing_else(served: Any, spool: Path, cell: str) -> None:
    url, root, seen = served
    (root / "t.csv").write_text(f"path\n{cell}\n")
    for allow in (False, True):
        refused(f"{url}/t.csv", spool, "line 2", allow_urls=allow, allow_outside=allow)
    assert set(seen) == {"/t.csv"}


def test_urls_in_a_table(served: Any, spool: Path, tmp_path: Path) -> None:
    url, root, seen = served
    (root / "1.png").write_bytes(b"one")
    (tmp_path / "t.csv").write_text(f"url\n{url}/1.png\n{url}/gone.png\n")
    refused(str(tmp_path / "t.csv"), spool, "allow-urls")
    assert not seen
    images = listed(str(tmp_path / "t.csv"), spool, allow_urls=True)
    assert images[0].read() == b"one" and not any("t.csv" in path for path in seen)
    with pytest.raises(FileNotFoundError, match=r"gone\.png cannot be read"):
        images[1].read()


@pytest.mark.parametrize("fault", ["cut without length", "without length", "stall", "503"])
def test_no_image_of_a_table_is_half_an_image(tmp_path: Path, spool: Path, fault: str) -> None:
    with flaky() as server:
        server.objects = {"/1.png": b"one" * 999, "/2.png": b"two" * 999}
        server.plans["/1.png"] = [] if "without" in fault else [fault]
        server.always |= {"/2.png": fault}
        (tmp_path / "t.csv").write_text(f"url\n{server.url('/1.png')}\n{server.url('/2.png')}\n")
        images = listed(str(tmp_path / "t.csv"), spool, allow_urls=True)
        assert images[0].read() == b"one" * 999
        with pytest.raises(OSError, match=r"2\.png cannot be read"):
            images[1].read()


def test_a_table_reaches_no_internal_address(
    served: Any, spool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FASTCLR_ALLOW_INTERNAL")
    url, root, seen = served
    (root / "1.png").write_bytes(b"one")
    (tmp_path / "t.csv").write_text(f"url\n{url}/1.png\nhttp://localhost:1/x\n")
    for image in listed(str(tmp_path / "t.csv"), spool, allow_urls=True):
        with pytest.raises(OSError, match=r"internal address: set FASTCLR_ALLOW_INTERNAL=1"):
            image.read()
    (root / "x.tar").write_bytes(ARCHIVES["x.tar"])  # named by the user or not
    refused(f"{url}/x.tar", spool, "internal address")
    assert not seen
    monkeypatch.setenv("FASTCLR_ALLOW_INTERNAL", "1")
    assert contents(listed(f"{url}/x.tar", spool)) == FILES


def test_what_comes_cut_is_refused(served: Any, spool: Path, tmp_path: Path) -> None:
    url, root, _ = served
    (root / "cut.tar").write_bytes(ARCHIVES["x.tar"])
    refused(f"{url}/cut.tar?token=hunter2", spool, f"{url}/cut.tar", "fetched whole")
    assert not list(spool.iterdir())
    (root / "cut.png").write_bytes(bytes(100))
    (tmp_path / "t.csv").write_text(f"url\n{url}/cut.png?token=hunter2\n")
    (image,) = listed(str(tmp_path / "t.csv"), spool, allow_urls=True)
    with pytest.raises(OSError, match=r"cut\.png\?\*\*\* cannot be read") as caught:
        image.read()
    assert "hunter" not in str(caught.value)


def test_an_endless_body_is_no_image(
    served: Any, tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, root, _ = served
    (root / "big.png").write_bytes(bytes(5000))
    monkeypatch.setattr("pipelines.sources.images.MAX_IMAGE_BYTES", 4000)
    with pytest.raises(OSError, match="more than 4000 bytes"):
        SourceImage("x", None, f"{url}/big.png").read()
    with pytest.raises(OSError, match=r"5000 of 6000|more than"):
        SourceImage("x", None, f"{url}/big.png", 0, 6000).read()


def test_http_cannot_list(served: Any, spool: Path) -> None:
    url, root, _ = served
    (root / "folder").mkdir()
    (root / "folder" / "1.png").write_bytes(b"one")
    refused(f"{url}/folder/", spool, "http cannot list a folder")
    refused(f"{url}/*.tar", spool, "http cannot list")


def test_shards_over_http(served: Any, spool: Path) -> None:
    url, root, _ = served
    for number in range(3):
        files = {"1.jpg": b"%d" % number, "1.cls": b"%d" % number}
        (root / f"set-{number}.tar").write_bytes(tar_bytes(files))
    images = listed(f"{url}/set-{{0..2}}.tar", spool)
    assert [(i.name, i.class_name, i.read()) for i in images] == [
        (f"set-{n}.tar/1", str(n), b"%d" % n) for n in range(3)
    ]
    refused(f"{url}/set-{{0..3}}.tar", spool, "set-3.tar", "cannot be fetched")


def test_a_set_of_our_own_over_http(shard_set: ShardSet, served: Any, spool: Path) -> None:
    url, root, _ = served
    (root / "train").symlink_to(shard_set.path)
    listing = list_source(f"{url}/train/", SourceOptions(), spool)
    assert listing.class_names == shard_set.class_names
    assert [i.read() for i in listing] == [shard_set.read(i) for i in range(len(shard_set))]


def test_servers_that_are_not_there(spool: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and does not listen
        host = f"127.0.0.1:{held.getsockname()[1]}"
        refused(f"http://user:hunter2@{host}/x.tar?key=hunter3", spool, f"http://{host}/x.tar")


@pytest.mark.parametrize(
    "source",
    ["pipe:cat /etc/passwd", "nothing://x", "zip://x.tar::http://h/y.zip", "data:x", "a b://c"],
)
def test_sources_that_are_no_plain_urls(spool: Path, source: str) -> None:
    refused(source, spool)


# S3.


def put(bucket: Any, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        bucket.put_object(Bucket="bucket", Key=name, Body=data)


def test_a_folder_in_s3(bucket: Any, spool: Path) -> None:
    put(bucket, {f"folder/{name}": data for name, data in FILES.items()})
    put(bucket, {"folder/": b"", "folder/a/": b"", "folder/.hidden": b"x", "folder2/x/y.png": b"y"})
    images = listed("s3://bucket/folder", spool)
    assert [image.name for image in images] == sorted(FILES)
    assert [image.class_name for image in images] == ["a-b", "a", "a", "zürich-ß"]
    assert contents(images) == FILES
    assert images[0].num_bytes == 5 and not list(spool.glob("*"))
    bucket.put_object(Bucket="bucket", Key="folder/a-b/1.png", Body=b"cut")
    with pytest.raises(OSError, match="3 of 5 bytes"):
        images[0].read()
    bucket.delete_object(Bucket="bucket", Key="folder/a-b/1.png")
    with pytest.raises(FileNotFoundError):
        images[0].read()


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_in_s3(bucket: Any, spool: Path, name: str) -> None:
    put(bucket, {f"archives/{name}": ARCHIVES[name]})
    assert contents(listed(f"s3://bucket/archives/{name}", spool)) == FILES
    before = {p: p.stat().st_mtime_ns for p in spool.iterdir()}
    listed(f"s3://bucket/archives/{name}", spool)
    assert {p: p.stat().st_mtime_ns for p in spool.iterdir()} == before


def test_tables_in_s3(bucket: Any, spool: Path, tmp_path: Path) -> None:
    put(bucket, {"tables/img/a b.png": b"one", "tables/t.jsonl": b'{"path": "img/a b.png"}\n'})
    assert contents(listed("s3://bucket/tables/t.jsonl", spool)) == {"img/a b.png": b"one"}
    (tmp_path / "t.csv").write_text("path\ns3://bucket/tables/img/a b.png\n")
    (image,) = listed(str(tmp_path / "t.csv"), spool, allow_urls=True)
    assert image.read() == b"one"


def test_shards_and_parquet_in_s3(
    bucket: Any, shard_set: ShardSet, spool: Path, tmp_path: Path
) -> None:
    for file in shard_set.path.iterdir():
        put(bucket, {f"packed/{file.name}": file.read_bytes()})
        if file.name != "manifest.json":
            put(bucket, {f"foreign/{file.name}": file.read_bytes()})
    expected = [shard_set.read(i) for i in range(len(shard_set))]
    packed = list_source("s3://bucket/packed", SourceOptions(), spool)
    assert packed.class_names == shard_set.class_names
    assert [image.read() for image in packed] == expected
    for source in ("s3://bucket/foreign/", "s3://bucket/foreign/*.tar"):
        assert [image.read() for image in listed(source, spool)] == expected
    pq.write_table(pa.table({"image": [b"one"]}), tmp_path / "x.parquet")
    put(bucket, {"hub/train-00000-of-00001.parquet": (tmp_path / "x.parquet").read_bytes()})
    images = listed("s3://bucket/hub", spool)
    assert contents(images) == {"train-00000-of-00001.parquet#0": b"one"}


def test_what_is_not_in_s3(bucket: Any, spool: Path) -> None:
    refused("s3://bucket/nowhere", spool, "no folder that can be listed")
    refused("s3://bucket/nowhere.tar", spool, "nowhere.tar", "cannot be fetched")
    refused("s3://nobody/x.tar", spool, "cannot be fetched")


# Small things.


def test_urls_are_shown_without_secrets() -> None:
    assert shown("https://u:p@h:1/a/b.tar?x=1#y") == "https://h:1/a/b.tar"
    assert shown("s3://b/k@x") == "s3://b/k@x"
    assert shown("/a?b#c@d") == "/a?b#c@d"
    assert scheme_of("PIPE:x") == "pipe" and scheme_of("a:b.png") == ""
    assert beside("https://u:p@h/a/t.csv?x=/1", "i/#.png") == "https://u:p@h/a/i/%23.png"
