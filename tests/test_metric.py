"""Metrics: the JSONL file, a real offline W&B run, a real terminal, curves, and that none of it can end a run."""
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

import audio
import metric
import train
from config import Config, UserError, run_cli
from metric import Metrics, curve, plot, positions, read_metrics, smoothed, table, tell, warn

ROOT = Path(__file__).resolve().parents[1]
VALUES = {"train/loss": 1.5, "optim/grad_norm": 0.3, "optim/lr": 1e-3, "time/step_sec": 0.1, "perf/frames_per_sec": 1e4}


def test_lines_survive_a_cut_and_a_resume_drops_what_came_later(tmp_path):
    cfg = Config(out_dir=str(tmp_path), no_wandb=True)
    metrics = Metrics(cfg)
    for step in (1, 2, 3):
        metrics.log(step, {"train/loss": float(step)})
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "train/lo')
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    metrics = Metrics(cfg, step=2)
    metrics.log(3, {"train/loss": 30.0})
    metrics.close()
    assert [(r["step"], r["train/loss"]) for r in read_metrics(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


JUNK = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.floats(), max_size=2))
KEYS = st.sampled_from(["train/loss", "val/flow_loss", "eval/cer", "eval/alignment", "optim/lr", "time/step_sec", "ünknown"])


@given(st.lists(st.dictionaries(KEYS, JUNK), min_size=1, max_size=6), st.floats(0, 1))
@example([{"train/loss": math.nan, "eval/cer": -math.inf, "optim/lr": 10**400, "val/flow_loss": None}, {"train/loss": 1}], 1.0)
def test_any_cut_of_a_file_leaves_the_lines_before_it(lines, where):
    """Also with values that are no numbers; and every reader takes what there is."""
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
            assert all(math.isfinite(value) for _, value in curve(range(len(rows)), rows, key))
        assert len(table([folder]).splitlines()) == 3


def offline_run(out, *texts) -> Path:
    """The folder of the one offline run in `out`, when its file holds the texts: W&B writes it by a process of its own."""
    file, = out.glob("wandb/offline-run-*/*.wandb")
    late = time.monotonic() + 120
    while not all(text.encode() in file.read_bytes() for text in texts):
        assert time.monotonic() < late, [text for text in texts if text.encode() not in file.read_bytes()]
        time.sleep(0.05)
    return file.parent


