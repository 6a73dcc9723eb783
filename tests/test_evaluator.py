"""Evaluation: prompts, judges, artifacts, and that ranks share the work without changing it."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from matplotlib.image import imread
from test_model import small_model

import audio
import evaluator
from config import Config, UserError
from eval import ctc
from evaluator import Prompt, compare, edit_counts, evaluate, listen, load_judge, load_prompts

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def judged_corpus(demo_corpus, tmp_path_factory):
    """A copy of the demo corpus with a ctc judge that had too little training to be any good, but is a real one."""
    folder = shutil.copytree(demo_corpus, tmp_path_factory.mktemp("judged") / "corpus")
    steps, ctc.STEPS = ctc.STEPS, 5
    try:
        ctc.load_judge(str(folder), Config())
    finally:
        ctc.STEPS = steps
    return folder


@pytest.fixture(scope="module")
def setup(judged_corpus):
    model = small_model(data_dir=str(judged_corpus), eval_judge="ctc", eval_num_samples=5, eval_steps=2, eval_vocoder="griffinlim",
                        block_size=400).eval()
    return model, model.cfg


def wav_of(tmp_path, name):
    return soundfile.read(tmp_path / "e" / name)[0]


def test_evaluation_writes_what_the_contract_says(setup, tmp_path):
    model, cfg = setup
    prompts = load_prompts(cfg, None)
    summary = evaluate(model, cfg, prompts, tmp_path / "e", torch.device("cpu"), 7, "some.pt")
    rows = [json.loads(line) for line in (tmp_path / "e" / "wer.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in rows] == [p.text for p in prompts]
    assert set(rows[0]) >= {"idx", "audio", "reference", "hypothesis", "wer", "cer", "predicted_seconds"}
    for row in rows:
        wav, rate = soundfile.read(tmp_path / "e" / row["audio"])
        assert rate == 22050 and len(wav) / rate == pytest.approx(row["predicted_seconds"])
    for row, prompt in zip(rows, prompts):
        assert (row["utt_id"], 0 <= row["alignment"] <= 1) == (prompt.utt_id, True)
        assert row["true_seconds"] == len(prompt.mel) * 256 / 22050 and row["mcd"] > 0
        for name, frames in (("mel", len(wav_of(tmp_path, row["audio"])) // 256), ("real_mel", len(prompt.mel))):
            assert imread(tmp_path / "e" / row[f"{name}_png"]).shape == (cfg.n_mels, frames, 4)
        height, width, _ = imread(tmp_path / "e" / row["alignment_png"]).shape
        assert (height, width) == (len(prompt.text) + 1, -(-(len(wav_of(tmp_path, row["audio"])) // 256) // cfg.patch))
        assert len(wav_of(tmp_path, row["vocoded"])) == 256 * len(prompt.mel) and "vocoded_cer" not in row
    saved = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert saved["wer_interval"][0] <= saved["wer"] <= saved["wer_interval"][1] and 0 <= saved["alignment"] <= 1
    assert saved == summary and saved["count"] == 5 and saved["judge"] == "ctc" and saved["vocoder"] == "griffinlim"
    assert set(saved) >= {"step", "ckpt", "prompts", "count", "wer", "cer", "judge", "steps", "cfg_scale", "vocoder"}
    assert 0 <= saved["judge_floor"]["cer"]
    # the rates are those of all texts together, as jiwer counts them
    references, hypotheses = ([ctc.normalise_text(row[k]) for row in rows] for k in ("reference", "hypothesis"))
    assert (saved["wer"], saved["cer"]) == (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses))
    assert not list((tmp_path / "e").glob("*.tmp"))


def test_two_ranks_give_the_figures_of_one(setup, tmp_path):
    """Real gloo ranks, each with a share of the prompts, against one process."""
    model, cfg = setup
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(cfg)}, tmp_path / "c.pt")
    script = tmp_path / "ranks.py"
    script.write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist
torch.set_num_threads(1)
from evaluator import evaluate, load_prompts
from checkpoint import load_checkpoint
dist.init_process_group("gloo")
model, _ = load_checkpoint({str(tmp_path / 'c.pt')!r}, torch.device("cpu"))
evaluate(model, model.cfg, load_prompts(model.cfg, None), {str(tmp_path / 'two')!r}, torch.device("cpu"), 3, "c",
         dist.get_rank(), dist.get_world_size())
dist.destroy_process_group()
""")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
                          capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one = evaluate(model, cfg, load_prompts(cfg, None), tmp_path / "one", torch.device("cpu"), 3, "c")
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert (two["wer"], two["cer"], two["count"]) == (one["wer"], one["cer"], one["count"])
    rows = [[json.loads(line) for line in (tmp_path / part / "wer.jsonl").read_text().splitlines()] for part in ("two", "one")]
    for a, b in zip(*rows, strict=True):  # these two come from floats that another batch may round otherwise
        assert (a.pop("alignment"), a.pop("mcd")) == pytest.approx((b.pop("alignment"), b.pop("mcd")), abs=2e-3)
        assert a == b


