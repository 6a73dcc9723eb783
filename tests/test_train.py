"""
python -m pytest tests/test_train.py

Training on a small real corpus: ranks, stops, restarts, full disks, failing evaluations, losses that are not finite.
"""
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_model import small_model

import common
import data
import evaluator
import train
from checkpoint import read_checkpoint
from common import UserError
from config import Config
from corpus import Corpus
from data import TrainingSteps
from distributed import Ranks
from model import TTS

slow = pytest.mark.slow
# 48 training utterances: an epoch of 6 steps. Logs, validation and checkpoints are due at different steps.
SMALL = (f"--config {ROOT}/configs/grammar.yaml --width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 "
         "--text_encoder_layers 1 --effective_batch_size 8 --batch_size 8 --log_interval 3 --val_interval 5 "
         "--val_num_samples 4 --checkpoint_interval 4 --eval_interval 0 --warmup_steps 2 --no_wandb "
         "--max_steps 16 --keep_checkpoints 9 --dtype float32").split()  # bfloat16 enlarges what ranks add in another order
LOSSES = {"train/loss", "train/flow_loss", "train/duration_loss", "train/share_loss", "train/alignment_loss",
          "val/flow_loss", "val/duration_loss", "val/share_loss"}


def arguments(corpus, out, *flags):
    return [*SMALL, "--data_dir", str(corpus), "--out_dir", str(out), *map(str, flags)]


def run(corpus, out, *flags):
    """Train in this process; returns the last checkpoint."""
    train.main(arguments(corpus, out, *flags))
    return read_checkpoint(str(Path(out) / "latest.pt"))


