"""B: exactly the same data. From any storage, on any ranks, after any interruption."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

from drill import Cells, Drill
from forks import Ranks, lessons, outcome, train

from fastclr import audit
from fastclr.config import DataConfig
from pipelines.mixture import open_sets
from pipelines.shards import ShardSet
from pipelines.writer import write_shards
from tests.pipelines.flaky import flaky
from tests.pipelines.tars import write

LOADER = "tests/pipelines/test_loader.py"
ORDER = "tests/pipelines/test_order.py"


def any_storage(cells: Cells) -> None:
    """B1: the same run from a disk and over http, whole and killed on the way."""
    packed = (cells.folder / "train").resolve()
    with flaky() as server:
        server.objects.update({f"/train/{f.name}": f.read_bytes() for f in packed.iterdir()})
        cache = str(cells.folder / "cache")
        remote = DataConfig(train=server.url("/train"), cache_dir=cache)
        ends = {}
        for ranks in (1, 2):
            for kind in ("disk", "http"):
                run_dir = cells.folder / f"{kind}{ranks}"
                more = {"data": remote} if kind == "http" else {}
                work = partial(train, cells.folder, run_dir, ranks - 1, **more)
                with cells.cell(f"{kind}, {ranks} ranks, killed"):
                    run = Ranks(cells.folder, ranks, work)
                    run.wait_for(run_dir / "checkpoints/step-0000004")
                    run.kill()
                    run = Ranks(cells.folder, ranks, work)
                    assert run.wait() and not any(run.codes), run.said()
                    ends[kind, ranks] = outcome(run_dir)
                    assert ends[kind, ranks] == ends["disk", ranks]
        with cells.cell("the same images on one rank and on two"):
            seen = []
            for ranks in (1, 2):
                steps: dict[int, list[int]] = {}
                for step, _, ids, *_ in lessons(cells.folder / f"disk{ranks}"):
                    steps.setdefault(step, []).extend(ids)
                seen.append(steps)
            assert seen[0] == seen[1]


def odd_sizes(cells: Cells) -> None:
    """B2: shards of any size, ranks and batches that do not divide them."""
    cells.tests(
        f"{ORDER}::test_an_epoch_of_blocks_holds_each_id_once",
        f"{ORDER}::test_the_ranks_take_slices_of_the_global_batch",
        f"{ORDER}::test_an_epoch_drops_its_incomplete_batch",
        f"{LOADER}::test_an_epoch_holds_each_id_once",
        f"{LOADER}::test_1000_places_are_the_same_on_any_ranks_and_after_resume_on_others",
        f"{LOADER}::test_three_ranks_go_on_at_a_position_of_another_batch_size",
    )


def views_differ(cells: Cells) -> None:
    """B3: no two batches of views are equal; those after a kill are the ones of the whole run."""
    whole = Ranks(cells.folder, 2, partial(train, cells.folder, cells.folder / "whole"))
    assert whole.wait() and not any(whole.codes), whole.said()
    run_dir = cells.folder / "killed"
    run = Ranks(cells.folder, 2, partial(train, cells.folder, run_dir))
    run.wait_for(run_dir / "checkpoints/step-0000006")
    run.kill()
    run = Ranks(cells.folder, 2, partial(train, cells.folder, run_dir))
    assert run.wait() and not any(run.codes), run.said()
    found = lessons(cells.folder / "whole")
    views = [entry[3] for entry in found]
    cells.check("all differ, over steps, epochs and ranks", len(set(views)) == len(views) == 30)
    cells.check("the same after a kill", lessons(run_dir) == found)
    cells.tests(
        f"{LOADER}::test_views_are_the_policys",
        f"{LOADER}::test_threads_and_prefetch_change_nothing",
        f"{LOADER}::test_the_seed_changes_order_and_views",
    )


def equal_names(cells: Cells) -> None:
    """B4: equal names of files, keys and paths: no image stands in for another."""
    images = (cells.folder / "train").resolve().parent / "images"
    sets = [
        Path(write_shards(images / part, cells.folder / f"{part}_set/set").path)
        for part in ("train", "test")
    ]
    local = [ShardSet.open(path) for path in sets]
    names = [{f.name for f in path.glob("*.tar")} for path in sets]
    assert names[0] == names[1] and local[0].read(0) != local[1].read(0)
    everything = [[one.read(i) for i in range(len(one))] for one in local]
    cache = cells.folder / "cache"
    with cells.cell("two folders, one name"):
        mixed = open_sets(f"{sets[0]}:0.5,{sets[1]}:0.5")
        assert [mixed.read(i) for i in range(len(mixed))] == everything[0] + everything[1]
    for name, urls in {
        "two folders behind URLs": ("/a/set", "/b/set"), "?x=1 and ?x=2": ("/c?x=1", "/c?x=2"),
    }.items():  # fmt: skip
        with cells.cell(name), flaky() as server:
            for path, url in zip(sets, urls, strict=True):
                base, mark, query = url.partition("?")
                for file in path.iterdir():
                    server.objects[f"{base}/{file.name}{mark}{query}"] = file.read_bytes()
            for _ in range(2):  # the second time from the cache
                for url, expected in zip(urls, everything, strict=True):
                    far = ShardSet.open(server.url(url), cache_dir=cache)
                    assert [far.read(i) for i in range(len(far))] == expected
    with cells.cell("one key in two tars: each image once an epoch"):
        foreign = cells.folder / "foreign"
        foreign.mkdir()
        half = len(everything[0]) // 2
        for number, part in enumerate((everything[0][:half], everything[0][half:])):
            members = [(f"{k:04d}.jpg", data) for k, data in enumerate(part)]
            write(foreign / f"{number}.tar", members)
        found = ShardSet.open(foreign, cache_dir=cache)
        assert [found.read(i) for i in range(len(found))] == everything[0]
        run_dir = cells.folder / "run"
        data = DataConfig(train=str(foreign), cache_dir=str(cache))
        run = Ranks(cells.folder, 1, partial(train, cells.folder, run_dir, data=data))
        assert run.wait() and run.codes == [0], run.said()
        wrong = [row for row in audit.audit(run_dir) if not row.is_good]
        assert not wrong, wrong


def other_data(cells: Cells) -> None:
    """B5: data that changed between two starts is refused, with both digests."""
    folder = cells.folder
    run = Ranks(folder, 1, partial(train, folder, folder / "run", epochs=1))
    assert run.wait() and not any(run.codes), run.said()
    changed = shutil.copytree((folder / "train").resolve(), folder / "changed")
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["class_names"] = manifest["class_names"][::-1]
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with cells.cell("one byte of the manifest"):
        shutil.rmtree(folder / "run/checkpoints/step-0000005")
        data = DataConfig(train=str(changed))
        run = Ranks(folder, 1, partial(train, folder, folder / "run", epochs=1, data=data))
        assert run.wait() and run.codes == [78], (run.codes, run.said())
        assert "digest" in run.said() or "other data" in run.said(), run.said()
    cells.tests(f"{LOADER}::test_a_position_of_other_data_is_refused")


DRILLS = {
    "B1": Drill(
        "disk and http, one rank and two, killed on the way: the same end", any_storage, 120
    ),
    "B2": Drill(
        "any shards, ranks and batches: each image once, the same steps on all", odd_sizes, 90
    ),
    "B3": Drill(
        "views differ over steps, epochs, ranks; after a kill they are the same", views_differ, 90
    ),
    "B4": Drill(
        "equal names of files, keys and paths: no image stands in for another", equal_names, 90
    ),
    "B5": Drill("data that changed between two starts is refused", other_data, 90),
}