def evaluation(folder, prompts):
    """An evaluation's folder, of which some prompts lack pictures, sounds, texts or errors."""
    folder.mkdir()
    rows = [{"idx": i, "audio": f"{i:06d}.wav", "reference": f"text\u2028{i}", "hypothesis": f"next {i}" if i else None,
             "wer": i / 10 if i else None, "cer": 0.5, "predicted_seconds": 1.0} for i in range(prompts)]
    for i, row in enumerate(rows):
        audio.write_wav(folder / row["audio"], np.sin(np.arange(2205) * (i + 1) / 9).astype(np.float32), 22050)
        for key in ("mel_png", "alignment_png"):
            if (i, key) not in ((0, "mel_png"), (1, "alignment_png")):
                row[key] = f"{i}_{key}.png"
                Image.fromarray(np.full((80, 50 + i), 10 * i, np.uint8)).save(folder / row[key])
    (folder / rows[2]["audio"]).unlink()
    (folder / "wer.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return folder


def test_wandb_runs_offline_and_gets_sounds_pictures_and_texts(tmp_path, capsys):
    metrics = Metrics(Config(out_dir=str(tmp_path), rope_gamma=61.25))
    assert metrics.wandb is not None
    metrics.record_start({"step": 0, "commit": "c0ffee15", "config": {}})
    metrics.log(1, VALUES)
    metrics.media(1, evaluation(tmp_path / "evaluation", 10))
    metrics.close()
    assert "W&B" not in capsys.readouterr().err  # no warning
    media = offline_run(tmp_path, "train/loss", "rope_gamma", "61.25", "commit", "c0ffee15", "eval/prompts") / "files" / "media"
    for kind, key, missing in (("audio", "audio", 2), ("images", "mel", 0), ("images", "alignment_map", 1)):
        files = [path for path in (media / kind / "eval").iterdir() if re.match(rf"{key}_\d", path.name)]
        assert len(files) == metric.MEDIA_PROMPTS - 1, (missing, files)
        if kind == "images":
            found = [Image.open(path) for path in files]
            assert {picture.size for picture in found} == {(57, 80)}  # one size for W&B, the widest one's
            assert {picture.getpixel((0, 0))[0] for picture in found} == {10 * i for i in range(8) if i != missing}
            assert sorted(picture.getpixel((56, 0))[0] for picture in found) == [0] * 6 + [70]
    text, = (media / "table" / "eval").iterdir()
    text = json.loads(text.read_text())
    assert text["columns"] == ["idx", "reference", "hypothesis", "wer", "cer", "predicted_seconds"] and len(text["data"]) == 10
    assert text["data"][0] == [0, "text\u2028" "0", None, None, 0.5, 1.0] and text["data"][9][2:4] == ["next 9", 0.9]


def test_an_evaluation_that_wandb_cannot_show_is_a_warning(tmp_path, capsys):
    metrics = Metrics(Config(out_dir=str(tmp_path), no_wandb=True))
    metrics.media(1, tmp_path / "none")  # without W&B there is nothing to do
    metrics.wandb = object()
    metrics.media(1, tmp_path / "none")
    metrics.wandb = None
    metrics.close()
    assert capsys.readouterr().err.startswith("warning: W&B could not be written (FileNotFoundError")


def test_a_failing_wandb_does_not_end_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    metrics = Metrics(Config(out_dir=str(tmp_path)))
    metrics.log(1, VALUES)
    metrics.line(1, 10, VALUES)
    assert "no W&B in this run" in capsys.readouterr().err

    class Broken:
        def log(self, _=None):
            raise OSError("disk full")
        finish = log
    metrics.wandb = Broken()
    for step in range(2, 1 + metric.FAILURES):
        metrics.log(step, VALUES)
    assert "W&B could not be written (OSError: disk full); going on" in capsys.readouterr().err
    with pytest.raises(UserError, match="disk full.*--no_wandb"):  # but it does when that repeats itself
        metrics.log(6, VALUES)
    metrics.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == metric.FAILURES + 1


def test_online_is_what_a_url_asks_for(tmp_path, monkeypatch):
    """With --wandb_url W&B is told to be online at that server; here none listens, and the run goes on without."""
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


# --- the terminal

class Terminal:
    """A real terminal of so many columns as standard output and error, and what a user sees there."""

    def __init__(self, monkeypatch, columns=100):
        self.master, slave = pty.openpty()
        self.columns, self.text = columns, b""
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.file = open(slave, "w", encoding="utf-8")
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, self.file)
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self):
        try:
            while got := os.read(self.master, 4096):
                self.text += got
        except OSError:  # the other end is closed
            pass

    def screen(self) -> list[str]:
        """Close the terminal; the lines that stand on it, without what was overwritten."""
        self.file.close()
        self.reader.join()
        os.close(self.master)
        rows, y, x = [""], 0, 0
        for sign in re.findall(r"\x1b\[A|.", self.text.decode(), flags=re.DOTALL):
            if sign in ("\r", "\n", "\x1b[A"):
                y, x = y + {"\r": 0, "\n": 1, "\x1b[A": -1}[sign], 0 if sign == "\r" else x
                rows += [""] * (y + 1 - len(rows))
            else:
                assert sign >= " " and x < self.columns, (sign, rows)
                rows[y], x = rows[y][:x].ljust(x) + sign + rows[y][x + 1:], x + 1
        return [row.rstrip() for row in rows]


def train_a_little(cfg):
    """What training shows, told to Metrics: lines, messages, a warning, an evaluation."""
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


