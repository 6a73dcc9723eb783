"""The speedrun's script: what the score of a run is, what a record keeps, and what is refused."""
import json
import re
import shutil

import pytest
import torch
from conftest import ROOT

import evaluator
from audio import write_wav
from common import UserError
from config import Config
from corpus import Corpus
from eval import ctc
from records import run as records
from vocoder import griffin_lim


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
    line = records.table_row("demo-cpu", "name", "idea", [found, found | {"minutes": 3.0}, found | {"minutes": 2.0}], "2026-01-01")
    assert line == "| demo-cpu | **2.00** | 1.00 (5.0% at 20), 3.00 (5.0% at 20), 2.00 (5.0% at 20) | idea | 2026-01-01 | [log](name/) |"
    confirmed = found | {"test_rate": 0.041, "test_target": 0.05}
    assert "| **1.00** | 1.00 (5.0% at 20; test 4.1%) |" in records.table_row("t", "n", "i", [confirmed], "d")
    assert "| not reached | 1.00 (5.0% at 20), 1.00 (6.0% at 20) |" in records.table_row("t", "n", "i", [found, never], "d")


@pytest.mark.parametrize("rate, minutes", [(0.05, 1.0), (0.051, None)])
def test_a_target_reached_on_val_counts_if_it_is_reached_on_test(tmp_path, monkeypatch, rate, minutes):
    """Only the checkpoint that reached it on val is heard, once, on the prompts of test."""
    calls = []

    def call(*command):
        calls.append(command)
        (tmp_path / "test").mkdir()
        (tmp_path / "test" / "summary.json").write_text(json.dumps({"cer": rate}))
    monkeypatch.setattr(records, "call", call)
    found = records.time_to_target(metrics(0.3, 0.05, 0.01), "eval/cer", 0.05)
    confirmed = records.confirm(records.TRACKS["demo-cpu"], found, tmp_path, "nowhere")
    assert confirmed == found | {"test_rate": rate, "test_target": 0.05, "minutes": minutes}
    assert calls == [("evaluator.py", "--ckpt", str(tmp_path / "ckpt_step_00000020.pt"), "--prompts", "test", "--num", "128",
                      "--out_dir", str(tmp_path / "test"))]
    never = records.time_to_target(metrics(0.3), "eval/cer", 0.05)
    assert records.confirm(records.TRACKS["demo-cpu"], never, tmp_path, "nowhere") == never and len(calls) == 1


def test_a_row_joins_the_end_of_the_table_and_the_rest_of_the_page_stays():
    page = "# The speedrun\n\n| track | corpus |\n|---|---|\n| `demo-cpu` | x |\n\n| track | minutes | more |\n|---|---|---|\n\n| idea | CER |\n"
    twice = records.add_row(records.add_row(page, "| demo-cpu | 1 |"), "| ljspeech-gpu | 2 |")
    rule = "|---|---|---|\n"
    assert twice == page.replace(rule, f"{rule}| demo-cpu | 1 |\n| ljspeech-gpu | 2 |\n")
    ours = (ROOT / "records" / "README.md").read_text()
    assert records.add_row(ours, "| demo-cpu | new |").replace("| demo-cpu | new |\n", "") == ours


def test_a_record_keeps_the_logs_of_each_seed_and_the_config_of_the_first(tmp_path):
    runs = []
    for seed in (1337, 1338):
        out = tmp_path / str(seed)
        out.mkdir()
        for name in ("config.yaml", "metrics.jsonl", "runs.jsonl"):
            (out / name).write_text(f"{name} {seed}")
        runs.append({"minutes": 1.0, "seed": seed, "out": out})
    records.write_record(tmp_path / "record", "an idea", runs)
    kept = {p.name: p.read_text() for p in (tmp_path / "record").iterdir()}
    readme = kept.pop("README.md")
    assert kept == {"config.yaml": "config.yaml 1337", "metrics_1337.jsonl": "metrics.jsonl 1337", "runs_1337.jsonl": "runs.jsonl 1337",
                    "metrics_1338.jsonl": "metrics.jsonl 1338", "runs_1338.jsonl": "runs.jsonl 1338"}
    assert readme.startswith("# record\n\nan idea\n\n```bash\npython ")
    assert json.loads(readme.split("```json\n")[1].split("```")[0]) == [{"minutes": 1.0, "seed": 1337}, {"minutes": 1.0, "seed": 1338}]


