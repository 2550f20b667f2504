"""Tables: rows that name files, URLs or bytes; what a hostile table may not name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastclr.config import ConfigError
from pipelines.sources import SourceImage, SourceOptions, list_source
from pipelines.sources import spool as spool_module
from pipelines.sources.tables import class_from


def listed(source: Path | str, spool: Path, **options: Any) -> list[SourceImage]:
    return list(list_source(str(source), SourceOptions(**options), spool))


def refused(source: Path | str, spool: Path, *parts: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        listed(source, spool, **options)
    for part in parts:
        assert part in str(caught.value), caught.value
    return str(caught.value)


def pairs(images: list[SourceImage]) -> list[tuple[bytes, str | None]]:
    return [(image.read(), image.class_name) for image in images]


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with images beside which the tables lie, and a secret outside."""
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "set" / "img").mkdir(parents=True)
    for name in ("1.png", "ü, 2.png", "3\n.png"):
        (tmp_path / "set" / "img" / name).write_bytes(name.encode())
    return tmp_path / "set"


def table(here: Path, text: str | bytes, name: str = "t.csv") -> Path:
    (here / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return here / name


def rows(here: Path, *items: Any) -> Path:
    return table(here, "".join(json.dumps(item) + "\n" for item in items), "t.jsonl")


def parquet(
    here: Path, columns: dict[str, Any], features: dict[str, Any] | None = None, **options: Any
) -> Path:
    data = pa.table(columns)
    if features is not None:
        info = json.dumps({"info": {"features": features}}).encode()
        data = data.replace_schema_metadata({"huggingface": info})
    pq.write_table(data, here / "t.parquet", **options)
    return here / "t.parquet"


# Rows that name files.


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('path,label\nimg/1.png,x\n"img/ü, 2.png",ß\n"img/3\n.png",x\n', "t.csv"),
        ('\ufeffpath;label\r\nimg/1.png;x\r\n\r\nimg/ü, 2.png;ß\r\n"img/3\n.png";x', "t.csv"),
        ('path\tlabel\nimg/1.png\tx\nimg/ü, 2.png\tß\n"img/3\n.png"\tx\n', "t.tsv"),
        (
            '{"path": "img/1.png", "label": "x"}\n\n{"path": "img/ü, 2.png", "label": "ß"}\n'
            '{"path": "img/3\\n.png", "label": "x"}',
            "t.jsonl",
        ),
    ],
)
def test_a_table_of_paths(here: Path, spool: Path, text: str, name: str) -> None:
    images = listed(table(here, text, name), spool)
    assert [image.name for image in images] == ["img/1.png", "img/ü, 2.png", "img/3\n.png"]
    assert pairs(images) == [(b"1.png", "x"), ("ü, 2.png".encode(), "ß"), (b"3\n.png", "x")]


def test_columns_asked_for(here: Path, spool: Path) -> None:
    file = table(here, "path,other,label,kind\nno.png,img/1.png,7,k\n")
    asked = listed(file, spool, image_column="other", label_column="kind")
    assert pairs(asked) == [(b"1.png", "k")]
    assert listed(file, spool, image_column="other", labels=False)[0].class_name is None
    assert listed(file, spool, image_column="other")[0].class_name == "7"
    refused(
        file, spool, "no column 'nope'", "'path', 'other', 'label', 'kind'", image_column="nope"
    )
    refused(file, spool, "no column 'nope'", "'kind'", label_column="nope")


def test_a_table_without_image_column(here: Path, spool: Path) -> None:
    refused(table(here, "a,b\n1,2\n"), spool, "t.csv", "columns are 'a', 'b'", "--image-")
    refused(rows(here, {"a": 1}), spool, "t.jsonl", "columns are 'a'")


def test_labels_may_be_missing(here: Path, spool: Path) -> None:
    cells = [None, math.nan, "", -1, 3, 3.0, "3", "ß"]
    images = listed(rows(here, *({"path": "img/1.png", "label": c} for c in cells)), spool)
    assert [i.class_name for i in images] == [None] * 4 + ["3", "3", "3", "ß"]
    text = "path,label\n" + "".join(f"img/1.png,{cell}\n" for cell in ("", "nan", "-1", "3", "3.0"))
    images = listed(table(here, text), spool)
    assert [i.class_name for i in images] == [None, None, None, "3", "3"]


