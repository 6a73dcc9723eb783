"""The main job on a small folder in LJSpeech's layout: download, preparation, training, evaluation and sampling.

Small random weights take the place of the published ones. No network except 127.0.0.1.
"""
import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ljspeech_parts as parts
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from conftest import ROOT
from ljspeech import prepare  # data/ljspeech/prepare.py
from ljspeech_parts import RATE

import audio
import evaluator
import sample
import train
import vocoder
from common import UserError
from config import Config
from corpus import Corpus, hash_splits, write_corpus
from eval.ctc import fingerprint
from eval.judge import WhisperJudge
from folder.prepare import read_folder  # data/folder/prepare.py
from text_encoder import load_text_encoder

# --- running programs

def environment(home: Path) -> dict:
    """One thread per process, no GPU, no network, and caches in a temporary folder."""
    steering = ("WANDB_", "HF_", "NUM_GPUS", "BATCH_SIZE", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if not k.startswith(steering) and not k.lower().endswith("_proxy")}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "HOME": str(home)}


def start(command: list, home: Path) -> subprocess.Popen:
    """Start a program in the repository's folder, in a process group of its own."""
    return subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(home), stdin=subprocess.DEVNULL, text=True,
                            encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen, expected: int = 0) -> tuple[str, str]:
    """Wait for a program and check its exit status. Returns its stdout and stderr."""
    try:
        out, err = process.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == expected and "Traceback" not in err, f"{process.args}:\n{out}\n{err}"
    return out, err


def one_line(caught: pytest.ExceptionInfo) -> str:
    message = str(caught.value)
    assert message and len(message.splitlines()) == 1, message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- shared

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def lj(tmp_path_factory):
    return parts.make_ljspeech(tmp_path_factory.mktemp("raw") / "LJSpeech-1.1")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    parts.save_text_encoder(folder / "byt5")
    parts.save_bigvgan(folder / "bigvgan")
    parts.save_whisper(folder / "whisper.pt")
    return folder


@pytest.fixture(scope="module")
def prepared(lj, tmp_path_factory):
    """The folder's corpus, made by prepare.py with one worker, and what that printed."""
    out, stdout = tmp_path_factory.mktemp("prepared") / "corpus", io.StringIO()
    with contextlib.redirect_stdout(stdout):
        prepare.main(["--source", str(lj["folder"]), "--out", str(out), "--workers", "1"])
    return out, stdout.getvalue()


@pytest.fixture(scope="module")
def job(run_sh, lj, weights, home, tmp_path_factory):
    """The main job from raw corpus to evaluated checkpoint: run.sh with LJSpeech's config, everything small."""
    if not run_sh:
        pytest.skip("run.sh would install packages first; run the tests by ./run.sh test")
    tmp = tmp_path_factory.mktemp("job")
    flags = {"gpus": 0, "source": lj["folder"], "data_dir": tmp / "corpus", "out_dir": tmp / "run", "width": 64, "layers": 2,
             "heads": 2, "batch_size": 8, "effective_batch_size": 8, "max_steps": 4, "log_interval": 1, "val_interval": 2,
             "checkpoint_interval": 2, "eval_interval": 4, "eval_num_samples": 2, "eval_steps": 2, "eval_vocoder": "bigvgan",
             "eval_vocoder_model": weights / "bigvgan", "eval_whisper_model": weights / "whisper.pt",
             "text_encoder_name": weights / "byt5"}
    command = [run_sh, "--config", "configs/ljspeech.yaml", *(word for k, v in flags.items() for word in (f"--{k}", v))]
    out, err = finish(start(command, home))
    return {"run": tmp / "run", "corpus": tmp / "corpus", "stdout": out, "stderr": err}


# --- preparation