def test_a_failed_command_is_an_error():
    with pytest.raises(UserError, match="nothing.py failed; nothing was recorded"):
        records.call("nothing.py")


@pytest.mark.slow
def test_a_target_above_the_recordings_is_measured_on_them(demo_corpus, tmp_path, monkeypatch):
    corpus = shutil.copytree(demo_corpus, tmp_path / "corpus")
    recordings = tmp_path / "wavs"
    recordings.mkdir()
    opened = Corpus(str(corpus), Config())
    ctc.train_judge(opened, Config(), corpus / "judge_ctc.pt", steps=2)
    for i in opened.split("val", Config()):
        wav = griffin_lim(torch.from_numpy(opened.mel(i).astype("float32")), Config(), iterations=2)
        write_wav(recordings / f"{opened.ids[i]}.wav", wav, 22050)
    flags = ["--data_dir", str(corpus), "--eval_judge", "ctc", "--eval_prompts", "val", "--eval_num_samples", "3"]
    track = records.TRACKS["ljspeech-gpu"]
    monkeypatch.setattr(records, "call", lambda script, *flags: {"evaluator.py": evaluator.main}[script](list(flags)))  # in this process
    goal = records.target(track, flags, str(recordings), tmp_path / "heard")
    heard = json.loads((tmp_path / "heard" / "recordings.json").read_text())
    assert heard["count"] == 3 and heard["judge"].startswith("ctc ") and goal == heard["wer"] + 0.02
    assert records.target(records.TRACKS["demo-cpu"], flags, "nowhere", tmp_path) == 0.05


def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "HERE", tmp_path)
    (tmp_path / "taken").mkdir()
    for flags, complaint in ((["--name", "taken"], "exists already"), (["--name", "new", "--seeds", "0"], "--seeds 0")):
        with pytest.raises(UserError, match=complaint):
            records.main(["demo-cpu", "--idea", "x", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.slow
def test_a_track_runs_from_corpus_to_record(demo_corpus, tmp_path, monkeypatch):
    """At a tiny size: judge, training, evaluation, the record's folder and its row. The target is one that any voice reaches."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(records, "HERE", tmp_path)  # so that the test leaves nothing in the repository
    (tmp_path / "README.md").write_text("# Records\n\n| track | minutes |\n|---|---|\n\nWhat was tried.\n")
    monkeypatch.setitem(records.TRACKS, "demo-cpu", records.TRACKS["demo-cpu"]._replace(target=9.0))
    corpus = shutil.copytree(demo_corpus, tmp_path / "corpus")
    monkeypatch.setattr(ctc, "STEPS", 2)
    ctc.load_ctc_judge(str(corpus), Config())
    small = ("--width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 --text_encoder_layers 1 "
             "--effective_batch_size 4 --batch_size 4 --max_steps 2 --eval_interval 2 --val_interval 0 --eval_steps 1 "
             f"--eval_num_samples 1 --data_dir {corpus}").split()
    records.main(["demo-cpu", "--name", "tiny", "--idea", "none", "--seeds", "1", *small])
    row = (tmp_path / "README.md").read_text().splitlines()[4]
    assert re.fullmatch(r"\| demo-cpu \| \*\*0\.\d\d\*\* \| 0\.\d\d \(\d+\.\d% at 2; test \d+\.\d%\) \| none \| .* \[log\]\(tiny/\) \|", row), row
    assert {p.name for p in (tmp_path / "tiny").iterdir()} == {"README.md", "config.yaml", "metrics_1337.jsonl", "runs_1337.jsonl"}
