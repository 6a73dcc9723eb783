"""
python -m pytest tests/test_checkpoint.py

Checkpoints and exported folders: complete or absent when written, refused in one line when damaged, and safe to resume from.
"""
import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_common import full_disk
from test_model import batch_of, small_model

from checkpoint import export, load_checkpoint, read_checkpoint, resume_checkpoint, save_checkpoint
from common import UserError
from optim import make_optimizers

FUZZ = settings(suppress_health_check=list(HealthCheck))
EDITS = st.lists(st.tuples(st.sampled_from(["flip", "set", "cut", "insert", "delete"]), st.floats(0, 1), st.integers(0, 255)),
                 min_size=1, max_size=3)
CORPUS = "ab" * 32  # a corpus's fingerprint


def damage(data: bytes, edits) -> bytes:
    """Edit bytes, each edit (kind, place, value). Places are mostly near both ends of the file, where its structure is."""
    data = bytearray(data)
    for kind, place, value in edits:
        if not data:
            break
        i = min(int(len(data) * (4 * (place - 0.5) ** 3 + 0.5)), len(data) - 1)
        if kind == "flip":
            data[i] ^= 1 << value % 8
        elif kind == "set":
            data[i] = value
        elif kind == "cut":
            del data[i:]
        elif kind == "insert":
            data[i:i] = bytes([value]) * (1 + value % 7)
        else:
            del data[i:i + 1 + value % 7]
    return bytes(data)


def outcome(function, *args):
    """What the function returns, or None if it raises UserError. The message must be one line, and not a long one."""
    try:
        return function(*args)
    except UserError as e:
        assert len(str(e).splitlines()) == 1 and len(str(e)) < 2000
        return None