def test_corpus_holds_the_good_utterances_in_order(lj, prepared):
    out, stdout = prepared
    corpus = Corpus(str(out), Config())
    assert dict(zip(corpus.ids, corpus.texts)) == lj["good"] and corpus.ids == list(lj["good"])
    assert any(text.count('"') == 1 for text in corpus.texts) and any("№" not in t and "Café" in t for t in corpus.texts)
    rejected = [json.loads(line) for line in (out / "metadata" / "rejected.jsonl").read_text().splitlines()]
    assert [r["utt_id"] for r in rejected] == list(lj["bad"])
    for r in rejected:
        assert r["reason"].startswith(lj["bad"][r["utt_id"]]), r
        assert f"skipped {r['utt_id']}: {r['reason']}" in stdout
    # an utterance's frames are those of its wav
    wav = audio.read_wav(str(lj["folder"] / "wavs" / f"{corpus.ids[5]}.wav"), RATE)
    np.testing.assert_allclose(corpus.mel(5), audio.log_mel(wav, Config()).numpy(), atol=0.01)


def test_splits_follow_the_ids_hash(lj, prepared):
    splits = dict(zip(*(pq.read_table(prepared[0] / "metadata" / "audio_index.parquet")[c].to_pylist()
                        for c in ("utt_id", "split"))))
    ids = [*lj["good"], *lj["bad"]]
    order = sorted(ids, key=lambda i: hashlib.sha1(i.encode()).hexdigest())
    held_out = {i: "val" if n < 3 else "test" for n, i in enumerate(order[:6])}  # a twentieth of 64 each
    assert splits == {i: held_out.get(i, "train") for i in lj["good"]}
    assert hash_splits(ids) == hash_splits(ids[::-1])


def test_shards_and_statistics_add_up(prepared):
    out, _ = prepared
    shards = sorted((out / "mel_shards").iterdir())
    values = []
    for shard in shards:
        meta = json.loads((shard / "meta.json").read_text())
        lengths, offsets = np.load(shard / "lengths.int32.npy"), np.load(shard / "offsets.int64.npy")
        assert (lengths.dtype, offsets.dtype) == (np.int32, np.int64)
        assert len(lengths) == len(offsets) == meta["num_utts"] and lengths.sum() == meta["num_frames"]
        assert offsets.tolist() == [0, *np.cumsum(lengths)[:-1]]
        assert {k: meta[k] for k in ("sample_rate", "n_fft", "hop_length", "win_length", "n_mels", "f_min", "f_max")} == {
            "sample_rate": 22050, "n_fft": 1024, "hop_length": 256, "win_length": 1024, "n_mels": 80, "f_min": 0, "f_max": 8000}
        values.append(np.memmap(shard / "logmel.float16.memmap", np.float16, "r", shape=(meta["num_frames"], 80)))
        assert sorted(p.name for p in shard.iterdir()) == ["lengths.int32.npy", "logmel.float16.memmap", "meta.json",
                                                           "offsets.int64.npy"]
    values = np.concatenate(values).astype(np.float64)
    stats = json.loads((out / "metadata" / "dataset_stats.json").read_text())
    assert stats["mel_mean"] == pytest.approx(values.mean(), rel=1e-9)
    assert stats["mel_std"] == pytest.approx(values.std(), rel=1e-9)
    rows = pq.read_table(out / "metadata" / "audio_index.parquet").to_pylist()
    assert stats["num_frames"] == len(values) == sum(r["num_frames"] for r in rows)
    assert stats["num_utts"] == len(rows) == 60 and stats["rejected"] == 4
    assert stats["seconds"] == pytest.approx(sum(r["num_frames"] for r in rows) * 256 / 22050)
    assert stats["byt5_tokens"]["total"] == sum(len(r["text"].encode()) + 1 for r in rows)


def test_strict_and_existing_corpora_are_refused(lj, prepared, tmp_path):
    before = files(prepared[0])
    common = ["--source", str(lj["folder"]), "--workers", "1", "--out"]
    with pytest.raises(UserError) as caught:
        prepare.main([*common, str(prepared[0])])
    assert str(prepared[0]) in one_line(caught) and "--force" in one_line(caught)
    assert files(prepared[0]) == before
    with pytest.raises(UserError) as caught:
        prepare.main([*common, str(tmp_path / "strict"), "--strict"])
    assert "LJ001-0011" in one_line(caught) and "missing file" in one_line(caught)
    assert not (tmp_path / "strict").exists()


