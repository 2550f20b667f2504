"""H: security. Hostile checkpoints, shards, strings, addresses; secrets; the static gate."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bounded import bounded
from drill import ROOT, Cells, Drill
from forks import Ranks, train
from mangling import mangled_inputs
from tracing import begun, need_strace

from fastclr import checkpointing, foreign_weights
from fastclr.config import Config, ConfigError, DataConfig, EncoderConfig, HeadConfig
from fastclr.simclr import SimCLR
from pipelines.shards import ShardError, ShardSet
from tests.pipelines.flaky import flaky

URLS = "tests/pipelines/test_remote_urls.py"
HOSTILE = "tests/pipelines/test_foreign_hostile.py"
NEW = "step-0000002"
PWNED = "PWNED"


class Payload:
    """Makes the canary file when it is unpickled."""

    def __init__(self, file: Path, call: str = "system") -> None:
        self._file, self._call = str(file), call

    def __reduce__(self) -> Any:
        if self._call == "eval":
            return eval, (f"open({self._file!r}, 'w').close()",)
        if self._call == "nested":
            inner = io.BytesIO()
            torch.save({"x": Payload(Path(self._file))}, inner)
            return torch.storage._load_from_bytes, (inner.getvalue(),)
        return os.system, (f"touch {self._file}",)


def hostile_checkpoints(cells: Cells) -> None:
    """H1: checkpoints and weights that would run code or take all memory."""
    start, canary = begun(cells.folder), cells.folder / PWNED
    evil = pickle.dumps({"module": Payload(canary)})
    states = "mp_rank_00_model_states.pt"

    def sealed(c: Path) -> None:
        """Write the list anew, as an attacker can."""
        facts = json.loads((c / "fastclr.json").read_text())
        facts["sha256"] = {n: checkpointing.sha256_of(c / n) for n in facts["sha256"]}
        facts.pop(checkpointing.SEAL)
        facts[checkpointing.SEAL] = checkpointing._seal(facts)
        (c / "fastclr.json").write_text(json.dumps(facts, indent=1))

    def owned_by_another(c: Path) -> None:
        (c / states).write_bytes(evil)
        sealed(c)
        os.chown(c / states, 12345, 12345)

    def open_to_others(c: Path) -> None:
        (c / states).write_bytes(evil)
        sealed(c)
        (c / states).chmod(0o666)

    def in_an_open_folder(c: Path) -> None:
        (c / states).write_bytes(evil)
        sealed(c)
        c.chmod(0o777)

    refused: dict[str, Callable[[Path], object]] = {
        "a pickle for DeepSpeed's module": lambda c: (c / states).write_bytes(evil),
        "one more file for DeepSpeed": lambda c: (c / "mp_rank_01_model_states.pt").write_bytes(
            evil
        ),
        "a list made anew, another user's file": owned_by_another,
        "a list made anew, a file open to others": open_to_others,
        "a list made anew, a folder open to others": in_an_open_folder,
        "a link": lambda c: ((c / states).unlink(), (c / states).symlink_to("/etc/passwd")),
        "a pipe": lambda c: ((c / states).unlink(), os.mkfifo(c / states)),
        "a pipe for the list": lambda c: (
            (c / "fastclr.json").unlink(),
            os.mkfifo(c / "fastclr.json"),
        ),
    }
    if os.geteuid():
        refused.pop("a list made anew, another user's file")
    for name, change in refused.items():
        with cells.cell(name):
            run_dir = cells.folder / "hostile"
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(start, run_dir)
            change(run_dir / "checkpoints" / NEW)
            run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir))
            assert run.wait(20) and run.codes == [78], (run.codes, run.said())
            assert "Traceback" not in run.said() and not canary.exists(), run.said()
    with cells.cell("pickles beside it that nothing reads"):
        run_dir = cells.folder / "beside"
        shutil.copytree(start, run_dir)
        for name in ("side.pth", ".metadata", "x.pkl"):
            (run_dir / "checkpoints" / NEW / name).write_bytes(evil)
        run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir))
        assert run.wait() and run.codes == [0] and not canary.exists(), run.said()
    for name, data in _weights(canary).items():
        with cells.cell(name):
            file = cells.folder / ("w.safetensors" if "safetensors" in name else "w.pth")
            file.write_bytes(data)
            bounded(partial(_load_weights, file), ConfigError, seconds=4, mib=200)
            assert not canary.exists()


def _load_weights(file: Path) -> None:
    config = Config(
        encoder=EncoderConfig("resnet10", 0.125, "small"), head=HeadConfig(output_dim=8)
    )
    foreign_weights.load(SimCLR.from_config(config), file)


def _weights(canary: Path) -> dict[str, bytes]:
    """Return files of weights that are hostile."""
    found = {}
    for call in ("system", "eval", "nested"):
        stream = io.BytesIO()
        torch.save({"state_dict": {"conv1.weight": Payload(canary, call)}}, stream)
        found[f"torch.save with {call}"] = stream.getvalue()
    found["a payload before a broken tail"] = pickle.dumps(Payload(canary)) + b"\xff" * 99

    def tensors(header: Any, body: bytes = bytes(16)) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + body

    def one(**fields: Any) -> dict[str, Any]:
        return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16], **fields}}

    found["safetensors, a header of 1 GB"] = struct.pack("<Q", 10**9) + b"{}"
    found["safetensors, a header of 2^63"] = struct.pack("<Q", 2**63) + b"{}"
    found["safetensors, a negative place"] = tensors(one(data_offsets=[-16, 0]))
    found["safetensors, places that overlap"] = tensors({**one(), "b": one()["a"]})
    found["safetensors, a name twice"] = tensors(
        json.dumps(one())[:-1].encode() + b"," + json.dumps(one())[1:].encode()
    )
    found["safetensors, 10^9 numbers"] = tensors(one(shape=[10**9]))
    found["safetensors, a shape that overflows"] = tensors(one(shape=[2**62, 4]))
    return found


def hostile_shards(cells: Cells) -> None:
    """H2: tars that would leave their folder, run code or take all memory."""
    folder, canary = cells.folder / "tars", cells.folder / PWNED
    folder.mkdir()
    image = ShardSet.open(cells.folder / "train").read(0)
    file = folder / "x.tar"
    outside = sorted(p for p in cells.folder.iterdir())

    def info(name: str, size: int = 0, **fields: Any) -> tarfile.TarInfo:
        made = tarfile.TarInfo(name)
        made.size = size
        for key, value in fields.items():
            setattr(made, key, value)
        return made

    def tar(*parts: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as made:
            made.addfile(info("good.jpg", len(image)), io.BytesIO(image))
            for part, data in parts:
                made.addfile(part, io.BytesIO(data))
        return stream.getvalue()

    evil, bomb = pickle.dumps(Payload(canary)), info("big.jpg", 8 << 30).tobuf(tarfile.GNU_FORMAT)
    nested = tar()
    pax = info("p", 2**40, type=tarfile.XHDTYPE).tobuf(tarfile.GNU_FORMAT)
    hostile = {
        "pickled members": tar(
            *((info(f"a.{e}", len(evil)), evil) for e in ("pyd", "pkl", "pth", "npy"))
        ),
        "a path upwards": tar((info("../../up.jpg", len(image)), image)),
        "an absolute path": tar((info("/tmp/up.jpg", len(image)), image)),
        "a link": tar((info("l.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd"), b"")),
        "a hard link": tar((info("h.jpg", type=tarfile.LNKTYPE, linkname="/etc/passwd"), b"")),
        "a device": tar((info("d.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5), b"")),
        "8 GiB that are not there": tar()[: 512 + -(-len(image) // 512) * 512] + bomb,
        "attributes of 1 TiB": tar()[: 512 + -(-len(image) // 512) * 512] + pax,
        "20,000 members": tar(*((info(f"m{k}.txt"), b"") for k in range(20_000))),
        "a name with NUL": tar((info("a\0b.jpg", len(image)), image)),
        "a name with a newline": tar((info("a\nb.jpg", len(image)), image)),
        "a name of 64 kB": tar((info("n" * 65_536 + ".jpg", len(image)), image)),
        "a key twice": tar((info("good.jpg", len(image)), image)),
        "a tar in the tar": tar((info("t.tar", len(nested)), nested)),
        "a compressed bomb": _compressed(),
        "a tar that is no tar": os.urandom(4096),
    }
    for name, data in hostile.items():
        with cells.cell(name):
            for old in folder.iterdir():
                old.unlink()
            file.write_bytes(data)
            bounded(partial(_read_all, file), ShardError, seconds=8, mib=256, may_return=True)
            assert not canary.exists()
            assert sorted(p for p in cells.folder.iterdir()) == outside
    cells.tests(HOSTILE)


def _compressed() -> bytes:
    import gzip

    return gzip.compress(bytes(64 << 20))


def _read_all(file: Path) -> None:
    found = ShardSet.open(file, cache_dir=file.parent, max_damaged=1)
    for i in range(len(found)):
        found.read(i)
        found.place(i)


STRINGS = (
    "pipe:touch PWNED", "pipe:cat /etc/passwd", "-", "--output=PWNED", "$(touch PWNED)",
    "`touch PWNED`", "a.tar\ntouch PWNED", "{0..999999999}.tar", "x{0..9}{0..9999999}.tar",
    "ftp://host/a", "gs::http://x", "file:/etc/passwd",
)  # fmt: skip
_TRY = """
import sys
from pipelines.shards import ShardError, ShardSet
from fastclr.config import ConfigError
for text in {strings!r}:
    try: ShardSet.open(text); print("OPENED", text)
    except (ShardError, ConfigError, OSError) as error: print("refused", type(error).__name__)
