"""Evaluation: prompts, the files that it writes, and ranks that share the work without changing the figures."""
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import jiwer
import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from matplotlib.image import imread
from test_judge import noise, talkative_judge
from test_model import small_model

import audio
import evaluator
import vocoder
from common import UserError
from config import Config
from corpus import Corpus, Utterance, write_corpus
from distributed import Ranks
from eval import ctc
from eval.judge import load_judge
from evaluator import Prompt, compare, evaluate, load_prompts, speak
from sample import fits, read_pieces, read_texts, sample

ROOT = Path(__file__).resolve().parents[1]
ONE = Ranks(0, 1, torch.device("cpu"))
HELLO = [Prompt("hello there")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model whose corpus has noises as recordings and a judge with random weights."""
    folder = tmp_path_factory.mktemp("judged") / "corpus"
    texts = {"train": "The red fox ran {}", "val": "A cat sat {}", "test": "Dogs bark {}"}
    utterances = [Utterance(f"{split}_{n}", f"{texts[split].format('and ran ' * n)}.", split, str(n))
                  for split in texts for n in range(6)]
    write_corpus(str(folder), utterances, lambda n, rate: noise(int(n), 9000 + 1500 * int(n)), Config(), workers=1)
    torch.save(talkative_judge(), folder / "judge_ctc.pt")
    return small_model(data_dir=str(folder), eval_judge="ctc", eval_num_samples=5, eval_steps=2, eval_vocoder="griffinlim",
                       block_size=400).eval()


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.pt"
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, path)
    return path


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "wer.jsonl").read_text().splitlines()]


def test_prompts(model, tmp_path):
    cfg, file = model.cfg, tmp_path / "p.txt"
    file.write_text("first line\n\n  second line \n...\nthird\n")
    with_file = dataclasses.replace(cfg, eval_prompts=str(file), eval_num_samples=99)
    assert load_prompts(with_file) == [Prompt("first line"), Prompt("second line"), Prompt("third")]
    two = load_prompts(dataclasses.replace(with_file, eval_num_samples=2))
    assert len(two) == 2 and two == load_prompts(dataclasses.replace(with_file, eval_num_samples=2))
    corpus = Corpus(cfg.data_dir, cfg)
    overfit = load_prompts(dataclasses.replace(cfg, eval_prompts="overfit", overfit_first_n_samples=4, eval_num_samples=4))
    assert [p[:2] for p in overfit] == list(zip(corpus.texts[:4], corpus.ids[:4]))
    assert all((p.mel == corpus.mel(i)).all() for i, p in enumerate(overfit))
    assert not {p.text for p in load_prompts(cfg, corpus=corpus)} & {t for t, s in zip(corpus.texts, corpus.splits) if s == "train"}
    for wrong in (str(tmp_path / "none.txt"), str(tmp_path)):
        with pytest.raises(UserError, match="cannot read"):
            load_prompts(dataclasses.replace(cfg, eval_prompts=wrong))
    file.write_text("\n ... \n")
    with pytest.raises(UserError, match="no prompts"):
        load_prompts(with_file)


@pytest.mark.slow
def test_files_and_figures_of_an_evaluation(model, tmp_path):
    cfg, prompts = model.cfg, load_prompts(model.cfg)
    summary = evaluate(model, cfg, prompts, tmp_path, ONE, 7, "some.pt")
    rows = read_rows(tmp_path)
    assert [(row["reference"], row["utt_id"]) for row in rows] == [prompt[:2] for prompt in prompts]
    for row, prompt in zip(rows, prompts):
        wav, rate = soundfile.read(tmp_path / row["audio"])
        assert rate == 22050 and len(wav) / rate == pytest.approx(row["predicted_seconds"])
        assert row["recording_seconds"] == len(prompt.mel) * 256 / 22050 and row["mcd"] > 0 and 0 <= row["alignment_score"] <= 1
        assert row["edits"] and "vocoded_cer" not in row
        for name, frames in (("mel", len(wav) // 256), ("recording_mel", len(prompt.mel))):
            assert imread(tmp_path / row[f"{name}_png"]).shape == (cfg.n_mels, frames, 4)
        height, width, _ = imread(tmp_path / row["attention_png"]).shape
        assert (height, width) == (len(prompt.spoken) + 1, -(-(len(wav) // 256) // cfg.patch))
        assert len(soundfile.read(tmp_path / row["vocoded"])[0]) == 256 * len(prompt.mel)
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert saved == summary
    assert saved["wer_interval"][0] <= saved["wer"] <= saved["wer_interval"][1] and 0 <= saved["alignment_score"] <= 1
    assert {k: saved[k] for k in ("step", "ckpt", "prompts", "count", "judge", "steps", "cfg_scale", "vocoder")} == {
        "step": 7, "ckpt": "some.pt", "prompts": "val", "count": 5, "judge": saved["judge"], "steps": 2, "cfg_scale": 1.5,
        "vocoder": "griffinlim"}
    assert saved["temperature"] == 0.4 and saved["judge"] == load_judge(cfg, "cpu").name
    assert saved["judge_floor"] == {"cer": 0.1, "wer": 0.2, "recordings": 6}
    # the rates are those of all texts together, as jiwer counts them
    references, hypotheses = ([ctc.normalise_text(row[k]) for row in rows] for k in ("reference", "hypothesis"))
    assert (saved["wer"], saved["cer"]) == (jiwer.wer(references, hypotheses), jiwer.cer(references, hypotheses))
    assert (tmp_path / "index.html").exists() and not list(tmp_path.glob("*.tmp"))
    assert {"f0_mean", "f0_spread", "recording_f0_mean"} <= saved.keys() and "embedding" not in rows[0]


def test_an_evaluation_leaves_an_exported_voice_as_it_is(tmp_path):
    assert evaluator.evaluation_folder(str(tmp_path / "latest.pt"), "hard") == tmp_path / "eval" / "hard"
    assert evaluator.evaluation_folder(str(ROOT / "voices" / "joe"), "hard") == Path(".artifacts/local/joe/eval/hard")


@pytest.mark.slow
def test_sound_is_measured_on_the_first_prompts_only(model, tmp_path, monkeypatch):
    """Speech that is a copy of its recording's log-mel has the copy's pitch, which correlates with itself."""
    monkeypatch.setattr(evaluator, "speak", lambda model, texts, cfg, desc: (
        [torch.from_numpy(prompt.mel) for prompt in prompts], [[np.eye(9)] for _ in prompts]))
    t = np.arange(22050) / 22050
    hum = sum(np.sin(2 * np.pi * 150 * k * t + 2 * k * np.sin(2 * np.pi * t)) / k for k in range(1, 20)).astype(np.float32)
    prompts = [Prompt("hum", f"hum_{n}", audio.log_mel(0.1 * hum, model.cfg).numpy()) for n in range(3)]
    cfg = dataclasses.replace(model.cfg, eval_judge="none")
    summary, rows = evaluate(model, cfg, prompts, tmp_path, ONE, 1, "c", sounds=2), read_rows(tmp_path)
    assert [("f0_mean" in row, "vocoded_f0_mean" in row) for row in rows] == [(True, True), (True, True), (False, False)]
    assert summary["f0_mean"] == pytest.approx(150, rel=0.02) and summary["f0_correlation"] > 0.99
    assert summary["f0_mean"] == np.mean([row["f0_mean"] for row in rows[:2]]) and summary["recording_f0_mean"] is None
    assert "| F0, Hz |" in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_floors_are_the_judges_errors_on_the_recordings(model, tmp_path, capsys):
    """A recording that is the vocoder's own copy has the same errors as the copy. A missing one has no figures."""
    cfg = dataclasses.replace(model.cfg, eval_num_samples=3)
    prompts = load_prompts(cfg)
    for prompt in prompts[:2]:
        audio.write_wav(tmp_path / f"{prompt.utt_id}.wav", vocoder.griffin_lim(torch.from_numpy(prompt.mel), cfg), 22050)
    summary = evaluate(model, cfg, [*prompts, *HELLO], tmp_path / "e", ONE, 1, "c", floors=True, recordings=str(tmp_path))
    rows = read_rows(tmp_path / "e")
    for row in rows[:2]:
        assert row["recording_edits"] == row["vocoded_edits"] and (tmp_path / "e" / row["recording"]).exists()
    assert "recording" not in rows[2] and rows[2]["recording_cer"] is None and rows[2]["vocoded_edits"]
    assert not {"utt_id", "vocoded", "recording_mel_png", "mcd"} & set(rows[3]) and rows[3]["vocoded_cer"] is None
    edits = np.sum([row["vocoded_edits"] for row in rows[:3]], axis=0)
    assert (summary["vocoded_wer"], summary["vocoded_cer"]) == (edits[0] / edits[1], edits[2] / edits[3])
    off = [row["predicted_seconds"] / row["recording_seconds"] - 1 for row in rows[:3]]
    assert summary["duration_error"] == pytest.approx(np.mean(np.abs(off)))
    assert summary["duration_bias"] == pytest.approx(np.mean(off))
    table = (tmp_path / "e" / "summary.md").read_text()
    assert "| recordings' log-mels, vocoded |" in table and "| recordings |" in table
    flags = ["--data_dir", cfg.data_dir, "--prompts", "val", "--num", "3", "--recordings", str(tmp_path), "--out_dir", str(tmp_path)]
    evaluator.main([*flags, "--eval_judge", "ctc"])  # the recordings without a checkpoint have the same figures
    judged = json.loads((tmp_path / "recordings.json").read_text())
    assert judged["count"] == 2 and judged["judge"] == summary["judge"] and {k: summary[f"recording_{k}"] for k in ("wer", "cer")}.items() <= judged.items()
    assert f"2 recordings, judge {judged['judge']}: WER {judged['wer']:.2%}" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no judge"):
        evaluator.main([*flags, "--eval_judge", "none"])


@pytest.mark.slow
def test_a_prompt_that_is_too_long_is_spoken_in_pieces(model, tmp_path):
    """Its duration is that of its pieces and the pauses between them, and not block_size."""
    cfg = model.cfg
    prompts = [Prompt("hello there"), Prompt("One sentence here. " + "word " * 50 + "and the end.")]
    assert fits(model, prompts[0].text) and not fits(model, prompts[1].text)
    evaluate(model, cfg, prompts, tmp_path, ONE, 1, "c")
    short, long = read_rows(tmp_path)
    pieces = list(read_pieces(model, [[prompts[1].text]]))
    assert (short["pieces"], long["pieces"]) == (1, len(pieces)) and len(pieces) > 2
    seconds = sum(min(cfg.block_size, round(read_texts(model, [piece.text])[0][2] * 22050 / 256)) for piece in pieces) * 256 / 22050
    pauses = sum(round(piece.pause * 22050 / 256) for piece in pieces[:-1]) * 256 / 22050
    assert long["predicted_seconds"] == pytest.approx(seconds + pauses) and seconds > cfg.block_size * 256 / 22050
    wav, _ = soundfile.read(tmp_path / long["audio"])
    assert len(wav) / 22050 == pytest.approx(long["predicted_seconds"])
    alone, = sample(model, [pieces[0].text], 2, seed=cfg.seed)
    np.testing.assert_allclose(speak(model, [prompts[1].text], cfg, None)[0][0][:len(alone)], alone, atol=1e-3)


@pytest.mark.parametrize("source, names", [("val", "val_"), (str(ROOT / "eval" / "prompts.txt"), "--prompts val")])
def test_a_folder_without_the_prompts_recordings_is_refused(checkpoint, tmp_path, source, names):
    with pytest.raises(UserError, match=f"no prompt's recording.*{names}"):
        evaluator.main(["--ckpt", str(checkpoint), "--prompts", source, "--recordings", str(tmp_path)])


def test_without_a_judge_there_are_wavs_but_no_rates(model, tmp_path):
    cfg = dataclasses.replace(model.cfg, eval_judge="none")
    summary = evaluate(model, cfg, HELLO, tmp_path, ONE, 1, "c")
    assert summary["wer"] is None and summary["judge"] == "none" and (tmp_path / "000000.wav").exists()


class BrokenJudge:
    """Listens badly on rank 1, or on the only rank."""
    name, floor = "broken", None

    def transcribe(self, wavs, cfg):
        if not dist.is_initialized() or dist.get_rank() == 1:
            raise ZeroDivisionError("a bug")
        return ["hello there"] * len(wavs)

    def normalise(self, text):
        return text


def test_a_bug_is_raised_as_it_is_and_the_wavs_stay(model, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "load_judge", lambda cfg, device: BrokenJudge())
    with pytest.raises(ZeroDivisionError, match="a bug") as e:
        evaluate(model, model.cfg, HELLO, tmp_path, ONE, 1, "c")
    assert e.traceback[-1].name == "transcribe"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.wav"]


# --- ranks

def on_two_ranks(tmp_path: Path, work) -> list:
    """The results of work(ranks) in two processes that form a gloo group; of an error, its type and text."""
    context = multiprocessing.get_context("fork")  # needs no imports
    results = context.Queue()

    def run(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=rank, world_size=2)
        try:
            result = work(Ranks(rank, 2, torch.device("cpu")))
        except Exception as e:
            result = f"{type(e).__name__}: {e}"
        results.put((rank, result))
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=100) for _ in processes)
    for process in processes:
        process.join(100)
    return [found[rank] for rank in range(2)]


