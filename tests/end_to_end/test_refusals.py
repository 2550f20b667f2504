"""Bad input gets one clear message, a non-zero exit, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil

import pytest

pytestmark = pytest.mark.slow


def refused(done, *words, code=78):
    """Check one clear message that has all the words."""
    said = done.stderr
    assert done.returncode == code, said[-3000:]
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    for word in words:
        assert word in said, f"{word!r} is not in: {said}"


@pytest.fixture
def pack(commands, tmp_path):
    def run(source):
        out = tmp_path / "shards" / "train"
        done = commands.run("tools/make_shards.py", source, "--out", out)
        assert not list(tmp_path.glob("shards/*")), "something was left behind"
        return done

    return run


def test_packing_a_missing_folder(pack, tmp_path):
    refused(pack(tmp_path / "nowhere"), "nowhere", "does not exist", "give a folder")


def test_packing_an_empty_class(pack, photos, tmp_path):
    shutil.copytree(photos.images / "test", tmp_path / "images")
    (tmp_path / "images" / "zebra").mkdir()
    refused(pack(tmp_path / "images"), "zebra", "is empty", "Remove the folder or add images")


def test_packing_a_file_that_is_no_image(pack, photos, tmp_path):
    shutil.copytree(photos.images / "test", tmp_path / "images")
    (tmp_path / "images" / "rocket" / "notes.txt").write_text("not an image")
    done = pack(tmp_path / "images")
    refused(done, "1 of 161 files", "rocket/notes.txt", "Remove or repair", code=65)


@pytest.fixture
def train(commands, photos, tmp_path):
    def run(*flags, ds=""):
        run_dir = ("--run-dir", tmp_path / "run")
        done = commands.run(*commands.train("--data.train", photos.train, *run_dir, *flags, ds=ds))
        assert not (tmp_path / "run").exists(), "a refused run left its folder"
        return done

    return run


def test_training_on_a_folder_that_is_no_shard_set(train, photos):
    done = train("--data.train", photos.images)
    refused(done, "images is no shard set", "fastclr shards", code=65)


def test_a_wrong_flag(train):
    done = train("--optimiser.momentum", "0.9")
    assert done.returncode == 2
    assert "optimiser.momentum" in done.stdout + done.stderr
    assert "--optimizer.momentum" in done.stdout + done.stderr, "the right name is not suggested"


def test_a_missing_deepspeed_json(train, tmp_path):
    refused(train(ds=tmp_path / "no.json"), "no.json", "cannot be read", "--ds-config")


def test_no_deepspeed_json(commands, photos, tmp_path):
    command = ["fastclr/train.py", "--recipe", "demo"]
    done = commands.run(*command, "--data.train", photos.train, "--run-dir", tmp_path / "run")
    refused(done, "--ds-config")


def test_a_json_with_two_owners_for_one_key(train, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_batch_size": 256}))
    refused(train(ds=file), "global_batch_size is 128", "256", "two owners", "Make them equal")
    file.write_text('{"train_batch_size": 128, "train_batch_size": 256}')
    refused(train(ds=file), "'train_batch_size' twice", "Remove one")


def test_a_batch_of_one_image(train):
    refused(train("--global-batch-size", "1"), "global_batch_size is 1", "Give 2 or more")


def test_a_batch_larger_than_the_data(train):
    refused(train("--global-batch-size", "1000"), "640 samples", "1000", "Lower")


def test_fp16_without_zero_is_refused(train, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"fp16": {"enabled": True}}))
    refused(train(ds=file), "fp16 at ZeRO stage 0 is refused", "Use stage 1, 2 or 3, or bf16")


def test_parameters_that_lars_does_not_have(train, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"optimizer": {"type": "LARS", "params": {"trust_coef": 0.1}}}))
    refused(train(ds=file), "optimizer trust_coef", "unknown to LARS: choose from")


def test_a_loss_with_what_is_not_its_own(train):
    refused(train("--loss.margin", "0.4"), "loss.margin does nothing for nt_xent", "leave it out")
    refused(train("--loss.name", "nt_exnt"), "'nt_exnt' is unknown", "margin_triplet")


def test_half_precision_with_batch_norm_is_refused(train, tmp_path):
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}))
    refused(train(ds=file), "bf16 with BatchNorm", "Use torch_autocast")


def test_all_problems_are_told_at_once(train):
    done = train("--global-batch-size", "1", "--loss.temperature", "0", "--views.size", "4")
    refused(done, "global_batch_size is 1", "loss.temperature is 0", "views.size is 4")


def test_evaluating_what_was_never_trained(commands, photos, tmp_path):
    sets = ("--train", photos.train, "--test", photos.test)
    done = commands.run("tools/evaluate.py", "--run", tmp_path, *sets)
    refused(done, "config.json cannot be read", "training run")