@pytest.mark.parametrize("columns", [38, 100])
def test_a_terminal_has_one_bar_below_all_messages(tmp_path, monkeypatch, columns):
    terminal = Terminal(monkeypatch, columns)
    train_a_little(Config(out_dir=str(tmp_path), no_wandb=True))
    text = terminal.screen()
    assert text[:4] == ["begun", "step 1: short", "warning: no room", "a last evaluation"] and text[5:] == ["done", ""]
    assert re.match(r"step 4/4 \|█+\| 0:00:00 left, loss", text[4])
    if columns == 100:
        assert re.match(r"step 4/4 \|█+\| 0:00:00 left, loss 1.5000, CER 25.0%, 10,000 frames/s, \d+.\d GiB$", text[4])
        assert b"loss 1.5000, 10,000" in terminal.text and b"CER" not in terminal.text.split(b"warning")[0]  # none at first


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


def test_the_error_that_ends_a_run_is_not_torn(tmp_path, monkeypatch):
    def main(_):
        metrics = Metrics(Config(out_dir=str(tmp_path), no_wandb=True))
        metrics.line(1, 4, VALUES)
        raise UserError("a disk is full")
    terminal = Terminal(monkeypatch)
    with pytest.raises(SystemExit):
        run_cli(main)
    text = terminal.screen()
    assert text[0] == "error: a disk is full" and text[1].startswith("step 1/4")


def test_a_run_that_goes_on_shows_its_last_error_rate(tmp_path, monkeypatch):
    cfg = Config(out_dir=str(tmp_path), no_wandb=True)
    metrics = Metrics(cfg)
    for step, cer in ((1, 0.5), (2, 0.25), (3, 0.125)):
        metrics.log(step, {"eval/cer": cer})
    metrics.close()
    terminal = Terminal(monkeypatch)
    metrics = Metrics(cfg, step=2)
    metrics.line(3, 4, VALUES)
    metrics.close()
    assert "CER 25.0%" in terminal.screen()[0]


def test_training_on_a_terminal_with_wandb(demo_corpus, tmp_path, monkeypatch):
    """All of it by train.py: a bar below whole messages, an evaluation's sounds in W&B, the axis in epochs."""
    terminal = Terminal(monkeypatch, 400)
    monkeypatch.chdir(ROOT)
    try:
        train.main([*"--config configs/demo.yaml --width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 "
                    "--text_encoder_layers 1 --effective_batch_size 16 --batch_size 16 --log_interval 1 --val_interval 2 "
                    "--val_num_samples 4 --checkpoint_interval 0 --eval_interval 4 --eval_judge none --eval_steps 1 "
                    "--eval_num_samples 2 --eval_vocoder griffinlim --loader_workers 0 --max_steps 4".split(),
                    "--data_dir", str(demo_corpus), "--out_dir", str(tmp_path)])
    finally:
        text = terminal.screen()
    starts = ["step 2: validation", "step 4: validation", "step 4: speaking 2 prompts", "step 4/4 |", "done at step 4"]
    found = [row for row in text if row.startswith(tuple(starts))]
    assert len(found) == len(starts) and all(row.startswith(start) for row, start in zip(found, starts)), text
    assert "could not be written" not in "".join(text) and "no W&B" not in "".join(text)
    media = offline_run(tmp_path, "eval/prompts", "eval/audio", "steps_per_epoch") / "files" / "media"
    assert [len(list(media.glob(f"*/eval/{name}_*"))) for name in ("audio", "mel", "alignment_map", "prompts")] == [2, 2, 2, 1]
    assert positions(tmp_path, [{"step": 3}, {"step": 6}], "epoch") == [1, 2]  # 48 utterances


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
    rows += [{"step": 8, "time": 0, "eval/cer": 0.1, "eval/wer": 0.2, "eval/alignment": 0.7}]
    rows += [{"step": 9, "train/loss": value, "optim/lr": None, "eval/cer": float("inf")} for value in (float("nan"), "x", [])]
    runs = [write_run(tmp_path / run, rows) for run in ("a", "_b$^$")]
    with open(Path(runs[0]) / "metrics.jsonl", "a") as f:
        f.write('{"step": 9, "trai')
    plot(runs, str(tmp_path / name), smooth=0.5)
    if name.endswith("png"):
        assert np.array(Image.open(tmp_path / name)).std() > 1
    else:
        assert {"loss", "train/loss", "error rates", "eval/cer", "eval/wer", "alignment", "a", "_b$^$"} <= {
            text.strip() for text in texts(tmp_path / name)}
        assert "flow loss" not in texts(tmp_path / name)


