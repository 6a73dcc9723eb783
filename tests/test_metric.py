"""Metrics: what is summed between two lines, the JSONL file, a real offline W&B run, a real terminal, and the curves."""
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import audio
import metric
import train
from common import UserError, tell, warn
from config import Config
from metric import Metrics, Window, curve, plot, read_metrics, read_runs, smoothed, table

ROOT = Path(__file__).resolve().parents[1]
VALUES = {"train/loss": 1.5, "optim/grad_norm": 0.3, "optim/lr": 1e-3, "time/step_sec": 0.1, "perf/frames_per_sec": 1e4}


# --- the window between two lines

LOSSES = st.floats(2**-9, 100, width=32)


@given(st.lists(st.tuples(LOSSES, LOSSES, st.booleans()), min_size=1, max_size=9), st.integers(0, 9))
@settings(max_examples=15)
def test_the_number_of_ranks_and_a_stop_change_no_mean(steps, stop):
    """Two ranks that each see a part of every step, stop and resume, against the exact mean."""
    windows = [Window(("loss",), "cpu"), Window(("loss",), "cpu")]
    ranks = [SimpleNamespace(rank=rank, world=2) for rank in (0, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda t: t.copy_(sum(window.losses for window in windows)))
        for n, (*losses, skipped) in enumerate(steps):
            if n == stop:
                state = windows[1].state(ranks[1])
                assert state == windows[0].state(ranks[0]) and json.loads(json.dumps(state)) == state
                windows[:] = Window(("loss",), "cpu"), Window(("loss",), "cpu")
                windows[0].load(state, ranks[0])
                windows[1].load(state, ranks[1])
            for window, loss in zip(windows, losses):
                window.add(torch.tensor([loss], dtype=torch.float64), 100, 0.5, 0.125, skipped)
        counted = [loss for *losses, skipped in steps if not skipped for loss in losses]
        mean = {"loss": math.fsum(counted) / (len(counted) // 2)} if counted else {}
        assert [window.means(rank) for window, rank in zip(windows, ranks)] == [mean, mean]
    assert windows[0].rates() == {"time/step_sec": 0.5, "time/data_wait_sec": 0.125, "perf/frames_per_sec": 200}
    windows[0].clear()
    assert windows[0].state(SimpleNamespace(rank=0, world=1)) == {"losses": [0.0], "counts": [0.0] * 5}


def test_the_losses_of_a_skipped_step_do_not_count():
    window, ranks = Window(("loss", "flow_loss"), "cpu"), SimpleNamespace(rank=0, world=1)
    window.add(torch.tensor([math.nan, math.inf], dtype=torch.float64), 1, 1.0, 0.0, True)
    assert window.means(ranks) == {}
    window.add(torch.tensor([3.0, 2.0], dtype=torch.float64), 1, 1.0, 0.0, False)
    assert window.means(ranks) == {"loss": 3.0, "flow_loss": 2.0}
    with pytest.raises(RuntimeError):  # a checkpoint with other losses
        window.load({"losses": [1.0] * 3, "counts": [0.0] * 5}, ranks)


# --- metrics.jsonl and W&B

def test_lines_survive_a_cut_and_a_resume_drops_the_later_ones(tmp_path):
    cfg = Config(out_dir=str(tmp_path), no_wandb=True)
    metrics = Metrics(cfg)
    for step, cer in ((1, 0.5), (2, 0.25), (3, 0.125)):
        metrics.log(step, {"eval/cer": cer})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    metrics = Metrics(cfg, step=2)
    assert metrics.logged == {"step", "time", "eval/cer"}
    metrics.log(3, {"train/loss": 30.0})
    metrics.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("eval/cer"), row.get("train/loss")) for row in rows] == [(1, 0.5, None), (2, 0.25, None), (3, None, 30.0)]


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats(), max_size=2))
KEYS = st.sampled_from(["train/loss", "val/flow_loss", "eval/cer", "eval/alignment_score", "optim/lr", "time/step_sec", "ünknown"])