def test_force_replaces_a_corpus(lj, prepared, tmp_path):
    out = tmp_path / "corpus"
    shutil.copytree(prepared[0], out)
    (out / "metadata" / "dataset_stats.json").write_text("{}")
    prepare.main(["--source", str(lj["folder"]), "--out", str(out), "--workers", "1", "--force"])
    assert files(out) == files(prepared[0])


def test_out_and_workers_that_cannot_work(lj, tmp_path):
    (tmp_path / "file").write_text("")
    for out, workers, expected in (("file/corpus", "1", "file/corpus"), ("corpus", "-1", "workers = -1")):
        with pytest.raises(UserError) as caught:
            prepare.main(["--source", str(lj["folder"]), "--out", str(tmp_path / out), "--workers", workers])
        assert expected in one_line(caught)


@pytest.mark.slow
def test_killed_preparation_goes_on_where_it_was(lj, home, tmp_path, capsys):
    out, partial, utterances = tmp_path / "killed", tmp_path / "killed.partial", read_folder(lj["folder"])
    process = start([sys.executable, "tests/ljspeech_parts.py", lj["folder"], out], home)
    try:
        deadline = time.time() + 100
        while not (partial / "mel_shards" / "shard_001").exists():
            assert process.poll() is None and time.time() < deadline, process.communicate(timeout=1)
            time.sleep(0.02)
        with pytest.raises(UserError) as caught:  # two at once would spoil each other's work
            write_corpus(str(out), utterances, audio.read_wav, Config(), 1, shard_utts=parts.SHARD_UTTS)
        assert "another process is preparing" in one_line(caught)
        process.kill()  # only the parent, as the kernel does when memory runs out
        process.communicate(timeout=30)  # the pipes end when the last worker has ended by itself
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert partial.exists() and not out.exists()
    assert not (partial / "mel_shards" / "shard_007").exists(), "it was done before it was killed"
    for folder in (out, tmp_path / "undisturbed"):
        write_corpus(str(folder), utterances, audio.read_wav, Config(), 1, shard_utts=parts.SHARD_UTTS)
    printed = capsys.readouterr().out
    assert printed.count("resuming: ") == 1 and "of 8 shards are done" in printed and not partial.exists()
    assert files(out) == files(tmp_path / "undisturbed")


class Stop(BaseException):
    """Ends a preparation from inside its reader. Like Ctrl-C it is not an AudioError."""


def stopping_reader(after: int):
    """A reader that works `after` times and then raises Stop."""
    left = [after]

    def read(path, sample_rate):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return audio.read_wav(path, sample_rate)
    return read


def stopped(lj, out: Path, after: int) -> list:
    """Prepare `out` until the reader has been called `after` times; returns the utterances."""
    utterances = read_folder(lj["folder"])
    with pytest.raises(Stop):
        write_corpus(str(out), utterances, stopping_reader(after), Config(), 1, shard_utts=parts.SHARD_UTTS)
    assert Path(f"{out}.partial").exists() and not out.exists()
    return utterances


def test_strict_holds_for_what_an_earlier_call_skipped(lj, tmp_path):
    utterances = stopped(lj, tmp_path / "corpus", after=58)  # all bad utterances are in finished shards
    with pytest.raises(UserError, match="LJ001-0011"):
        write_corpus(str(tmp_path / "corpus"), utterances, audio.read_wav, Config(), 1, strict=True, shard_utts=parts.SHARD_UTTS)
    assert not (tmp_path / "corpus").exists()