"""


def hostile_strings(cells: Cells) -> None:
    """H3: names that look like commands, options or patterns: no process, no file."""
    need_strace()
    work = cells.folder / "work"
    work.mkdir()
    log = cells.folder / "strace.txt"
    code = _TRY.format(strings=STRINGS)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "GOPEN_REWRITE": "http=pipe:touch PWNED"}
    command = ["strace", "-f", "-qq", "-e", "trace=execve", "-o", str(log)]
    command += [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=work, env=environ, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    for text, line in zip(STRINGS, lines, strict=False):
        cells.check(repr(text), line.startswith("refused"))
    cells.check("all were tried", len(lines) == len(STRINGS) and done.returncode == 0)
    calls = [line for line in log.read_text().splitlines() if "execve(" in line and "= 0" in line]
    cells.check(f"no process: {calls[1:3]}", len(calls) == 1)
    cells.check("no file", not list(work.iterdir()))


def addresses(cells: Cells) -> None:
    """H4: internal addresses, redirects, schemes: refused before anything is connected to."""
    cells.tests(
        URLS,
        "tests/pipelines/test_sources_remote.py::test_a_table_reaches_no_internal_address",
        "tests/pipelines/test_sources_remote.py::test_a_remote_table_reaches_nothing_else",
    )


def secrets(cells: Cells) -> None:
    """H5: eight secrets, a run that fails and one that does not; none is in anything it leaves."""
    names = ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "COMET_API_KEY")
    canaries = [f"CaNaRy{cells.generator.randrange(10**12):012d}" for _ in range(8)]
    user, signature, token = canaries[5:]
    environ = dict(zip(names, canaries, strict=False))
    packed = (cells.folder / "train").resolve()
    with flaky() as server:
        for file in packed.iterdir():
            server.objects[f"/t/{file.name}?sig={signature}&token={token}"] = file.read_bytes()
        url = server.url("/t").replace("http://", f"http://{user}:{user}@")
        data = DataConfig(train=f"{url}?sig={signature}&token={token}",
                          cache_dir=str(cells.folder / "cache"))  # fmt: skip
        fault: dict[str, Any] = {"a whole run": None, "status 403": "403", "status 404": "404",
                                 "wrong bytes": "wrong bytes"}  # fmt: skip
        for name, kind in fault.items():
            with cells.cell(name):
                shutil.rmtree(cells.folder / "cache", ignore_errors=True)
                server.draw = lambda path, number, kind=kind: kind
                run_dir = cells.folder / name
                work = partial(_with_environment, environ, train, cells.folder, run_dir, data=data)
                run = Ranks(cells.folder, 1, work)
                assert run.wait(60), run.said()
                assert (run.codes == [0]) == (kind is None), run.said()
                places = [*run_dir.rglob("*"), *run.logs, *(cells.folder / "cache").rglob("*")]
                leaks = [
                    f"{canary} in {place}"
                    for place in places if place.is_file()
                    for canary in canaries if canary.encode() in place.read_bytes()
                ]  # fmt: skip
                assert not leaks, leaks
    cells.tests(
        "tests/pipelines/test_remote.py::test_no_secret_is_in_any_message",
        "tests/test_facts.py::test_secrets_are_taken_out_at_any_depth",
        f"{URLS}::test_no_form_of_password_is_printed",
    )


def _with_environment(
    environ: dict[str, str], work: Callable[..., None], *args: Any, **more: Any
) -> None:
    os.environ.update(environ)
    work(*args, **more)


def hostile_inputs(cells: Cells) -> None:
    """H6: image bombs, and mangled tars, indexes, manifests, settings, checkpoints' lists."""
    cells.tests(
        "tests/pipelines/test_decode.py::test_too_many_pixels_are_refused_before_decoding",
        "tests/pipelines/test_decode.py::test_headers_of_too_many_pixels_are_refused",
        "tests/pipelines/test_decode.py::test_no_header_raises_anything_else",
        "tests/pipelines/test_decode.py::test_other_formats_are_refused",
    )
    mangled_inputs(cells, 100_000 if cells.is_long else 5_000)