@settings(max_examples=15)
@given(st.lists(st.dictionaries(KEYS, JUNK), min_size=1, max_size=6), st.floats(0, 1))
@example([{"train/loss": math.nan, "eval/cer": -math.inf, "optim/lr": 10**400, "val/flow_loss": None}, {"train/loss": 1}], 1.0)
def test_any_cut_of_a_file_leaves_the_lines_before_it(lines, where):
    """Also with values that are not numbers. All readers take what is there."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Metrics(Config(out_dir=folder, no_wandb=True))
        for step, values in enumerate(lines, 1):
            metrics.log(step, values)
        metrics.close()
        file = Path(folder) / "metrics.jsonl"
        whole = file.read_bytes()
        cut = round(where * len(whole))
        file.write_bytes(whole[:cut])
        ends = [end.start() for end in re.finditer(b"\n", whole)]
        kept = [values for end, values in zip(ends, lines) if end <= cut]
        rows = read_metrics(file)
        assert [row["step"] for row in rows] == list(range(1, len(kept) + 1))
        assert json.dumps([{k: row[k] for k in row.keys() - {"step", "time"}} for row in rows], sort_keys=True) == \
            json.dumps(kept, sort_keys=True)
        for key in {key for row in kept for key in row}:
            assert all(math.isfinite(value) for _, value in curve(rows, key))
        assert len(table([folder]).splitlines()) == 3


def offline_run(out, *texts) -> Path:
    """The folder of the one offline run in `out`, once its file holds the texts. W&B writes it in a process of its own."""
    file, = out.glob("wandb/offline-run-*/*.wandb")
    late = time.monotonic() + 120
    while not all(text.encode() in file.read_bytes() for text in texts):
        assert time.monotonic() < late, [text for text in texts if text.encode() not in file.read_bytes()]
        time.sleep(0.05)
    return file.parent


def evaluation(folder, prompts):
    """An evaluation's folder, with pictures of different widths. The first prompt was not judged."""
    folder.mkdir()
    rows = [{"idx": i, "audio": f"{i:06d}.wav", "reference": f"text\u2028{i}", "hypothesis": f"next {i}" if i else None,
             "wer": i / 10 if i else None, "cer": 0.5, "predicted_seconds": 1.0} for i in range(prompts)]
    for i, row in enumerate(rows):
        audio.write_wav(folder / row["audio"], np.sin(np.arange(2205) * (i + 1) / 9).astype(np.float32), 22050)
        for key in ("mel_png", "attention_png"):
            row[key] = f"{i}_{key}.png"
            Image.fromarray(np.full((80, 50 + i), 10 * i, np.uint8)).save(folder / row[key])
    (folder / "wer.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


@pytest.mark.slow
def test_wandb_runs_offline_and_gets_audio_pictures_and_texts(tmp_path, capsys):
    metrics = Metrics(Config(out_dir=str(tmp_path), rope_gamma=61.25))
    assert metrics.wandb is not None
    metrics.record_start({"step": 0, "commit": "c0ffee15", "config": {}})
    metrics.log(1, VALUES)
    metrics.media(1, evaluation(tmp_path / "evaluation", 10))
    metrics.close()
    assert "W&B" not in capsys.readouterr().err  # no warning
    media = offline_run(tmp_path, "train/loss", "rope_gamma", "61.25", "commit", "c0ffee15", "eval/prompts") / "files" / "media"
    files = {key: list((media / kind / "eval").glob(f"{key}_[0-9]*")) for kind, key in
             (("audio", "audio"), ("images", "mel"), ("images", "attention_map"))}
    assert {key: len(paths) for key, paths in files.items()} == dict.fromkeys(files, metric.MEDIA_PROMPTS)
    for key in ("mel", "attention_map"):
        pictures = [Image.open(path) for path in files[key]]
        assert {picture.size for picture in pictures} == {(57, 80)}  # the widest one's; W&B would stretch the others
        assert {picture.getpixel((0, 0))[0] for picture in pictures} == {10 * i for i in range(8)}
        assert sorted(picture.getpixel((56, 0))[0] for picture in pictures) == [0] * 7 + [70]
    text, = (media / "table" / "eval").iterdir()
    text = json.loads(text.read_text())
    assert text["columns"] == ["idx", "reference", "hypothesis", "wer", "cer", "predicted_seconds"] and len(text["data"]) == 10
    assert text["data"][0] == [0, "text\u2028" "0", None, None, 0.5, 1.0] and text["data"][9][2:4] == ["next 9", 0.9]


def test_a_failing_wandb_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    metrics = Metrics(Config(out_dir=str(tmp_path)))
    metrics.log(1, VALUES)
    metrics.media(1, tmp_path / "none")  # without W&B there is nothing to do
    assert metrics.wandb is None and capsys.readouterr().err.count("no W&B in this run") == 1

    def fail(*_):
        raise OSError("disk full")
    metrics.wandb = SimpleNamespace(log=fail, finish=fail)
    metrics.media(1, tmp_path / "none")
    for step in range(3, 1 + metric.FAILURES):
        metrics.log(step, VALUES)
    assert capsys.readouterr().err.count("W&B could not be written") == metric.FAILURES - 1
    with pytest.raises(UserError, match="disk full.*5 times in a row.*--no_wandb"):
        metrics.log(6, VALUES)
    metrics.close()
    assert "W&B could not be written (OSError: disk full); training continues" in capsys.readouterr().err
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == metric.FAILURES


def test_a_url_means_online(tmp_path, monkeypatch):
    """With --wandb_url, W&B connects to that server. Here none answers, and the run continues without."""
    asked = {}
    wandb = pytest.importorskip("wandb")

    def init(**kwargs):
        asked.update(kwargs, url=metric.os.environ["WANDB_BASE_URL"])
        raise wandb.errors.CommError("nobody there")
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    metrics = Metrics(Config(out_dir=str(tmp_path), wandb_url="http://127.0.0.1:9"))
    metric.os.environ.pop("WANDB_BASE_URL")
    assert asked["mode"] == "online" and asked["url"] == "http://127.0.0.1:9" and metrics.wandb is None
    metrics.close()


def test_a_full_disk_delays_a_line_and_tears_none(tmp_path, capsys):
    metrics = Metrics(Config(out_dir=str(tmp_path), no_wandb=True))
    file, room = metrics.file, iter([30])  # the bytes that still fit; then there are none

    def write(data):
        try:
            return file.write(data[:next(room)])
        except StopIteration:
            raise OSError(28, "No space left on device") from None
    metrics.file = SimpleNamespace(write=write)
    metrics.log(1, VALUES)
    metrics.log(2, VALUES)
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert capsys.readouterr().err.count("metrics.jsonl could not be written (OSError: [Errno 28] No space") == 2
    metrics.file = file  # there is room again
    metrics.close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


# --- the terminal

def train_a_little(cfg):
    """What a training run shows: progress, messages, a warning, an evaluation."""
    metrics = Metrics(cfg)
    tell("begun")
    metrics.line(1, 4, VALUES)
    tell("step 1: short")
    metrics.line(2, 4, VALUES)
    metrics.log(2, {"eval/cer": 0.25})
    warn("no room")
    metrics.line(4, 4, VALUES)
    tell("a last evaluation")
    metrics.close()
    tell("done")


def test_a_log_file_has_lines_and_no_control_characters(tmp_path, monkeypatch):
    with open(tmp_path / "log", "w") as log:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, log)
        train_a_little(Config(out_dir=str(tmp_path), no_wandb=True))
        assert (tmp_path / "log").read_text().endswith("done\n")  # at once, though the file is still open
    log = (tmp_path / "log").read_text()
    assert all(sign >= " " or sign == "\n" for sign in log)
    assert re.sub(r" \|.*", "", log).splitlines() == ["begun", "step 1/4", "step 1: short", "step 2/4", "warning: no room",
                                                      "step 4/4", "a last evaluation", "done"]
    assert "step 2/4 | loss 1.5000 | grad 0.30 | lr 1.00e-03 | 0.100 s/step | 10,000 frames/s | 0:00:00 left" in log