def run_state(out, **changes):
    """A small model after one step of training: config, model, optimisers and averages."""
    model = small_model(out_dir=str(out), **changes)
    optimizers, ema = make_optimizers(model, model.cfg), {name: p.detach() + 0.01 for name, p in model.named_parameters()}
    model(batch_of([20], ["abc"]))["loss"].backward()
    for optimizer in optimizers:
        optimizer.step()
    return model.cfg, model, optimizers, ema


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as training writes it, of step 3."""
    out = tmp_path_factory.mktemp("run")
    save_checkpoint(*run_state(out), 3, {"corpus": CORPUS})
    return out / "latest.pt"


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("share") / "voice"
    export(load_checkpoint(str(checkpoint), "cpu")[0], 3, str(folder))
    return folder


# --- writing

@pytest.mark.parametrize("links", [True, False])
def test_the_newest_checkpoints_are_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    state = run_state(tmp_path, keep_checkpoints=2)
    for step in (4, 8, 12):
        save_checkpoint(*state, step, {})
    assert sorted(os.listdir(tmp_path)) == ["ckpt_step_00000008.pt", "ckpt_step_00000012.pt", "latest.pt"]
    assert [read_checkpoint(str(tmp_path / name))["step"] for name in ("ckpt_step_00000008.pt", "latest.pt")] == [8, 12]


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_full_disk_leaves_the_old_checkpoint_and_no_export(checkpoint, tmp_path, room):
    shutil.copy(checkpoint, tmp_path)
    state = run_state(tmp_path)
    with full_disk(room), pytest.raises((UserError, RuntimeError)):
        save_checkpoint(*state, 4, {})
    with full_disk(room), pytest.raises(UserError, match="cannot write .*voice"):
        export(state[1], 4, str(tmp_path / "voice"))
    assert os.listdir(tmp_path) == ["latest.pt"] and read_checkpoint(str(tmp_path / "latest.pt"))["step"] == 3


# --- reading what is damaged

@pytest.mark.slow
@given(edits=EDITS)
@example(edits=[("cut", 0.0, 0)])  # an empty file
@example(edits=[("insert", 1.0, 6)])
@settings(FUZZ)
def test_a_damaged_checkpoint_loads_or_is_refused_in_one_line(checkpoint, tmp_path, edits):
    (tmp_path / "c.pt").write_bytes(damage(checkpoint.read_bytes(), edits))
    outcome(load_checkpoint, str(tmp_path / "c.pt"), "cpu")


@pytest.mark.slow
@given(place=st.floats(0, 1), bit=st.integers(0, 7))
@settings(FUZZ, max_examples=40)
def test_a_flipped_bit_is_noticed_or_harmless(checkpoint, tmp_path, place, bit):
    data = bytearray(checkpoint.read_bytes())
    data[min(int(place * len(data)), len(data) - 1)] ^= 1 << bit
    (tmp_path / "c.pt").write_bytes(data)
    found, whole = outcome(read_checkpoint, str(tmp_path / "c.pt")), read_checkpoint(str(checkpoint))
    if found is not None:
        assert found["config"] == whole["config"] and found["step"] == 3
        for part in ("model", "ema"):
            assert found[part].keys() == whole[part].keys()
            assert all(torch.equal(found[part][name], whole[part][name]) for name in whole[part])


@pytest.mark.parametrize("data", [slice(0), slice(2000), slice(-1), slice(200, None), b"hello", b"\x80", b"PK\x03\x04", bytes(3000)])
def test_files_that_are_cut_off_or_something_else_are_refused(checkpoint, tmp_path, data):
    path = tmp_path / "two\nlines.pt"
    assert outcome(read_checkpoint, str(path)) is None
    path.write_bytes(checkpoint.read_bytes()[data] if isinstance(data, slice) else data)
    assert outcome(read_checkpoint, str(path)) is None
    with pytest.raises(UserError, match="cannot be read as a checkpoint .*cut off or damaged"):
        read_checkpoint(str(path))


@pytest.mark.parametrize("wrong", [{"config": None}, {"config": []}, {"model": "x"}, {"step": "three"}, {"step": None}])
def test_other_entries_are_refused(checkpoint, tmp_path, wrong):
    torch.save(torch.load(checkpoint, weights_only=True) | wrong, tmp_path / "c.pt")
    with pytest.raises(UserError, match="not a checkpoint of this project"):
        load_checkpoint(str(tmp_path / "c.pt"), "cpu")


@pytest.mark.parametrize(("change", "message"), [
    ({"width": "x"}, "width = 'x' is not of type int"), ({"heads": 5}, "heads = 5: does not divide width = 32"),
    ({"width": [3] * 500}, "width = "), ({"mel_mean": None}, "no mel_mean"), ({"from_the_future": 1}, "from_the_future"),
    ({"layers": 1}, "do not fit")])
def test_a_config_that_cannot_work_is_refused(checkpoint, tmp_path, change, message):
    ckpt = torch.load(checkpoint, weights_only=True)
    torch.save(ckpt | {"config": ckpt["config"] | change}, tmp_path / "c.pt")
    with pytest.raises(UserError) as e:
        load_checkpoint(str(tmp_path / "c.pt"), "cpu")
    assert message in str(e.value) and len(str(e.value)) < 500 and (str(tmp_path) in str(e.value) or "layers" in change)


@given(name=st.sampled_from(["model.safetensors", "config.yaml", "corpus.json"]), edits=EDITS)
@example(name="model.safetensors", edits=[("flip", 0.5, 0)])  # in the middle of the weights
@settings(FUZZ)
def test_a_damaged_export_loads_or_is_refused_in_one_line(exported, tmp_path_factory, name, edits):
    folder = shutil.copytree(exported, tmp_path_factory.mktemp("fuzz") / "voice")
    before = (folder / name).read_bytes()
    (folder / name).write_bytes(after := damage(before, edits))
    found = outcome(load_checkpoint, str(folder), "cpu")
    assert found is None or name != "model.safetensors" or after == before  # the SHA-256 notices each change


@pytest.mark.parametrize("name", ["model.safetensors", "config.yaml", "corpus.json"])
def test_an_export_of_missing_or_mixed_files_is_refused(exported, tmp_path, name):
    export(small_model(seed=1, mel_mean=-4.0, layers=3).eval(), 9, str(tmp_path / "other"))
    for change in ("missing", "empty", "folder", "another's"):
        folder = shutil.copytree(exported, tmp_path / change)
        (folder / name).unlink()
        if change == "empty":
            (folder / name).touch()
        elif change == "folder":
            (folder / name).mkdir()
        elif change == "another's":
            shutil.copy(tmp_path / "other" / name, folder)
        assert outcome(load_checkpoint, str(folder), "cpu") is None
    with pytest.raises(UserError, match="name its latest.pt"):
        read_checkpoint(str(tmp_path))  # some other folder


# --- resuming

def test_resuming_restores_every_bit(checkpoint, tmp_path):
    """Fields that do not shape training may change."""
    cfg, model, optimizers, ema = run_state(tmp_path, seed=7, resume=str(checkpoint), batch_size=2, run_name="other", eval_steps=3)
    assert resume_checkpoint(cfg, model, optimizers, ema, CORPUS)["step"] == 3
    save_checkpoint(cfg, model, optimizers, ema, 3, {"corpus": CORPUS})
    old, new = (torch.load(path, weights_only=True) for path in (checkpoint, tmp_path / "latest.pt"))
    for part in ("model", "ema", "optimizers"):
        torch.testing.assert_close(new[part], old[part], rtol=0, atol=0)


@pytest.mark.parametrize(("changes", "corpus", "message"), [
    ({"learning_rate": 0.5}, CORPUS, "learning_rate was 0.003, is 0.5"), ({"effective_batch_size": 8}, CORPUS, "effective_batch_size was 4, is 8"),
    ({}, "cd" * 32, "the corpus was abababababab, is cdcdcdcdcdcd")])
def test_a_changed_recipe_or_corpus_is_refused(checkpoint, tmp_path, changes, corpus, message):
    state = run_state(tmp_path, resume=str(checkpoint), **changes)
    before = {name: p.clone() for name, p in state[1].named_parameters()}
    with pytest.raises(UserError, match=message):
        resume_checkpoint(*state, corpus)
    assert all(torch.equal(p, before[name]) for name, p in state[1].named_parameters())


def test_an_export_and_another_versions_checkpoint_cannot_be_resumed(checkpoint, exported, tmp_path):
    with pytest.raises(UserError, match="holds no optimiser state"):
        resume_checkpoint(*run_state(tmp_path, resume=str(exported)), CORPUS)
    torch.save(torch.load(checkpoint, weights_only=True) | {"optimizers": []}, tmp_path / "c.pt")
    with pytest.raises(UserError, match="does not fit this version"):
        resume_checkpoint(*run_state(tmp_path, resume=str(tmp_path / "c.pt")), CORPUS)


def test_a_checkpoint_from_before_a_field_was_there_works_as_it_did(checkpoint, tmp_path):
    ckpt = torch.load(checkpoint, weights_only=True)
    for name in ("predicts", "learning_rate"):
        del ckpt["config"][name]
    torch.save(ckpt, tmp_path / "old.pt")
    assert load_checkpoint(str(tmp_path / "old.pt"), "cpu")[0].cfg.predicts == "velocity"
    with pytest.raises(UserError, match="predicts was 'velocity', is 'mel'; learning_rate was 0.003, is 0.5"):
        resume_checkpoint(*run_state(tmp_path, resume=str(tmp_path / "old.pt"), learning_rate=0.5), CORPUS)


def test_a_folder_with_a_run_is_not_overwritten(checkpoint, tmp_path):
    state, fresh = run_state(tmp_path), {"step": 0}
    assert resume_checkpoint(*state, CORPUS) == fresh
    for name in ("latest.pt", "metrics.jsonl"):  # a run killed before its first checkpoint has metrics only
        (tmp_path / name).write_text("x")
        with pytest.raises(UserError, match="holds a run already; add --resume latest"):
            resume_checkpoint(*state, CORPUS)
        (tmp_path / name).unlink()
    assert resume_checkpoint(dataclasses.replace(state[0], resume="latest"), *state[1:], CORPUS) == fresh
    with pytest.raises(UserError, match=f"no checkpoint at {Path(tmp_path, 'none.pt')}"):
        resume_checkpoint(dataclasses.replace(state[0], resume=str(tmp_path / "none.pt")), *state[1:], CORPUS)