@pytest.mark.parametrize(
    "cell", [-2, 2.5, "2.5", "-7", True, [1], {"a": 1}, "a\0", "\ud800", 1e400]
)
def test_labels_that_are_no_class(here: Path, spool: Path, cell: Any) -> None:
    file = rows(here, {"path": "img/1.png"}, {"path": "img/1.png", "label": cell})
    refused(file, spool, "t.jsonl, line 2", "label")


@given(st.one_of(st.integers(), st.floats(), st.text(), st.binary(), st.none()))
@settings(max_examples=100, deadline=None)
def test_a_label_becomes_a_text_or_none_or_an_error(value: Any) -> None:
    try:
        name = class_from(value, "here")
    except ConfigError:
        return
    assert name is None or (name and name.encode() and class_from(name, "here") == name)


def test_a_missing_file_is_an_error_when_read(here: Path, spool: Path) -> None:
    (image,) = listed(table(here, "path\nimg/gone.png\n"), spool)
    with pytest.raises(FileNotFoundError):
        image.read()


def test_a_row_twice_is_an_image_twice(here: Path, spool: Path) -> None:
    assert len(listed(table(here, "path\nimg/1.png\nimg/1.png\n"), spool)) == 2


# What a table may not name.


@pytest.mark.parametrize(
    "cell",
    ["../secret.png", "img/../../secret.png", "/etc/passwd", "{top}/secret.png", "link.png",
     "linked/secret.png", "..", "img/../.."],
)  # fmt: skip
def test_paths_out_of_the_folder(here: Path, spool: Path, cell: str) -> None:
    (here / "link.png").symlink_to("../secret.png")
    (here / "linked").symlink_to("..")
    file = rows(here, {"path": cell.format(top=here.parent)})
    refused(file, spool, "line 1", "leads out of", "allow-outside")


def test_paths_out_of_the_folder_where_allowed(here: Path, spool: Path) -> None:
    file = rows(here, {"path": "../secret.png"}, {"path": f"{here.parent}/secret.png"})
    assert pairs(listed(file, spool, allow_outside=True)) == [(b"secret", None)] * 2


def test_paths_within_the_folder(here: Path, spool: Path) -> None:
    (here / "same.png").symlink_to("img/1.png")
    cells = [f"{here}/img/1.png", "./img//1.png", "img/../img/1.png", "same.png"]
    file = rows(here, *({"path": cell} for cell in cells))
    assert pairs(listed(file, spool)) == [(b"1.png", None)] * 4


@pytest.mark.parametrize(
    "cell",
    ["pipe:cat /etc/passwd", "file:///etc/passwd", "FILE:///etc/passwd", "file:/etc/passwd",
     "simplecache::file:///etc/passwd", "gs://bucket/x", "ftp://host/x", "data:image/png;base64,AA",
     "memory://x", "zip://x::file:///y"],
)  # fmt: skip
def test_schemes_that_are_never_followed(here: Path, spool: Path, cell: str) -> None:
    file = rows(here, {"path": cell})
    for allow in (False, True):
        refused(file, spool, "only http, https and s3", allow_urls=allow, allow_outside=allow)


def test_urls_are_fetched_only_if_allowed(here: Path, spool: Path) -> None:
    cell = "http://user:hunter2@169.254.169.254/latest?token=hunter3"
    message = refused(rows(here, {"url": cell}), spool, "169.254.169.254", "allow-urls")
    assert "hunter" not in message
    (image,) = listed(rows(here, {"url": cell}), spool, allow_urls=True)
    assert image.url == cell and image.name == "http://169.254.169.254/latest"