@pytest.mark.slow
def test_training_shows_its_progress_and_an_evaluation_goes_to_wandb(demo_corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    train.main([*"--config configs/grammar.yaml --width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 "
                "--text_encoder_layers 1 --effective_batch_size 16 --batch_size 16 --log_interval 1 --val_interval 1 "
                "--val_num_samples 4 --checkpoint_interval 0 --eval_interval 2 --eval_judge none --eval_steps 1 "
                "--eval_num_samples 2 --eval_vocoder griffinlim --loader_threads 1 --max_steps 2".split(),
                "--data_dir", str(demo_corpus), "--out_dir", str(tmp_path)])
    out, err = capsys.readouterr()
    starts = ["step 1/2 |", "step 1: ", "step 2/2 |", "step 2: val", "step 2: syn", "step 2: evaluated", "done at step 2"]
    found = [row for row in out.splitlines() if row.startswith(tuple(starts))]
    assert len(found) == len(starts) and all(row.startswith(start) for row, start in zip(found, starts)), out
    assert "could not be written" not in err and "no W&B" not in err
    media = offline_run(tmp_path, "eval/prompts", "eval/audio") / "files" / "media"
    assert [len(list(media.glob(f"*/eval/{name}_*"))) for name in ("audio", "mel", "attention_map", "prompts")] == [2, 2, 2, 1]


# --- curves

def write_run(folder, rows, starts=()):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if starts:
        (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in starts))
    return str(folder)