def test_shard_without_its_rows_is_made_anew(lj, tmp_path):
    # The last step deletes the shards' rows.json one by one. After a kill in it, the next call finds shards without them.
    utterances = stopped(lj, tmp_path / "corpus", after=30)
    (tmp_path / "corpus.partial" / "mel_shards" / "shard_000" / "rows.json").unlink()
    write_corpus(str(tmp_path / "corpus"), utterances, audio.read_wav, Config(), 1, shard_utts=parts.SHARD_UTTS)
    assert Corpus(str(tmp_path / "corpus"), Config()).ids == list(lj["good"])


def sounds(folder: Path) -> Path:
    """A folder with wavs/a.wav and wavs/b.wav, of half a second."""
    (folder / "wavs").mkdir()
    for name in "ab":
        audio.write_wav(folder / "wavs" / f"{name}.wav", np.zeros(RATE // 2, np.float32), RATE)
    return folder


@pytest.mark.parametrize("content, expected", [
    pytest.param("\ufeffa|One.|One.\nb|Two.|Two.\n".encode(), {"a": "One.", "b": "Two."}, id="byte order mark"),
    pytest.param(b"a|One.|One.\r\n\r\nb|Two.|Two.\r\n", {"a": "One.", "b": "Two."}, id="Windows line ends"),
    pytest.param("a|One\u2028line.|One\u2028line.\nb|Two\x85 too.|Two\x85 too.\n".encode(),
                 {"a": "One line.", "b": "Two too."}, id="Unicode's other line ends"),
    pytest.param(b"a|1 and 2|one and two\nb\n", {"a": "one and two", "b": ""}, id="too few fields"),
    pytest.param(b"a|1 and 2|one and two\nmissing|Two|two\n", {"a": "one and two", "missing": "two"}, id="no such sound"),
])
def test_metadata_as_it_comes(tmp_path, content, expected):
    (sounds(tmp_path) / "metadata.csv").write_bytes(content)
    utterances = read_folder(tmp_path)
    assert {u.utt_id: u.text for u in utterances} == expected
    assert [u.source for u in utterances] == [str(tmp_path / "wavs" / f"{utt_id}.wav") for utt_id in expected]


@pytest.mark.parametrize("content, hint", [
    (None, "no metadata.csv"), (b"a|\xff|\xff\n", "UTF-8"), (b"a|x|x\na|y|y\n", "'a'"), (b"../c|x|x\n", "'../c'"),
    (b"a|x|x\nb|1|2|one|two\n", "line 2 has 5 fields"),
])
def test_metadata_that_cannot_be_used(tmp_path, content, hint):
    sounds(tmp_path)
    if content is not None:
        (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_folder(tmp_path)
    assert hint in one_line(caught) and str(tmp_path) in one_line(caught)


# --- download

@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    small = parts.make_ljspeech(folder / "small", utterances=24, bad=False)
    return {"data": parts.tar_bz2(small["folder"], "LJSpeech-1.1"), "good": small["good"]}


def download_flags(url, data: bytes, tmp_path) -> list[str]:
    return ["--download", "--url", url, "--sha256", hashlib.sha256(data).hexdigest(), "--cache", str(tmp_path / "cache"),
            "--out", str(tmp_path / "corpus"), "--workers", "1"]


@pytest.fixture
def direct(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # the tests' server is not behind a proxy


def test_download_whole(archive, direct, tmp_path):
    with parts.serving(archive["data"]) as (server, url):
        prepare.main(download_flags(url, archive["data"], tmp_path))
        assert server.ranges == [None]
        prepare.main([*download_flags(url, archive["data"], tmp_path), "--force"])
        assert server.ranges == [None], "what is there already was downloaded again"
    corpus = Corpus(str(tmp_path / "corpus"), Config())
    assert dict(zip(corpus.ids, corpus.texts)) == archive["good"]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["LJSpeech-1.1", "LJSpeech-1.1.tar.bz2"]


def test_download_cut_off_and_resumed(archive, direct, tmp_path):
    data, part = archive["data"], tmp_path / "cache" / "LJSpeech-1.1.tar.bz2.part"
    with parts.serving(data) as (server, url):
        server.cut = len(data) // 2
        with pytest.raises(UserError) as caught:
            prepare.main(download_flags(url, data, tmp_path))
        message = one_line(caught)
        assert f"cut off after {len(data) // 2} of {len(data)} bytes" in message and "same command again" in message
        assert part.read_bytes() == data[:len(data) // 2] and not (tmp_path / "corpus").exists()
        prepare.main(download_flags(url, data, tmp_path))
        assert server.ranges == [None, f"bytes={len(data) // 2}-"]
    assert (tmp_path / "cache" / "LJSpeech-1.1.tar.bz2").read_bytes() == data and not part.exists()
    assert Corpus(str(tmp_path / "corpus"), Config()).ids == list(archive["good"])


@pytest.mark.parametrize("have, resumes, ranges", [
    pytest.param(0.5, False, 1, id="the server does not resume"),
    pytest.param(1.0, True, 1, id="all there, but not yet checked"),
])
def test_download_goes_on_from_what_is_there(archive, direct, tmp_path, have, resumes, ranges):
    data, path = archive["data"], tmp_path / "LJSpeech-1.1.tar.bz2"
    part = tmp_path / "LJSpeech-1.1.tar.bz2.part"
    part.write_bytes(data[:int(len(data) * have)])
    with parts.serving(data) as (server, url):
        server.resumes = resumes
        prepare.download(url, path, hashlib.sha256(data).hexdigest())
        assert server.ranges == [f"bytes={int(len(data) * have)}-"]
    assert path.read_bytes() == data and not part.exists()


def test_download_of_something_else_is_refused(archive, direct, tmp_path):
    with parts.serving(archive["data"]) as (_, url), pytest.raises(UserError) as caught:
        prepare.main(download_flags(url, b"another file", tmp_path))
    message = one_line(caught)
    assert hashlib.sha256(archive["data"]).hexdigest() in message and hashlib.sha256(b"another file").hexdigest() in message
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "corpus").exists()


def test_download_from_nowhere(direct, tmp_path):
    with socket.socket() as s:  # a port on which nothing listens
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for url in (f"http://127.0.0.1:{port}/x.tar.bz2", "not-a-url"):
        with pytest.raises(UserError) as caught:
            prepare.main(download_flags(url, b"", tmp_path))
        message = one_line(caught)
        assert url in message and "--source" in message
    with parts.serving(None) as (_, url):  # it answers 404
        with pytest.raises(UserError) as caught:
            prepare.main(download_flags(url, b"", tmp_path))
        assert url in one_line(caught) and "404" in str(caught.value) and "--source" in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda data: b"<html>no archive</html>", lambda data: data[:len(data) // 2]],
                         ids=["no archive", "half an archive"])
def test_archive_that_cannot_be_unpacked(archive, direct, tmp_path, spoil):
    data = spoil(archive["data"])
    with parts.serving(data) as (_, url), pytest.raises(UserError) as caught:
        prepare.main(download_flags(url, data, tmp_path))
    assert "LJSpeech-1.1.tar.bz2" in one_line(caught)
    assert not (tmp_path / "cache" / "LJSpeech-1.1").exists() and not (tmp_path / "corpus").exists()


def test_existing_corpus_is_refused_before_the_download(archive, direct, tmp_path):
    (tmp_path / "corpus").mkdir()
    with parts.serving(archive["data"]) as (server, url), pytest.raises(UserError, match="--force"):
        prepare.main(download_flags(url, archive["data"], tmp_path))
    assert server.ranges == [], "2.7 GB for nothing"


# --- the main job

@pytest.mark.slow
def test_job_logs_what_the_design_says(job):
    rows = [json.loads(line) for line in (job["run"] / "metrics.jsonl").read_text().splitlines()]
    assert all({"step", "time"} <= set(row) for row in rows)

    def steps_with(*keys):
        return [row["step"] for row in rows if set(keys) <= set(row)]
    assert steps_with("train/loss", "train/flow_loss", "train/duration_loss", "train/share_loss", "train/alignment_loss", "optim/lr", "optim/grad_norm", "time/step_sec",
                      "perf/frames_per_sec") == [1, 2, 3, 4]
    assert steps_with("val/flow_loss") == [2, 4]
    assert steps_with("eval/wer", "eval/cer", "eval/duration_error", "eval/speaking_rate") == [4]
    assert all(np.isfinite(v) for row in rows for v in row.values())
    assert list((job["run"] / "wandb").glob("offline-run-*")), job["stderr"]
    assert "warning" not in job["stderr"], job["stderr"]
    assert "step 4/4" in job["stdout"]


def weights_digest(job) -> str:
    """The end of the judge's name, which tells Whisper models with other weights apart."""
    config = yaml.safe_load((job["run"] / "config.yaml").read_text())
    return fingerprint(WhisperJudge(config["eval_whisper_model"], "cpu").model)


@pytest.mark.slow
def test_job_evaluates_with_bigvgan_and_whisper(job):
    folder = job["run"] / "eval" / "step_00000004"
    rows = [json.loads(line) for line in (folder / "wer.jsonl").read_text(encoding="utf-8").splitlines()]
    corpus = Corpus(str(job["corpus"]), Config())
    prompts = [corpus.texts[i] for i in corpus.split("val", Config())]
    assert [row["idx"] for row in rows] == [0, 1]
    for row in rows:
        assert set(row) >= {"idx", "audio", "reference", "hypothesis", "wer", "cer", "predicted_seconds"}
        assert row["reference"] in prompts and isinstance(row["hypothesis"], str) and row["wer"] >= 0 and row["cer"] >= 0
        wav, rate = soundfile.read(folder / row["audio"])
        assert rate == RATE and len(wav) > 0 and len(wav) / rate == pytest.approx(row["predicted_seconds"])
        assert wav.any(), "silence"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"step", "ckpt", "prompts", "count", "wer", "cer", "judge", "steps", "cfg_scale", "vocoder"} <= set(summary)
    assert (summary["judge"], summary["vocoder"], summary["count"]) == (f"whisper whisper.pt {weights_digest(job)}", "bigvgan", 2)
    assert (summary["step"], summary["steps"], summary["cfg_scale"]) == (4, 2, 1.5)
    assert summary["prompts"] == "val" and summary["vocoded_wer"] is not None and Path(summary["ckpt"]) == job["run"] / "ckpt_step_00000004.pt"


@pytest.mark.slow
def test_checkpoint_leaves_the_frozen_encoder_out(job, weights):
    assert sorted(p.name for p in job["run"].glob("*.pt")) == ["best.pt", "ckpt_step_00000002.pt", "ckpt_step_00000004.pt",
                                                                    "latest.pt"]
    ckpt = torch.load(job["run"] / "latest.pt", weights_only=True)
    assert ckpt["step"] == 4 and ckpt["config"]["text_encoder_name"] == str(weights / "byt5")
    for state in (ckpt["model"], ckpt["ema"]):
        assert state and not [key for key in state if key.startswith("text_encoder")]
    stats = json.loads((job["corpus"] / "metadata" / "dataset_stats.json").read_text())
    assert (ckpt["config"]["mel_mean"], ckpt["config"]["mel_std"]) == (stats["mel_mean"], stats["mel_std"])


@pytest.mark.slow
def test_job_prepares_the_same_corpus_as_prepare(job, prepared):
    assert files(job["corpus"]) == files(prepared[0])


@pytest.mark.slow
def test_checkpoint_speaks_and_is_judged(job, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    ckpt = ["--ckpt", str(job["run"] / "latest.pt"), "--device", "cpu"]
    text = [*ckpt, "--text", "Two “naïve” words, no more.", "--steps", "2"]
    out = tmp_path / "with-dash"  # flags may have - or _, but names of folders must not change
    out.mkdir()
    sample.main([*text, "--vocoder", "griffinlim", "--out", str(out / "griffin-lim.wav")])
    sample.main([*text, "--vocoder", "bigvgan", f"--out={out / 'big-vgan.wav'}"])
    assert "real-time factor" in capsys.readouterr().out
    for name in ("griffin-lim.wav", "big-vgan.wav"):
        wav, rate = soundfile.read(out / name)
        assert rate == RATE and len(wav) > 0 and wav.any()
    evaluator.main([*ckpt, "--prompts", "val", "--num", "2", "--out_dir", str(out / "judged")])
    assert "WER" in capsys.readouterr().out
    summary = json.loads((out / "judged" / "summary.json").read_text())
    assert (summary["step"], summary["count"], summary["judge"]) == (4, 2, f"whisper whisper.pt {weights_digest(job)}")
    # the checkpoint, prompts and seed are those of the evaluation in training, so the speech is the same
    own = job["run"] / "eval" / "step_00000004"
    again, first = ([json.loads(line) for line in (folder / "wer.jsonl").read_text().splitlines()] for folder in (out / "judged", own))
    assert len(again) == len(first) == 2
    assert all(row.items() >= other.items() for row, other in zip(again, first))


# --- what is missing

def test_missing_weights(weights, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "nowhere", empty):
        with pytest.raises(UserError) as caught:
            load_text_encoder(Config(text_encoder_name=str(folder)))
        assert str(folder) in one_line(caught) and "Download its config.json and weights" in str(caught.value)
        with pytest.raises(UserError) as caught:
            vocoder.load_bigvgan(str(folder), "cpu", Config())
        assert "config.json and bigvgan_generator.pt" in one_line(caught)
        with pytest.raises(UserError) as caught:
            WhisperJudge(str(folder / "base.en.pt"), "cpu")
        assert str(folder) in one_line(caught) and "download" in str(caught.value) and "eval_whisper_model" in str(caught.value)


def test_broken_weights(weights, tmp_path):
    for name in ("byt5", "bigvgan"):
        shutil.copytree(weights / name, tmp_path / name)
    (tmp_path / "byt5" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        load_text_encoder(Config(text_encoder_name=str(tmp_path / "byt5")))
    assert str(tmp_path / "byt5") in one_line(caught)
    (tmp_path / "whisper.pt").write_bytes((weights / "whisper.pt").read_bytes()[:1000])
    with pytest.raises(UserError) as caught:
        WhisperJudge(str(tmp_path / "whisper.pt"), "cpu")
    assert str(tmp_path / "whisper.pt") in one_line(caught)
    broken = tmp_path / "bigvgan"
    with pytest.raises(UserError) as caught:  # another log-mel than BigVGAN was made for
        vocoder.load_bigvgan(str(broken), "cpu", Config(n_mels=100))
    assert "n_mels 80 (config: 100)" in one_line(caught)
    (broken / "bigvgan_generator.pt").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        vocoder.load_bigvgan(str(broken), "cpu", Config())
    assert str(broken) in one_line(caught)
    for content in ("", "{}"):
        (broken / "config.json").write_text(content)
        with pytest.raises(UserError) as caught:
            vocoder.load_bigvgan(str(broken), "cpu", Config())
        assert "config.json" in one_line(caught)


@pytest.mark.slow
def test_programs_say_what_is_missing(prepared, run_sh, home, tmp_path, monkeypatch):
    """Without ByT5 in the cache, and without a GPU: this is what a newcomer sees first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError) as caught:
        train.main(["--config", str(ROOT / "configs/ljspeech.yaml"), "--gpus", "0", "--width", "64", "--heads", "2", "--data_dir",
                    str(prepared[0]), "--out_dir", str(tmp_path / "run"), "--batch_size", "8", "--effective_batch_size", "8"])
    assert "google/byt5-small" in one_line(caught) and "text_encoder_name" in one_line(caught)
    assert not (tmp_path / "run").exists()
    if run_sh:
        out, err = finish(start([run_sh], home), expected=2)
        assert out == "" and 1 <= err.count("\n") <= 2, (out, err)
        assert "2 GPUs" in err and "./run.sh --config configs/demo.yaml" in err