@pytest.mark.parametrize("cell", ["", None, 7, "a\0b", "\ud800", ["img/1.png"], "x" * 5000])
def test_cells_that_are_no_path(here: Path, spool: Path, cell: Any) -> None:
    file = rows(here, {"path": "img/1.png"}, {"path": cell})
    if isinstance(cell, str) and len(cell) == 5000:  # no name a file can have: rejected when read
        with pytest.raises(OSError):
            listed(file, spool)[1].read()
    else:
        refused(file, spool, "line 2")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"path,label\nimg/1.png,\0\n", ["line 2", "NUL"]),
        (b"pa\0th\nimg/1.png\n", ["NUL"]),
        (b"path\nimg/\xff.png\n", ["UTF-8"]),
        (b"path,label\nimg/1.png\n", ["line 2", "has 1 cells", "header 2"]),
        (b"path,label\nimg/1.png,a,b\n", ["line 2", "has 3 cells"]),
        (b'path,label\n"img/1.png,a\n', ["damaged"]),
        (b"path,path\na,b\n", ["a column twice"]),
        (b"path,label\n", ["nothing to pack"]),
        (b"", ["nothing to pack"]),
        (b"\n\n", ["nothing to pack"]),
    ],
)
def test_damaged_csv(here: Path, spool: Path, text: bytes, parts: list[str]) -> None:
    refused(table(here, text), spool, "t.csv", *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b'{"path": "img/1.png"}\n{"path": "im', ["line 2", "no JSON"]),
        (b"[1]\n", ["line 1", "object"]),
        (b"[" * 100_000, ["line 1"]),
        (b'{"path": "img/1.png"}\n\0\n', ["line 2", "NUL"]),
        (b"", ["nothing to pack"]),
    ],
)
def test_damaged_json(here: Path, spool: Path, text: bytes, parts: list[str]) -> None:
    refused(table(here, text, "t.jsonl"), spool, "t.jsonl", *parts)


# Parquet.

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
NAMES = {"_type": "ClassLabel", "names": ["null", "eins", "zwölf"]}


def test_hugging_face_parquet(here: Path, spool: Path) -> None:
    cells = [{"bytes": b"%d" % k, "path": f"{k}.png"} for k in range(300)]
    columns = {"bild": pa.array(cells, STRUCT), "art": [k % 4 - 1 for k in range(300)]}
    features = {"bild": {"_type": "Image"}, "art": NAMES}
    source = parquet(here, columns, features, row_group_size=100)
    listing = list_source(str(source), SourceOptions(), spool)
    assert listing.class_names == ["null", "eins", "zwölf"]
    images = list(listing)
    assert [image.read() for image in images] == [b"%d" % k for k in range(300)]
    assert images[299].name == "t.parquet#299"
    assert [image.class_name for image in images[:4]] == [None, "null", "eins", "zwölf"]
    stamps = {p: p.stat().st_mtime_ns for p in spool.iterdir()}
    assert listed(source, spool) == images
    assert {p: p.stat().st_mtime_ns for p in spool.iterdir()} == stamps
    plain = list_source(str(source), SourceOptions(labels=False), spool)
    assert plain.class_names is None and {image.class_name for image in plain} == {None}


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary(3)])
def test_a_column_of_bytes(here: Path, spool: Path, kind: pa.DataType) -> None:
    columns = {"image": pa.array([b"abc", b"def"], kind), "label": ["x", None]}
    images = listed(parquet(here, columns), spool)
    assert pairs(images) == [(b"abc", "x"), (b"def", None)]


def test_a_dictionary_of_labels_and_floats(here: Path, spool: Path) -> None:
    image = pa.array([b"a", b"b"])
    columns = {"image": image, "label": pa.array(["x", "ß"]).dictionary_encode()}
    assert [i.class_name for i in listed(parquet(here, columns), spool)] == ["x", "ß"]
    columns = {"image": image, "label": pa.array([2.0, math.nan], pa.float32())}
    assert [i.class_name for i in listed(parquet(here, columns), spool)] == ["2", None]


def test_a_column_of_paths(here: Path, spool: Path) -> None:
    images = listed(parquet(here, {"path": ["img/1.png"], "label": [5]}), spool)
    assert pairs(images) == [(b"1.png", "5")] and not spool.exists()
    refused(parquet(here, {"path": ["../secret.png"]}), spool, "row 0", "leads out of")
    refused(parquet(here, {"path": ["file:///etc/passwd"]}), spool, "only http", allow_urls=True)