def texts(svg: Path) -> list[str]:
    return re.findall("<!-- (.*?) -->", svg.read_text())


@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_curves_of_two_runs(tmp_path, name):
    rows = [{"step": s, "time": 0, "train/loss": 2 / s, "optim/lr": 1e-3} for s in range(1, 9)]
    rows += [{"step": 8, "time": 0, "eval/cer": 0.1, "eval/wer": 0.2, "eval/alignment_score": 0.7}]
    rows += [{"step": 9, "train/loss": value, "optim/lr": None, "eval/cer": float("inf")} for value in (float("nan"), "x", [])]
    runs = [write_run(tmp_path / run, rows) for run in ("a", "_b")]
    with open(Path(runs[0]) / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "trai')
    plot(runs, str(tmp_path / name), smooth=0.5)
    if name.endswith("png"):
        assert np.array(Image.open(tmp_path / name)).std() > 1
    else:
        assert {"loss", "train/loss", "error rates", "eval/cer", "eval/wer", "alignment score", "a", "_b"} <= {
            text.strip() for text in texts(tmp_path / name)}
        assert "flow loss" not in texts(tmp_path / name)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3, 12])
def test_each_run_has_a_colour(tmp_path, count):
    rows = [{"step": s, "train/flow_loss": 2 / s, "val/flow_loss": 3 / s, "eval/cer": 0.1} for s in range(1, 61)]
    runs = [write_run(tmp_path / str(n), rows) for n in range(count)]
    for smooth in (0.0, 0.9):
        plot(runs, str(tmp_path / "x.svg"), smooth=smooth)
        svg = (tmp_path / "x.svg").read_text()
        drawn = re.findall(r'<path d="[^"]{500,}".*?style="([^"]*)"', svg)  # the curves of 60 points
        faint = [look for look in drawn if "stroke-opacity: 0.25" in look]
        assert len(drawn) - len(faint) == 3 * count and len(faint) == (count if smooth else 0)
        assert len({re.search("stroke: (#[0-9a-f]{6})", look)[1] for look in drawn}) == max(2, count)