def lines(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def figures(out):
    """The lines of metrics.jsonl without what depends on a clock, and without evaluations."""
    kept = [{k: v for k, v in line.items() if not k.startswith(("time", "perf/", "eval/"))} for line in lines(out)]
    return [line for line in kept if len(line) > 1]


def assert_same(a, b, atol=0.0):
    for part in ("model", "ema"):
        torch.testing.assert_close(a[part], b[part], rtol=0, atol=atol)


def during_step(monkeypatch, actions: dict):
    """Call actions[n] in the middle of the step that follows step n."""
    def set_learning_rates(optimizers, cfg, step, real=train.set_learning_rates):
        actions.get(step, lambda: None)()
        return real(optimizers, cfg, step)
    monkeypatch.setattr(train, "set_learning_rates", set_learning_rates)


# --- three runs that the tests share

@pytest.fixture(scope="module")
def undisturbed(demo_corpus, tmp_path_factory):
    """A run of 16 steps to which nothing happens: its folder and its last checkpoint."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, run(demo_corpus, out)


TWO_RANKS = """
import json, os, sys
import torch.distributed as dist
import distributed, model, train

first, second, port = json.loads(sys.argv[1])
distributed.end_ranks = lambda ranks: dist.destroy_process_group()  # instead of the process's end
train.main(first)
os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
forward, steps = model.TTS.forward, -2  # the first two calls try the longest batch

def broken(self, batch):
    global steps
    steps += self.training
    if self.training and steps in (3, 4, 11, 12, 13) and os.environ["RANK"] == "1":
        batch["mel"][0, 0, 0] = float("inf")
    return forward(self, batch)

model.TTS.forward = broken
sys.argv[1:] = second
train.run_cli(train.main)
"""


@pytest.fixture(scope="module")
def two_ranks(demo_corpus, tmp_path_factory):
    """Two runs on the same two ranks, by torchrun: one like `undisturbed`, and one with infinite inputs on the second rank.

    At every checkpoint train.py itself checks that the ranks' weights are identical.
    """
    folder, flags = tmp_path_factory.mktemp("two"), ("--gpus", 0, "--nproc", 2)
    (folder / "two_ranks.py").write_text(TWO_RANKS)
    runs = [arguments(demo_corpus, folder / "whole", *flags),
            arguments(demo_corpus, folder / "broken", *flags, "--log_interval", 1, "--max_skipped_steps", 3)]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", folder / "two_ranks.py"]
    done = subprocess.run([*torchrun, json.dumps([*runs, str(port)])], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (folder / "whole" / "latest.pt").exists(), done.stderr
    return SimpleNamespace(whole=folder / "whole", broken=folder / "broken", stderr=done.stderr, status=done.returncode)


PAUSED = """
import sys
for name in ("wandb", "whisper", "bigvgan", "matplotlib"):
    sys.modules[name] = None  # as if the package was not installed
import train

def pause(optimizers, cfg, step, real=train.set_learning_rates):
    if step == 5:
        print("in step 6", flush=True)
        sys.stdin.readline()
    return real(optimizers, cfg, step)

train.set_learning_rates = pause
train.run_cli(train.main)
"""


@pytest.fixture(scope="module")
def stopped(demo_corpus, tmp_path_factory):
    """A run in its own process, without optional packages. In its sixth step a second run is started in the same folder,
    then SIGTERM goes to the whole process group, as schedulers send it.
    """
    out = tmp_path_factory.mktemp("stopped") / "run"
    flags = [flag for flag in arguments(demo_corpus, out) if flag != "--no_wandb"]
    process = subprocess.Popen([sys.executable, "-c", PAUSED, *flags], cwd=ROOT, text=True, start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert any("in step 6" in line for line in process.stdout), process.stderr.read()
    with pytest.raises(UserError) as refusal:
        run(demo_corpus, out, "--resume", "latest")
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate("\n", timeout=120)
    return SimpleNamespace(out=out, pid=process.pid, status=process.returncode, stdout=stdout, stderr=stderr, refusal=str(refusal.value))


# --- what a run writes

def test_a_run_writes_its_files_and_learns(undisturbed):
    out, ckpt = undisturbed
    assert sorted(p.name for p in out.iterdir()) == [*(f"ckpt_step_{n:08d}.pt" for n in (4, 8, 12, 16)), "config.yaml",
                                                     "latest.pt", "lock", "metrics.jsonl", "runs.jsonl"]
    assert set().union(*lines(out)) >= LOSSES | {"step", "time", "optim/lr", "optim/grad_norm", "optim/skipped_steps",
                                                 "time/step_sec", "time/data_wait_sec", "perf/frames_per_sec"}
    assert ckpt["step"] == 16 and ckpt["config"]["width"] == 32 and ckpt["config"]["mel_std"] > 0
    losses = [line["train/loss"] for line in lines(out) if "train/loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_a_start_records_code_corpus_and_config(undisturbed, demo_corpus):
    start, = map(json.loads, (undisturbed[0] / "runs.jsonl").read_text().splitlines())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert start["commit"] == (commit or None) and isinstance(start["uncommitted"], list if commit else type(None))
    assert start["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert start["corpus"] == Corpus(str(demo_corpus), Config()).fingerprint() == undisturbed[1]["corpus"]
    assert start["config"]["width"] == 32 and start["devices"] and start["ranks"] == 1 and start["step"] == 0


@slow
def test_training_needs_no_optional_package(stopped):
    assert stopped.status == 0 and "no W&B in this run" in stopped.stderr and (stopped.out / "latest.pt").exists()


def test_a_run_ends_after_its_epochs_and_deletes_old_checkpoints(demo_corpus, tmp_path):
    ckpt = run(demo_corpus, tmp_path, "--max_epochs", 2, "--overfit_first_n_samples", 8, "--checkpoint_interval", 1, "--keep_checkpoints", 1)
    assert ckpt["step"] == 2  # 8 utterances, all in one step
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt_step_00000002.pt"]


# --- the number of ranks does not matter

def assert_like_one_rank(out, undisturbed):
    """Ranks and accumulation add in another order. That changes a loss by 1e-7 a step, and weights by more: AdamW divides by
    the root of squares, which enlarges a difference where the gradient is near zero.
    """
    assert_same(read_checkpoint(str(out / "latest.pt")), undisturbed[1], atol=1e-4)
    expected = figures(undisturbed[0])
    assert [line.keys() for line in figures(out)] == [line.keys() for line in expected]
    for line, other in zip(figures(out), expected):
        for key in line.keys() & LOSSES:
            assert line[key] == pytest.approx(other[key], rel=1e-5), (line["step"], key)


@slow
def test_two_ranks_train_as_one_does(two_ranks, undisturbed):
    assert_like_one_rank(two_ranks.whole, undisturbed)


@slow
def test_two_accumulation_steps_train_as_one_batch_does(demo_corpus, undisturbed, tmp_path):
    run(demo_corpus, tmp_path, "--batch_size", 4)
    assert_like_one_rank(tmp_path, undisturbed)


@slow
def test_the_tolerances_notice_other_noise(demo_corpus, undisturbed, tmp_path, monkeypatch):
    """The comparison must be able to fail: the same initial weights and utterances, but other noise."""
    monkeypatch.setattr(data, "sample_rng", lambda cfg, epoch, i, real=data.sample_rng: real(cfg, epoch + 1, i))
    ckpt = run(demo_corpus, tmp_path)
    with pytest.raises(AssertionError):
        assert_same(ckpt, undisturbed[1], atol=1e-4)
    losses, others = ([line["train/loss"] for line in figures(out) if "train/loss" in line] for out in (tmp_path, undisturbed[0]))
    assert losses != pytest.approx(others, rel=1e-5)


def test_the_first_gradients_do_not_depend_on_the_split(demo_corpus):
    """No optimiser has enlarged anything yet, so only float32's rounding differs."""
    cfg = small_model(effective_batch_size=16).cfg
    corpus = Corpus(str(demo_corpus), cfg)
    gradients = []
    for batch_size, world in ((16, 1), (16, 2), (16, 3), (8, 1), (8, 3), (8, 4)):
        cfg.batch_size, model = batch_size, small_model()
        for rank in range(world):
            for batch in TrainingSteps(corpus, cfg, model.tokenise, rank, world)[0]:
                model(batch)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stop", [2, 7])
def test_another_number_of_ranks_neither_repeats_nor_skips_an_utterance(demo_corpus, stop):
    cfg = Config(text_encoder_name="random", effective_batch_size=12, batch_size=12, mel_mean=-5.0, mel_std=2.0)
    corpus, seen = Corpus(str(demo_corpus), cfg), []
    for step in range(8):  # two epochs of four steps; from step `stop` on there are three ranks
        world = 1 if step < stop else 3
        for rank in range(world):
            for batch in TrainingSteps(corpus, cfg, lambda text: [1], rank, world)[step]:
                seen += [mel[:n].double().sum().item() for mel, n in zip(batch["mel"], batch["mel_lengths"])]
    assert len(set(seen[:48])) == len(set(seen[48:])) == 48 == len(seen) / 2


@slow
def test_a_run_of_two_ranks_goes_on_with_one(demo_corpus, two_ranks, undisturbed, tmp_path):
    with pytest.raises(UserError, match="holds a run already"):  # another run's checkpoint must not overwrite this one
        run(demo_corpus, two_ranks.whole, "--resume", undisturbed[0] / "ckpt_step_00000008.pt")
    for name in ("metrics.jsonl", "ckpt_step_00000008.pt"):
        shutil.copy(two_ranks.whole / name, tmp_path)
    run(demo_corpus, tmp_path, "--resume", tmp_path / "ckpt_step_00000008.pt")
    assert_like_one_rank(tmp_path, undisturbed)
    with pytest.raises(UserError, match="effective_batch_size was 8, is 4"):
        run(demo_corpus, tmp_path, "--resume", "latest", "--effective_batch_size", 4, "--batch_size", 4)


# --- interruption does not matter

@slow
def test_a_run_that_is_stopped_five_times_ends_like_an_undisturbed_one(demo_corpus, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # the tests may run under nohup
    ways = {1: signal.SIGINT, 4: signal.SIGTERM, 9: signal.SIGUSR1, 12: "STOP", 14: signal.SIGHUP}
    during_step(monkeypatch, {step: (tmp_path / "STOP").touch if how == "STOP" else lambda how=how: os.kill(os.getpid(), how)
                              for step, how in ways.items()})
    for step in ways:
        assert run(demo_corpus, tmp_path, "--resume", "latest")["step"] == step + 1
        assert not (tmp_path / "STOP").exists()
    assert_same(run(demo_corpus, tmp_path, "--resume", "latest"), undisturbed[1])
    assert figures(tmp_path) == figures(undisturbed[0])


@slow
def test_sigterm_to_the_process_group_ends_in_a_checkpoint(demo_corpus, stopped, undisturbed, tmp_path):
    assert stopped.status == 0 and "stopped by SIGTERM at step 6" in stopped.stdout and "Traceback" not in stopped.stderr
    out = shutil.copytree(stopped.out, tmp_path / "run")
    assert_same(run(demo_corpus, out, "--resume", "latest"), undisturbed[1])
    assert figures(out) == figures(undisturbed[0])


@slow
def test_a_run_out_of_time_goes_on_after_torchruns_restart(demo_corpus, undisturbed, tmp_path, monkeypatch):
    first = run(demo_corpus, tmp_path, "--max_train_seconds", 0.01)
    assert first["step"] < 16 and first["train_seconds"] >= 0.01
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # then --resume latest is implied
    last = run(demo_corpus, tmp_path)
    assert_same(last, undisturbed[1])
    after, expected = ([line for line in figures(out) if line["step"] > first["step"]] for out in (tmp_path, undisturbed[0]))
    assert after == expected and last["train_seconds"] > first["train_seconds"]


@slow
def test_a_dropout_that_you_add_resumes_exactly_too(demo_corpus, tmp_path, monkeypatch):
    class Dropping(TTS):
        def forward(self, batch):
            return super().forward(batch | {"mel": torch.nn.functional.dropout(batch["mel"], 0.1, self.training)})
    monkeypatch.setattr(train, "TTS", Dropping)
    flags = ("--lr_decay", "constant", "--val_interval", 0)
    whole = run(demo_corpus, tmp_path / "whole", *flags, "--max_steps", 6)
    run(demo_corpus, tmp_path / "parts", *flags, "--max_steps", 3)
    torch.rand(7)
    assert_same(run(demo_corpus, tmp_path / "parts", *flags, "--max_steps", 6, "--resume", "latest"), whole)


@slow
def test_bfloat16_resumes_exactly_too(demo_corpus, tmp_path):
    flags = ("--dtype", "bfloat16", "--lr_decay", "constant", "--val_interval", 0)
    whole = run(demo_corpus, tmp_path / "whole", *flags, "--max_steps", 6)
    run(demo_corpus, tmp_path / "parts", *flags, "--max_steps", 3)
    assert_same(run(demo_corpus, tmp_path / "parts", *flags, "--max_steps", 6, "--resume", "latest"), whole)
    with pytest.raises(AssertionError):  # so the type does make a difference
        assert_same(run(demo_corpus, tmp_path / "float32", *flags[2:], "--max_steps", 6), whole)


@slow
def test_a_run_killed_after_an_old_checkpoint_drops_the_later_lines(demo_corpus, undisturbed, tmp_path):
    out = shutil.copytree(undisturbed[0], tmp_path / "run")
    os.replace(out / "ckpt_step_00000004.pt", out / "latest.pt")
    for name, cut_off in (("metrics.jsonl", '{"step": 2, "train/lo'), ("runs.jsonl", '{"step": 4, "ti')):
        with open(out / name, "a") as f:
            f.write(cut_off)
    (out / "latest.pt.tmp").touch()
    assert_same(run(demo_corpus, out, "--resume", "latest"), undisturbed[1])
    assert figures(out) == figures(undisturbed[0]) and not list(out.glob("*.tmp"))
    starts = (out / "runs.jsonl").read_text().splitlines()
    assert [json.loads(start)["step"] for start in (starts[0], starts[-1])] == [0, 4]


# --- one owner

@slow
def test_a_second_start_is_refused_while_the_first_lives(stopped):
    assert f"is in use by a run (process {stopped.pid} on" in stopped.refusal and "STOP" in stopped.refusal


def test_a_finished_run_is_not_overwritten(demo_corpus, undisturbed):
    out, _ = undisturbed
    before = {p: p.read_bytes() for p in out.iterdir() if p.name != "lock"}
    for flags, complaint in (([], "--resume latest"), (["--resume", "latest"], "learning_rate was 0.007, is 0.01")):
        with pytest.raises(UserError, match=complaint):
            run(demo_corpus, out, "--learning_rate", 0.01, *flags)
    assert {p: p.read_bytes() for p in out.iterdir() if p.name != "lock"} == before


# --- full disks and lost folders

def limit_files(size):
    """No file of this process can grow beyond `size` bytes, as on a full disk. -1: no limit."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.fixture
def restore_limit():
    yield
    limit_files(-1)


@slow
def test_a_disk_that_is_full_for_a_while_costs_nothing(demo_corpus, undisturbed, tmp_path, monkeypatch, capsys, restore_limit):
    found = []

    def free():
        found.extend([read_checkpoint(str(tmp_path / "latest.pt"))["step"], sorted(p.name for p in tmp_path.glob("*[0-9].pt")),
                      list(tmp_path.glob("*.tmp"))])
        limit_files(-1)
    during_step(monkeypatch, {5: lambda: limit_files(2000), 14: free})
    assert_same(run(demo_corpus, tmp_path), undisturbed[1])
    assert figures(tmp_path) == figures(undisturbed[0])  # lines that found no room are written later
    assert "the checkpoint could not be written" in capsys.readouterr().err
    assert found == [4, ["ckpt_step_00000004.pt"], []]


@slow
def test_a_disk_that_stays_full_ends_the_run(demo_corpus, tmp_path, monkeypatch, restore_limit):
    during_step(monkeypatch, {5: lambda: limit_files(2000)})
    with pytest.raises(UserError, match="the checkpoint could not be written .*File too large.* 5 times in a row"):
        run(demo_corpus, tmp_path, "--checkpoint_interval", 2, "--log_interval", 20)
    limit_files(-1)
    with pytest.raises(UserError, match="step 7 could not be written; the last good one is .*latest.pt"):
        run(demo_corpus, tmp_path, "--resume", "latest", "--max_steps", 7)
    limit_files(-1)
    assert read_checkpoint(str(tmp_path / "latest.pt"))["step"] == 4 and not list(tmp_path.glob("*.tmp"))


@slow
def test_a_folder_that_goes_away_ends_the_run(demo_corpus, tmp_path, monkeypatch):
    during_step(monkeypatch, {5: lambda: shutil.rmtree(tmp_path / "run")})
    with pytest.raises(UserError, match="the checkpoint could not be written"):
        run(demo_corpus, tmp_path / "run", "--checkpoint_interval", 1)


def test_a_corpus_that_goes_away_ends_the_run(demo_corpus, tmp_path, monkeypatch):
    corpus = shutil.copytree(demo_corpus, tmp_path / "corpus")
    during_step(monkeypatch, {5: lambda: shutil.rmtree(corpus / "mel_shards")})
    with pytest.raises(UserError, match=r"^the corpus at .*stopped at step \d+, the last good checkpoint is .*latest.pt$"):
        run(corpus, tmp_path / "run")
    assert read_checkpoint(str(tmp_path / "run" / "latest.pt"))["step"] >= 4


# --- evaluations

@pytest.fixture
def evaluations(tmp_path):
    """Flags for evaluations of one short prompt, after steps 8 and 16."""
    (tmp_path / "prompts.txt").write_text("Hi.")
    return "--eval_interval", 8, "--eval_judge", "none", "--eval_steps", 1, "--eval_prompts", tmp_path / "prompts.txt"


def failing(error):
    def evaluate(*_, **__):
        raise error
    return evaluate


@slow
def test_an_evaluation_that_was_cut_off_is_done_after_the_resume(demo_corpus, undisturbed, evaluations, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluator, "evaluate", failing(KeyboardInterrupt()))
        run(demo_corpus, tmp_path / "run", *evaluations)
    run(demo_corpus, tmp_path / "run", *evaluations, "--resume", "latest")
    assert sorted(p.name for p in (tmp_path / "run" / "eval").iterdir()) == ["step_00000008", "step_00000016"]
    assert [line["step"] for line in lines(tmp_path / "run") if "time/eval_sec" in line] == [8, 16]
    assert figures(tmp_path / "run") == figures(undisturbed[0])
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    run(demo_corpus, tmp_path / "run", *evaluations, "--resume", "latest")  # nothing is left to do
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@slow
def test_the_best_checkpoint_by_the_judge_is_kept(demo_corpus, evaluations, tmp_path, monkeypatch):
    """best.pt stays when a worse checkpoint comes, and when its numbered name is deleted. Only the first evaluation has floors."""
    rates, floors = {4: 0.5, 8: 0.2, 12: 0.4, 16: 0.3}, {}

    def evaluate(model, cfg, prompts, out, ranks, step, *rest, real=evaluator.evaluate, **options):
        floors[step] = options["floors"]
        return real(model, cfg, prompts, out, ranks, step, *rest, **options) | {"wer": 1.0, "cer": rates[step]}
    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    flags = (*evaluations, "--eval_interval", 4, "--keep_checkpoints", 1)
    for last, best in ((4, 4), (12, 8), (16, 8)):
        run(demo_corpus, tmp_path / "run", *flags, "--max_steps", last, *(("--resume", "latest") if last > 4 else ()))
        assert read_checkpoint(str(tmp_path / "run" / "best.pt"))["step"] == best
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pt")) == ["best.pt", "ckpt_step_00000016.pt", "latest.pt"]
    assert floors == {4: True, 8: False, 12: False, 16: False}


def test_another_number_of_steps_on_resume_is_said(demo_corpus, tmp_path, capsys):
    run(demo_corpus, tmp_path, "--max_steps", 4)
    assert "max_steps was" not in capsys.readouterr().out
    run(demo_corpus, tmp_path, "--max_steps", 5, "--resume", "latest")
    assert "max_steps was 4, is 5: the learning rate of step 4 moves from 0.00e+00 to 2.33e-03 (linear decay)" in capsys.readouterr().out


def test_too_little_memory_for_the_longest_batch_ends_the_run_at_once(demo_corpus, tmp_path, monkeypatch):
    def forward(self, batch, real=TTS.forward):
        if batch["mel_lengths"].max() == longest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, batch)
    longest = Corpus(str(demo_corpus), Config()).frames[:48].max()
    monkeypatch.setattr(TTS, "forward", forward)
    with pytest.raises(UserError, match=f"longest 8 utterances, {longest} frames each, do not fit .* lower batch_size"):
        run(demo_corpus, tmp_path, "--silence_prob", 0)
    assert not (tmp_path / "latest.pt").exists()


def test_the_first_evaluation_that_fails_ends_the_run_after_its_checkpoint(demo_corpus, evaluations, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluator, "evaluate", failing(RuntimeError("a bug")))
    for step in (8, 8):  # the same again after a resume
        with pytest.raises(RuntimeError, match="a bug"):
            run(demo_corpus, tmp_path / "run", *evaluations, "--resume", "latest")
        assert read_checkpoint(str(tmp_path / "run" / "latest.pt"))["step"] == step


@slow
@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("no room")])
def test_later_evaluations_that_fail_only_warn(demo_corpus, undisturbed, evaluations, tmp_path, monkeypatch, capsys, error):
    def evaluate(model, cfg, prompts, out, ranks, step, *rest, real=evaluator.evaluate, **options):
        return (real if step == 8 else failing(error))(model, cfg, prompts, out, ranks, step, *rest, **options)
    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    assert_same(run(demo_corpus, tmp_path / "run", *evaluations), undisturbed[1])
    stderr = capsys.readouterr().err
    assert f"warning: step 16: evaluation failed: {error}" in stderr and ("Traceback" in stderr) == isinstance(error, RuntimeError)
    run(demo_corpus, tmp_path / "run", *evaluations, "--resume", "latest", "--max_steps", 17)  # it was evaluated before the resume
    assert "warning: step 17: evaluation failed" in capsys.readouterr().err


def test_a_missing_vocoder_refuses_a_new_run_and_warns_an_evaluated_one(demo_corpus, evaluations, tmp_path, capsys):
    flags = (*evaluations, "--eval_vocoder", "bigvgan", "--eval_vocoder_model", tmp_path / "none", "--max_steps", 1)
    with pytest.raises(UserError, match="vocoder"):
        run(demo_corpus, tmp_path / "run", *flags)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (tmp_path / "run" / "eval" / "step_00000008").mkdir(parents=True)
    (tmp_path / "run" / "eval" / "step_00000008" / "summary.json").touch()
    run(demo_corpus, tmp_path / "run", *flags)
    stderr = capsys.readouterr().err
    assert "evaluations will fail" in stderr and "step 1: evaluation failed: cannot get the vocoder" in stderr


# --- losses that are not finite

@slow
def test_a_step_that_is_broken_on_one_rank_is_skipped_on_both(two_ranks):
    logged = [line for line in figures(two_ranks.broken) if "optim/lr" in line]
    assert [line["optim/skipped_steps"] for line in logged] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4], two_ranks.stderr
    assert ["train/loss" in line for line in logged] == [n not in (3, 4, 11, 12) for n in range(1, 13)]
    message = next(line for line in two_ranks.stderr.splitlines() if line.startswith("error:"))
    assert "not finite in 3 steps in a row, the last of them step 13 (demo_" in message
    assert f"the last good checkpoint is {two_ranks.broken / 'latest.pt'}" in message and two_ranks.status != 0
    ckpt = read_checkpoint(str(two_ranks.broken / "latest.pt"))
    assert ckpt["step"] == 12 and ckpt["skipped"] == 4 and ckpt["skipped_in_a_row"] == 2
    assert all(value.isfinite().all() for value in ckpt["model"].values())


def test_a_learning_rate_that_explodes_ends_the_run(demo_corpus, tmp_path):
    with pytest.raises(UserError, match="not finite in 4 steps in a row.*Lower learning_rate"):
        run(demo_corpus, tmp_path, "--learning_rate", 1e30, "--adamw_learning_rate", 1e30, "--max_skipped_steps", 4)


# --- mistakes and validation

@pytest.mark.parametrize(("flags", "complaint"), [
    ("--effective_batch_size 64 --batch_size 64", "only 48 training"), ("--data_dir none", "no processed corpus"),
    ("--gpus 99 --batch_size 99 --effective_batch_size 99", "CUDA GPUs"), ("--hop_length 128", "hop_length is 256"),
    ("--eval_interval 1 --eval_prompts nope.txt", "nope.txt"), ("--resume no.pt", "no checkpoint"), ("--out_dir /proc/x", "cannot write")])
def test_mistakes_are_one_line_and_status_2(demo_corpus, tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments(demo_corpus, tmp_path, *flags.split())])
    with pytest.raises(SystemExit) as e:
        common.run_cli(train.main)
    stderr = capsys.readouterr().err
    assert e.value.code == 2 and stderr.startswith("error: ") and complaint in stderr and stderr.count("\n") == 1


def test_texts_longer_than_the_encoder_reads_are_refused(demo_corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("text_encoder.T5_TOKENS", 30)
    with pytest.raises(UserError, match=r"text\(s\) of .* have more than the 30 tokens .*'demo_00.*shorten them"):
        run(demo_corpus, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


def test_validation_does_not_depend_on_the_batch_size(demo_corpus):
    model = small_model(val_num_samples=8)
    corpus, values = Corpus(str(demo_corpus), model.cfg), []
    for model.cfg.batch_size in (8, 8, 3):
        values.append(train.validation_losses(model, corpus, model.cfg, Ranks(0, 1, torch.device("cpu"))))
    assert values[0] == values[1] and values[0] == pytest.approx(values[2], rel=1e-5)