@pytest.mark.slow
def test_two_ranks_give_the_figures_of_one(model, tmp_path):
    prompts = load_prompts(model.cfg)
    one = evaluate(model, model.cfg, prompts, tmp_path / "one", ONE, 3, "c")
    two = on_two_ranks(tmp_path, lambda ranks: evaluate(model, model.cfg, prompts, tmp_path / "two", ranks, 3, "c"))
    for summary in two:
        assert [summary[k] for k in ("wer", "wer_interval", "cer", "count")] == [one[k] for k in ("wer", "wer_interval", "cer", "count")]
    for a, b in zip(read_rows(tmp_path / "two"), read_rows(tmp_path / "one"), strict=True):
        for key in ("alignment_score", "mcd"):  # another batch may round the floats of these differently
            assert a.pop(key) == pytest.approx(b.pop(key), abs=2e-3)
        assert a == b


@pytest.mark.parametrize("problem", ["a bug on one rank", "a file that rank 0 cannot write", "a rank without prompts"])
def test_an_error_on_one_rank_is_one_on_all(model, tmp_path, monkeypatch, problem):
    prompts, cfg = HELLO * 2, dataclasses.replace(model.cfg, eval_judge="none", eval_steps=1)
    if problem == "a bug on one rank":
        monkeypatch.setattr(evaluator, "load_judge", lambda cfg, device: BrokenJudge())
    elif problem == "a file that rank 0 cannot write":
        (tmp_path / "e" / "summary.json" / "x").mkdir(parents=True)
    else:
        prompts = HELLO
    found = on_two_ranks(tmp_path, lambda ranks: evaluate(model, cfg, prompts, tmp_path / "e", ranks, 3, "c"))
    if problem == "a rank without prompts":
        assert [summary["count"] for summary in found] == [1, 1]
    elif problem == "a bug on one rank":
        assert found[1] == "ZeroDivisionError: a bug" and found[0].startswith("UserError: another rank")
    else:
        assert found[0].startswith("UserError: cannot write") and found[1].startswith("UserError: another rank")