def test_smoothing_is_a_weighted_mean_of_what_came_before():
    values = np.random.default_rng(0).normal(size=50) + 9
    for weight in (0.0, 0.5, 0.98):
        expected = [np.average(values[:n + 1], weights=weight ** np.arange(n, -1, -1.0)) for n in range(50)]
        np.testing.assert_allclose(smoothed(values, weight), expected, rtol=1e-9)


def test_hours_are_those_of_training(tmp_path):
    """`time` includes a stop of a day between steps 20 and 40; hours do not. Other lines are in between."""
    rows = [{"step": 0, "eval/cer": 1.0}, {"step": 10, "time": 0, "time/step_sec": 36.0}, {"step": 15, "val/flow_loss": 1.0},
            {"step": 20, "time": 360, "time/step_sec": 72.0}, {"step": 20, "eval/cer": 0.5},
            {"step": 40, "time": 86400, "time/step_sec": 36.0}, {"step": 41, "time/step_sec": "broken"}]
    run = write_run(tmp_path / "a", rows)
    (found,) = read_runs([run]).values()
    np.testing.assert_allclose([row["hours"] for row in found], [0, 0.1, 0.2, 0.3, 0.3, 0.5, 0.5])
    assert "| a | 41 | 0.50 | - |" in table([run])
    plot([run], str(tmp_path / "x.svg"), "hours")
    assert "hours of training" in texts(tmp_path / "x.svg")
    with pytest.raises(UserError, match="--x hours: no curves to draw in b; .* for hours also time/step_sec"):
        plot([run, write_run(tmp_path / "b", rows[:1])], str(tmp_path / "x.svg"), "hours")


def test_the_table_has_the_last_and_the_best(tmp_path, capsys):
    rows = [{"step": 10, "train/loss": 1.0, "time/step_sec": 36.0}, {"step": 10, "val/flow_loss": 0.25},
            {"step": 20, "val/flow_loss": 0.125}, {"step": 20, "eval/cer": 0.04, "eval/wer": 0.2},
            {"step": 30, "train/loss": 0.5, "time/step_sec": 36.0}, {"step": 30, "val/flow_loss": 0.5},
            {"step": 30, "eval/cer": 0.05, "eval/wer": 0.1}, {"step": 31, "eval/cer": float("nan"), "val/flow_loss": None}]
    metric.main([write_run(tmp_path / "a", rows), write_run(tmp_path / "empty", [])])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| a | 31 | 0.30 | 0.5000 | 0.5000 | 0.1250 (step 20) | 5.00% | 4.00% (step 20) | 10.00% | 10.00% (step 30) |",
        "| empty | - | - | - | - | - | - | - | - | - |"]
    assert {line.count("|") for line in lines} == {11}


def test_runs_with_one_name_are_told_apart(tmp_path):
    runs = [write_run(tmp_path / folder / "run", [{"step": 1}]) for folder in "ab"]
    assert list(read_runs(runs)) == ["run", f"{runs[1]}/metrics.jsonl"]


def test_curves_refuse(tmp_path, capsys):
    run, out = write_run(tmp_path / "run", []), str(tmp_path / "x.png")
    for words, message in ([str(tmp_path), "--out", out], "no metrics at .*expected the folder of a run"), \
            ([run, "--out", out], "no curves to draw in run"), \
            ([run, "--out", str(tmp_path / "x.nonsense")], "ends in .png, .svg or .pdf"), \
            *(([run, "--out", out, "--smooth", smooth], "--smooth") for smooth in ("-0.1", "1", "nan")):
        with pytest.raises(UserError, match=message):
            metric.main(words)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}')
    with pytest.raises(UserError, match="cannot write"):
        metric.main([run, "--out", str(tmp_path / "none" / "x.png")])
    metric.main([run, "--table", "--out", out])
    assert capsys.readouterr().out.endswith(f"wrote {out}\n") and sorted(os.listdir(tmp_path)) == ["run", "x.png"]