def test_prompts(setup, tmp_path):
    _, cfg = setup
    file = tmp_path / "p.txt"
    file.write_text("first line\n\n  second line \n...\nthird\n")
    with_file = dataclasses.replace(cfg, eval_prompts=str(file), eval_num_samples=99)
    assert load_prompts(with_file, None) == [Prompt("first line"), Prompt("second line"), Prompt("third")]
    two = load_prompts(dataclasses.replace(with_file, eval_num_samples=2), None)
    assert len(two) == 2 and two == load_prompts(dataclasses.replace(with_file, eval_num_samples=2), None)
    from data import Corpus
    corpus = Corpus(cfg.data_dir, cfg)
    overfit = load_prompts(dataclasses.replace(cfg, eval_prompts="overfit", overfit_first_n_samples=4, eval_num_samples=4), None)
    assert [p[:2] for p in overfit] == list(zip(corpus.texts[:4], corpus.ids[:4]))
    assert all((p.mel == corpus.mel(i)).all() for i, p in enumerate(overfit))
    assert not {p.text for p in load_prompts(cfg, corpus)} & {t for t, s in zip(corpus.texts, corpus.splits) if s == "train"}
    for wrong in (str(tmp_path / "none.txt"), str(tmp_path)):
        with pytest.raises(UserError, match="cannot read"):
            load_prompts(dataclasses.replace(cfg, eval_prompts=wrong), None)
    file.write_text("\n ... \n")
    with pytest.raises(UserError, match="no prompts"):
        load_prompts(with_file, None)


def test_a_judge_that_hears_the_recordings_right_reads_them_right(setup):
    """The errors by hand: one word of four wrong, a word lost, a word too many."""
    assert edit_counts("the red fox ran", "the red box ran") == [1, 4, 1, 15]
    assert edit_counts("a dog", "dog") == [1, 2, 2, 5] and edit_counts("dog", "a dog") == [1, 1, 2, 3]
    assert edit_counts("a dog", "") == [2, 2, 5, 5]


def test_no_judge_writes_sound_only(setup, tmp_path):
    model, cfg = setup
    cfg = dataclasses.replace(cfg, eval_judge="none")
    summary = evaluate(model, cfg, [Prompt("hello there")], tmp_path, torch.device("cpu"), 1, "c")
    assert summary["wer"] is None and summary["judge"] == "none" and (tmp_path / "000000.wav").exists()


def test_whisper_normaliser_and_refusals(tmp_path):
    from whisper.normalizers import EnglishTextNormalizer
    normalise = EnglishTextNormalizer()
    assert edit_counts(normalise("Fifty two men."), normalise("52 men"))[::2] == [0, 0]
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    for name in ("no-such-model", str(tmp_path / "broken.pt")):
        with pytest.raises(UserError, match="eval_whisper_model"):
            load_judge(Config(eval_judge="whisper", eval_whisper_model=name), torch.device("cpu"))


