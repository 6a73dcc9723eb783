"""The speedrun's script: what a run's score is, and what it refuses. The runs themselves are no matter for tests."""
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from audio import griffin_lim, write_wav
from config import Config, UserError
from data import Corpus
from eval import ctc

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("records_run", ROOT / "records" / "run.py")
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)


def metrics(*rates):
    rows = [{"step": 5, "train/loss": 1.0}]
    return rows + [{"step": 10 * n, "eval/cer": rate, "time/train_sec": 30.0 * n, "time/eval_sec": 6.0} for n, rate in enumerate(rates, 1)]


def test_the_score_is_the_training_time_of_the_first_evaluation_at_the_target():
    found = records.time_to_target(metrics(0.3, 0.05, 0.01), "eval/cer", 0.05)
    assert found == {"minutes": 1.0, "step": 20, "rate": 0.05, "target": 0.05, "train_minutes": 1.5,
                     "eval_minutes": pytest.approx(0.3), "compile_minutes": 0}
    compiled = records.time_to_target([{"step": 1, "time/compile_sec": 90.0}, *metrics(0.01)], "eval/cer", 0.05)
    assert compiled["compile_minutes"] == 1.5 and compiled["minutes"] == 0.5
    never = records.time_to_target(metrics(0.3, 0.06), "eval/cer", 0.05)
    assert never["minutes"] is None and never["rate"] == 0.06 and never["train_minutes"] == 1.0
    with pytest.raises(UserError, match="eval_interval"):
        records.time_to_target(metrics(), "eval/cer", 0.05)
    line = records.row("demo-cpu", "name", "idea", [found, found | {"minutes": 3.0}, found | {"minutes": 2.0}], "2026-01-01")
    assert line == "| demo-cpu | **2.00** | 1.00 (5.0% at 20), 3.00 (5.0% at 20), 2.00 (5.0% at 20) | idea | 2026-01-01 | [log](name/) |"
    assert "| not reached | 1.00 (5.0% at 20), 1.00 (6.0% at 20) |" in records.row("t", "n", "i", [found, never], "d")


def test_a_row_joins_the_tables_end_and_the_rest_of_the_page_stays():
    page = "# The speedrun\n\n| track | corpus |\n|---|---|\n| `demo-cpu` | x |\n\n| track | minutes | more |\n|---|---|---|\n\n| idea | CER |\n"
    once = records.add_row(page, "| demo-cpu | 1 |")
    twice = records.add_row(once, "| open-vocab-gpu | 2 |")
    assert twice.splitlines()[6:] == ["| track | minutes | more |", "|---|---|---|", "| demo-cpu | 1 |", "| open-vocab-gpu | 2 |", "",
                                      "| idea | CER |"]
    assert records.add_row((ROOT / "records" / "README.md").read_text(), "| demo-cpu | new |").count("| demo-cpu | new |\n") == 1


def test_where_the_target_hangs_on_the_recordings_the_judge_hears_them(demo_corpus, tmp_path):
    corpus = shutil.copytree(demo_corpus, tmp_path / "corpus")
    recordings = tmp_path / "wavs"
    recordings.mkdir()
    ctc.main(["--data_dir", str(corpus), "--judge_steps", "2"])
    opened = Corpus(str(corpus), Config())
    for i in opened.split("val", Config()):
        wav = griffin_lim(torch.from_numpy(opened.mel(i).astype("float32")), Config(), iterations=2)
        write_wav(recordings / f"{opened.ids[i]}.wav", wav, 22050)
    flags = ["--data_dir", str(corpus), "--eval_judge", "ctc", "--eval_prompts", "val", "--eval_num_samples", "3"]
    track = records.TRACKS["ljspeech-gpu"]
    goal = records.target(track, flags, str(recordings), tmp_path / "heard")
    heard = json.loads((tmp_path / "heard" / "recordings.json").read_text())
    assert heard["count"] == 3 and heard["judge"] == "ctc" and goal == heard["wer"] + 0.02
    assert records.target(records.TRACKS["demo-cpu"], flags, "nowhere", tmp_path) == 0.05
    with pytest.raises(UserError, match="nothing.py failed; nothing was recorded"):
        records.call("nothing.py")


def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "HERE", tmp_path)
    (tmp_path / "taken").mkdir()
    for flags, complaint in ((["--name", "taken"], "exists already"), (["--name", "new", "--seeds", "0"], "--seeds 0")):
        with pytest.raises(UserError, match=complaint):
            records.main(["demo-cpu", "--idea", "x", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