# --- the command line

@pytest.mark.slow
def test_command_line(checkpoint, tmp_path, capsys):
    before = checkpoint.read_bytes()
    evaluator.main(["--ckpt", str(checkpoint), "--prompts", str(ROOT / "eval" / "prompts.txt"), "--num", "3", "--out_dir",
                    str(tmp_path / "e"), "--eval-steps", "1", "--eval_cfg_scale", "1", "--device", "cpu"])
    summary, out = json.loads((tmp_path / "e" / "summary.json").read_text()), capsys.readouterr().out
    assert (summary["count"], summary["steps"], summary["cfg_scale"]) == (3, 1, 1.0)
    assert summary["vocoded_cer"] is summary["mcd"] is None and "| generated |" in (tmp_path / "e" / "summary.md").read_text()
    assert out.count("->") == 3 and "on recordings the judge has CER 10.00%" in out and checkpoint.read_bytes() == before
    for wrong, message in ((["--ckpt", str(checkpoint), "--promts", "x"], "promts"), (["--prompts", "val"], "--ckpt is missing"),
                           (["--compare", "a"], "expected two")):
        with pytest.raises(UserError, match=message):
            evaluator.main(wrong)
    done = subprocess.run([sys.executable, "evaluator.py", "--compare", "a", "b"], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "a is not what an evaluation" in done.stderr


def evaluation_folder(path, edits, judge="ctc"):
    path.mkdir(parents=True)
    (path / "summary.json").write_text(json.dumps({"judge": judge}))
    (path / "wer.jsonl").write_text("".join(json.dumps({"reference": text, "edits": e}) + "\n" for text, e in edits.items()))
    return str(path)


def test_a_run_chooses_its_judge_once_and_says_if_it_is_another_than_before(model, tmp_path, capsys):
    cfg = dataclasses.replace(model.cfg, eval_judge="auto", out_dir=str(tmp_path), eval_whisper_model=str(tmp_path / "none.pt"))
    evaluator.agree_on_judge(cfg, ONE)
    evaluator.prepare(cfg, Corpus(cfg.data_dir, cfg), model.tokenise, ONE, evaluated=False)
    assert cfg.eval_judge == "ctc" and "the judge was" not in "".join(capsys.readouterr())
    (tmp_path / "eval" / "step_00000004").mkdir(parents=True)
    for before, warned in (("whisper tiny.en", True), (load_judge(cfg, "cpu").name, False)):
        (tmp_path / "eval" / "step_00000004" / "summary.json").write_text(json.dumps({"judge": before}))
        evaluator.prepare(cfg, Corpus(cfg.data_dir, cfg), model.tokenise, ONE, evaluated=True)
        assert ("the judge was whisper tiny.en and is ctc" in "".join(capsys.readouterr())) == warned


def test_comparing_naturalness(tmp_path):
    folders = []
    for name, better in (("a", 0.0), ("b", 0.25)):
        folders.append(evaluation_folder(tmp_path / name, {f"prompt {n}": [1, 5, 1, 20] for n in range(9)}))
        rows = [{"reference": f"prompt {n}", "edits": [1, 5, 1, 20], "dnsmos": 3 + n / 10 + better} for n in range(9)]
        (tmp_path / name / "wer.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "| DNSMOS | 3.40 | 3.65 | +0.25 (+0.25 to +0.25) |" in compare(*folders) and "DNSMOS" not in compare(folders[0], evaluation_folder(
        tmp_path / "c", {"prompt 1": [1, 5, 1, 20]}))