@pytest.mark.parametrize("count", [1, 8, 12])
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
    """A stop of a day between steps 20 and 40, of which the clock in `time` knows, and evaluations between lines."""
    rows = [{"step": 0, "eval/cer": 1.0}, {"step": 10, "time": 0, "time/step_sec": 36.0}, {"step": 15, "val/flow_loss": 1.0},
            {"step": 20, "time": 360, "time/step_sec": 72.0}, {"step": 20, "eval/cer": 0.5},
            {"step": 40, "time": 86400, "time/step_sec": 36.0}, {"step": 41, "time/step_sec": "broken"}]
    np.testing.assert_allclose(positions(tmp_path, rows, "hours"), [0, 0.1, 0.2, 0.3, 0.3, 0.5, 0.5])
    run = write_run(tmp_path / "a", rows)
    assert "| a | 41 | 0.50 | - |" in table([run])
    plot([run], str(tmp_path / "x.svg"), "hours")
    assert "hours of training" in texts(tmp_path / "x.svg")
    with pytest.raises(UserError, match="--x hours: no time/step_sec in metrics.jsonl of b; use --x step"):
        plot([run, write_run(tmp_path / "b", rows[:1])], str(tmp_path / "x.svg"), "hours")


def test_epochs_are_those_of_the_last_start_that_says_them(tmp_path):
    starts = [{"step": 0, "steps_per_epoch": 5}, {"step": 8, "steps_per_epoch": 4}, {"step": 9}]
    run = write_run(tmp_path / "a", [{"step": 8, "train/loss": 1.0}], starts)
    assert positions(tmp_path / "a", read_metrics(tmp_path / "a" / "metrics.jsonl"), "epoch") == [2]
    plot([run], str(tmp_path / "x.svg"), "epoch")
    assert "epoch" in texts(tmp_path / "x.svg")
    with pytest.raises(UserError, match="--x epoch: no steps_per_epoch in runs.jsonl of b, c; use --x step"):
        plot([run, write_run(tmp_path / "b", [{"step": 8}], starts[2:]), write_run(tmp_path / "c", [{"step": 8}])], "x.svg", "epoch")


def test_the_table_has_the_last_and_the_best(tmp_path):
    rows = [{"step": 10, "train/loss": 1.0, "time/step_sec": 36.0}, {"step": 10, "val/flow_loss": 0.25},
            {"step": 20, "val/flow_loss": 0.125}, {"step": 20, "eval/cer": 0.04, "eval/wer": 0.2},
            {"step": 30, "train/loss": 0.5, "time/step_sec": 36.0}, {"step": 30, "val/flow_loss": 0.5},
            {"step": 30, "eval/cer": 0.05, "eval/wer": 0.1}, {"step": 31, "eval/cer": float("nan"), "val/flow_loss": None}]
    runs = [write_run(tmp_path / "a|b", rows), write_run(tmp_path / "empty", [])]
    done = subprocess.run([sys.executable, "metric.py", *runs, "--table"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[2:] == [
        r"| a\|b | 31 | 0.30 | 0.5000 | 0.5000 | 0.1250 (step 20) | 5.00% | 4.00% (step 20) | 10.00% | 10.00% (step 30) |",
        "| empty | - | - | - | - | - | - | - | - | - |"]
    assert {line.replace(r"\|", "").count("|") for line in done.stdout.splitlines()} == {11}


def test_curves_refuse(tmp_path):
    done = subprocess.run([sys.executable, "metric.py", tmp_path, "--out", "x.png"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "no metrics" in done.stderr and done.stderr.count("\n") == 1
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no curves"):
        plot([str(tmp_path)], str(tmp_path / "x.png"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 1.0}')
    for smooth in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="--smooth"):
            plot([str(tmp_path)], str(tmp_path / "x.png"), smooth=smooth)
    with pytest.raises(UserError, match="--out curves.png, or --table"):
        metric.main([str(tmp_path)])
    for bad in (tmp_path / "none" / "x.png", tmp_path / "x.nonsense"):
        with pytest.raises(UserError, match="cannot write"):
            plot([str(tmp_path)], str(bad))