def test_rows_without_bytes(here: Path, spool: Path) -> None:
    cells = [None, {"bytes": None, "path": "img/1.png"}, {"bytes": b"x", "path": None}]
    images = listed(parquet(here, {"image": pa.array(cells, STRUCT)}), spool)
    assert [image.read() for image in images] == [b"", b"1.png", b"x"]
    cells = [{"bytes": None, "path": "/etc/passwd"}]
    refused(parquet(here, {"image": pa.array(cells, STRUCT)}), spool, "leads out of")


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        ([1, 2], ["type int64 in column 'image'"]),
        ([[b"a"], [b"b"]], ["type list"]),
        ([{"x": 1}, {"x": 2}], ["type struct"]),
    ],
)
def test_parquet_of_other_types(here: Path, spool: Path, column: Any, parts: list[str]) -> None:
    refused(parquet(here, {"image": column}), spool, "t.parquet", *parts)


@pytest.mark.parametrize("label", [3, -2, 99])
def test_labels_beyond_the_names(here: Path, spool: Path, label: int) -> None:
    source = parquet(here, {"image": [b"x"], "label": [label]}, {"label": NAMES})
    refused(source, spool, "row 0", str(label))
    assert not list(spool.iterdir())


def test_several_columns_to_choose_from(here: Path, spool: Path) -> None:
    columns = {"image": [b"x"], "fine": [1], "coarse": [0]}
    source = parquet(here, columns, {"fine": NAMES, "coarse": NAMES})
    refused(source, spool, "ClassLabel columns fine, coarse", "--label-column")
    assert listed(source, spool, label_column="fine")[0].class_name == "eins"
    refused(source, spool, "columns are 'image', 'fine', 'coarse'", image_column="nope")


@pytest.mark.parametrize("features", [[], {"label": 7}, {"label": {"_type": "ClassLabel"}}, "x"])
def test_schemas_of_any_shape(here: Path, spool: Path, features: Any) -> None:
    (image,) = listed(parquet(here, {"image": [b"x"], "label": [1]}, features), spool)
    assert image.class_name == "1"


def test_parquet_files_of_a_folder(here: Path, spool: Path) -> None:
    data = here / "hub" / "data"
    data.mkdir(parents=True)
    (here / "hub" / "README.md").write_text("x")
    for split, count in (("train", 3), ("test", 2)):
        for part in range(2):
            source = parquet(here, {"image": [b"%d" % part] * count, "label": [1] * count})
            source.rename(data / f"{split}-{part:05d}-of-00002.parquet")
    images = listed(here / "hub", spool)
    assert [image.read() for image in images] == [b"0"] * 3 + [b"1"] * 3
    assert len(listed(here / "hub", spool, split="test")) == 4
    assert len(listed(f"{data}/test-*.parquet", spool)) == 4
    refused(here / "hub", spool, "splits test, train", split="valid")


def test_files_that_name_classes_differently(here: Path, spool: Path) -> None:
    for name, names in (("a", ["x", "y"]), ("b", ["y", "x"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        parquet(here, {"image": [b"x"], "label": [0]}, features).rename(here / f"{name}.parquet")
    refused(f"{here}/?.parquet".replace("?", "[ab]"), spool, "b.parquet", "other class names")


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.9, 0.999])
def test_parquet_that_was_cut(here: Path, spool: Path, part: float) -> None:
    source = parquet(here, {"image": [bytes([k]) * 50 for k in range(250)]})
    source.write_bytes(source.read_bytes()[: int(source.stat().st_size * part)])
    refused(source, spool, "t.parquet is no whole Parquet file")


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_parquet_is_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    here = tmp_path_factory.mktemp("fuzz")
    source = parquet(here, {"image": [b"abc", b"def"], "label": ["x", "y"]})
    raw = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    source.write_bytes(raw)
    try:
        images = listed(source, here / "spool")
    except ConfigError:
        return
    for image in images:
        image.read()


def test_a_parquet_bomb(here: Path, spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "FREE_BYTES", 1 << 20)
    source = parquet(here, {"image": [bytes(1 << 20)] * 30}, compression="zstd")
    refused(source, spool, "unpacks to more than 100 times")
    assert not list(spool.iterdir())


def test_an_empty_parquet(here: Path, spool: Path) -> None:
    refused(parquet(here, {"image": pa.array([], pa.binary())}), spool, "nothing to pack")