def test_comparing_two_evaluations(tmp_path, capsys):
    texts = {f"prompt {n}": [n % 3, 5, n % 5, 20] for n in range(40)}
    a = evaluation_folder(tmp_path / "a", texts)
    b = evaluation_folder(tmp_path / "b", {text: [w + 1, 5, c + 2, 20] for text, (w, _, c, _) in texts.items()} |
                          {"another": [0, 5, 0, 20], "unjudged": None})
    assert "40 shared prompts" in compare(a, b)
    # every prompt is worse by the same amount, so the paired interval has no width, although those of the rates have one
    assert "| +20.00% (+20.00% to +20.00%) |" in compare(a, b) and "| +10.00% (+10.00% to +10.00%) |" in compare(a, b)
    evaluator.main(["--compare", b, a])
    assert "-20.00% (-20.00% to -20.00%)" in capsys.readouterr().out
    other = evaluation_folder(tmp_path / "c", {"no such prompt": [0, 1, 0, 1]})
    with pytest.raises(UserError, match="share no judged prompt"):
        compare(a, other)
    with pytest.raises(UserError, match="by ctc, .* by ctc 12ab34cd; evaluate both with one judge"):
        compare(a, evaluation_folder(tmp_path / "e", texts, judge="ctc 12ab34cd"))
    with pytest.raises(UserError, match="one judge"):
        compare(a, evaluation_folder(tmp_path / "d", texts, judge="whisper base.en"))
    (tmp_path / "d" / "wer.jsonl").write_text('{"reference": "from an older version"}\n')
    for bad in (tmp_path / "none", tmp_path / "d"):
        with pytest.raises(UserError, match="is not what an evaluation"):
            compare(a, str(bad))