PLANTED = {
    "S202": "import tarfile\ntarfile.open('x').extractall('y')\n",
    "S301": "import pickle\npickle.load(open('x', 'rb'))\n",
    "S307": "eval(input())\n",
    "S102": "exec(input())\n",
    "S602": "import subprocess\nsubprocess.run(input(), shell=True)\n",
    "S605": "import os\nos.system(input())\n",
    "S506": "import yaml\nyaml.load(open('x'))\n",
    "S501": "import requests\nrequests.get('https://x', verify=False, timeout=1)\n",
    "S324": "import hashlib\nhashlib.md5(b'x').hexdigest()\n",
}


def static_gate(cells: Cells) -> None:
    """H7: the gate of `make check` is red on each planted example; floors; folders of others."""
    for rule, code in PLANTED.items():
        with cells.cell(rule):
            command = [
                sys.executable,
                "-m",
                "ruff",
                "check",
                "--no-cache",
                "--output-format",
                "concise",
            ]
            command += ["--stdin-filename", "fastclr/planted.py", "-"]
            done = subprocess.run(command, cwd=ROOT, input=code, capture_output=True, text=True)
            assert done.returncode == 1 and rule in done.stdout, done.stdout + done.stderr
    text = (ROOT / "pyproject.toml").read_text()
    floors = {name: tuple(map(int, found.split("."))) for name, found in
              re.findall(r'"(torch|deepspeed)>=([\d.]+)"', text)}  # fmt: skip
    cells.check("torch's floor", floors["torch"] >= (2, 10))
    cells.check("DeepSpeed's floor", floors["deepspeed"] > (0, 18, 10))
    cells.tests(
        "tests/test_static_gate.py",
        "tests/pipelines/test_cache.py::test_a_folder_others_can_write_to_is_refused",
    )


DRILLS = {
    "H1": Drill(
        "20 hostile checkpoints and weights: refused with a typed error, nothing runs",
        hostile_checkpoints,
        120,
    ),
    "H2": Drill(
        "16 hostile tars and more: nothing runs, nothing outside, 256 MiB at most",
        hostile_shards,
        120,
    ),
    "H3": Drill("names like commands, options, patterns: no process, no file", hostile_strings, 60),
    "H4": Drill("internal addresses, redirects, schemes: refused before connecting", addresses, 60),
    "H5": Drill("8 secrets: none in logs, metrics, checkpoints, caches", secrets, 90),
    "H6": Drill(
        "image bombs and mangled inputs: typed errors, no hang over 1 s", hostile_inputs, 120, 1800
    ),
    "H7": Drill(
        "the static gate is red on each planted example; unsafe folders refused", static_gate, 60
    ),
}