def test_command_line(setup, tmp_path):
    model, cfg = setup
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(cfg)}, tmp_path / "c.pt")
    before = (tmp_path / "c.pt").read_bytes()
    done = subprocess.run([sys.executable, "evaluator.py", "--ckpt", tmp_path / "c.pt", "--prompts", "eval/prompts.txt", "--num", "3",
                           "--out_dir", tmp_path / "e", "--eval-steps", "1", "--eval_cfg_scale", "1"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert (summary["count"], summary["steps"], summary["cfg_scale"]) == (3, 1, 1.0)
    assert summary["vocoded_cer"] is summary["mcd"] is None and "| generated |" in (tmp_path / "e" / "summary.md").read_text()
    assert "CER" in done.stdout and (tmp_path / "c.pt").read_bytes() == before
    done = subprocess.run([sys.executable, "evaluator.py", "--ckpt", tmp_path / "c.pt", "--promts", "x"], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "promts" in done.stderr


def test_floors_are_the_judges_errors_on_the_recordings(setup, tmp_path):
    """A recording that is the vocoder's own copy is read as the copy is; a missing one has no figures."""
    model, cfg = setup
    prompts = load_prompts(dataclasses.replace(cfg, eval_num_samples=3), None)
    for prompt in prompts[:2]:
        copy = audio.griffin_lim(torch.from_numpy(np.float32(prompt.mel)), cfg)
        audio.write_wav(tmp_path / f"{prompt.utt_id}.wav", copy, 22050)
    text = Prompt("no utterance of the corpus")
    summary = evaluate(model, cfg, [*prompts, text], tmp_path / "e", torch.device("cpu"), 1, "c", floors=True,
                       recordings=str(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "e" / "wer.jsonl").read_text().splitlines()]
    for row in rows[:2]:
        assert row["recording_edits"] == row["vocoded_edits"] and (tmp_path / "e" / row["recording"]).exists()
    assert "recording" not in rows[2] and rows[2]["recording_cer"] is None and rows[2]["vocoded_edits"]
    assert not {"utt_id", "vocoded", "real_mel_png", "mcd"} & set(rows[3]) and rows[3]["vocoded_cer"] is None
    edits = np.sum([row["vocoded_edits"] for row in rows[:3]], axis=0)
    assert (summary["vocoded_wer"], summary["vocoded_cer"]) == (edits[0] / edits[1], edits[2] / edits[3])
    off = [row["predicted_seconds"] / row["true_seconds"] - 1 for row in rows[:3]]
    assert summary["duration_error"] == pytest.approx(np.mean(np.abs(off)))
    assert summary["duration_bias"] == pytest.approx(np.mean(off))
    table = (tmp_path / "e" / "summary.md").read_text()
    assert "| recordings' log-mels, vocoded |" in table and "| recordings |" in table


def test_a_folder_without_the_prompts_recordings_is_refused(setup, tmp_path):
    model, cfg = setup
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(cfg)}, tmp_path / "c.pt")
    for source, names in (("val", "demo_"), (str(ROOT / "eval" / "prompts.txt"), "--prompts val")):
        with pytest.raises(UserError, match=f"no prompt's recording.*{names}"):
            evaluator.main(["--ckpt", str(tmp_path / "c.pt"), "--prompts", source, "--recordings", str(tmp_path)])


def test_what_the_judge_hears_does_not_depend_on_the_order(setup):
    _, cfg = setup
    judge, corpus = load_judge(cfg, torch.device("cpu")), load_prompts(cfg, None)
    wavs = [audio.griffin_lim(torch.from_numpy(np.float32(p.mel)), cfg, iterations=2) for p in corpus]
    texts = [p.text for p in corpus]
    together = listen(judge, texts, [*wavs[:2], None, *wavs[3:]], cfg)
    assert together[2] == {"hypothesis": None, "wer": None, "cer": None, "edits": None}
    for i in (0, 1, 3, 4):
        assert together[i] == listen(judge, texts[i:i + 1], wavs[i:i + 1], cfg)[0]


def evaluation_folder(path, edits, judge="ctc"):
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps({"judge": judge}))
    (path / "wer.jsonl").write_text("".join(json.dumps({"reference": text, "edits": e}) + "\n" for text, e in edits.items()))
    return str(path)


def test_comparing_two_evaluations(tmp_path, capsys):
    texts = {f"prompt {n}": [n % 3, 5, n % 5, 20] for n in range(40)}
    a = evaluation_folder(tmp_path / "a", texts)
    b = evaluation_folder(tmp_path / "b", {text: [w + 1, 5, c + 2, 20] for text, (w, _, c, _) in texts.items()} |
                          {"another": [0, 5, 0, 20], "unjudged": None})
    assert "40 shared prompts" in compare(a, b)
    # every prompt is worse by as much, so the paired interval has no width, whatever the rates' own are
    assert "| +20.00% (+20.00% to +20.00%) |" in compare(a, b) and "| +10.00% (+10.00% to +10.00%) |" in compare(a, b)
    evaluator.main(["--compare", b, a])
    assert "-20.00% (-20.00% to -20.00%)" in capsys.readouterr().out
    other = evaluation_folder(tmp_path / "c", {"no such prompt": [0, 1, 0, 1]})
    with pytest.raises(UserError, match="share no judged prompt"):
        compare(a, other)
    with pytest.raises(UserError, match="one judge"):
        compare(a, evaluation_folder(tmp_path / "d", texts, judge="whisper base.en"))
    (tmp_path / "d" / "wer.jsonl").write_text('{"reference": "from an older version"}\n')
    for bad in (tmp_path / "none", tmp_path / "d"):
        with pytest.raises(UserError, match="is not what an evaluation"):
            compare(a, str(bad))
    with pytest.raises(UserError, match="expected two"):
        evaluator.main(["--compare", a])


def test_griffin_lim_copies_are_judged_as_sound(setup, tmp_path):
    """The judge hears wavs: what reaches it is the log-mel of the vocoder's output, not the model's own log-mel."""
    _, cfg = setup
    judge = load_judge(cfg, torch.device("cpu"))
    wav = (0.1 * np.random.default_rng(0).standard_normal(22050)).astype(np.float32)
    assert judge.transcribe([wav, wav[:11000]], cfg) == [judge.transcribe([w], cfg)[0] for w in (wav, wav[:11000])]
    assert evaluator.load_judge(dataclasses.replace(cfg, eval_judge="none"), "cpu") is None
