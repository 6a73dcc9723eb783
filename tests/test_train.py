"""Training on a small real corpus: ranks, stops, restarts, checkpoints, refusals, full disks, broken numbers."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import evaluator
import train
from checkpoint import read_checkpoint
from config import Config, UserError
from data import Corpus, TrainingSteps
from model import TTS
from train import Muon, averaged, lr_factor, make_optimizers, orthogonal, update_ema, validation_loss

ROOT = Path(__file__).resolve().parents[1]
# 48 training utterances: an epoch of 3 steps. Logs, validation and checkpoints fall on different steps.
SMALL = ("--config configs/demo.yaml --width 32 --heads 2 --layers 2 --text_encoder_width 32 --text_encoder_heads 2 "
         "--text_encoder_layers 1 --effective_batch_size 16 --batch_size 16 --log_interval 3 --val_interval 5 "
         "--val_num_samples 4 --checkpoint_interval 4 --eval_interval 0 --loader_workers 0 --warmup_steps 2 --no_wandb "
         "--max_steps 20 --keep_checkpoints 9").split()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def arguments(corpus, out, *flags):
    return [*SMALL, "--data_dir", str(corpus), "--out_dir", str(out), *map(str, flags)]


def run(corpus, out, *flags):
    train.main(arguments(corpus, out, *flags))
    return read_checkpoint(str(Path(out) / "latest.pt"))


def command(corpus, out, *flags, program=(sys.executable, "train.py")):
    """The same by a process of its own."""
    return subprocess.run([*program, *arguments(corpus, out, *flags)], capture_output=True, text=True, timeout=240,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})


def rows(out):
    """The metrics' lines, less what clocks say."""
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time", "perf/"))} for line in lines]


def assert_same(a, b, **tolerance):
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        for name in a[part]:
            torch.testing.assert_close(a[part][name], b[part][name], msg=lambda m: f"{name}: {m}", **tolerance)  # noqa: B023


def before_step(monkeypatch, actions: dict):
    """Have training call actions[n] in the middle of the step that follows step n."""
    def factor(step, cfg):
        actions.get(step, lambda: None)()
        return lr_factor(step, cfg)
    monkeypatch.setattr(train, "lr_factor", factor)


@pytest.fixture(scope="module")
def undisturbed(demo_corpus, tmp_path_factory):
    """A run of twenty steps that nothing happened to: its folder and its last checkpoint."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    return out, run(demo_corpus, out)


@pytest.fixture(scope="module")
def two_ranks(demo_corpus, tmp_path_factory):
    """The same on two ranks, by real torchrun, started by run.sh as a user does where run.sh installed this environment.

    train.py itself checks at every checkpoint that the ranks' weights are identical.
    """
    out = tmp_path_factory.mktemp("two") / "run"
    program = ["./run.sh"] if (ROOT / ".venv" / "installed").exists() else [*TORCHRUN, "train.py"]
    done = command(demo_corpus, out, "--gpus", 0, "--nproc", 2, program=program)
    assert done.returncode == 0, done.stderr[-2000:]
    return out, read_checkpoint(str(out / "latest.pt"))


def test_a_run_leaves_what_the_contract_says(undisturbed):
    out, ckpt = undisturbed
    assert sorted(p.name for p in out.iterdir()) == [*(f"ckpt_step_{n:08d}.pt" for n in (4, 8, 12, 16, 20)), "config.yaml",
                                                     "latest.pt", "lock", "metrics.jsonl", "runs.jsonl"]
    logged = {key for line in (out / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert logged >= {"step", "time", "train/loss", "train/flow_loss", "train/duration_loss", "val/flow_loss", "optim/lr",
                      "optim/grad_norm", "optim/skipped_steps", "time/step_sec", "perf/frames_per_sec"}
    assert ckpt["step"] == 20 and ckpt["config"]["width"] == 32 and ckpt["config"]["mel_std"] > 0
    losses = [row["train/loss"] for row in rows(out) if "train/loss" in row]
    assert len(losses) == 7 and losses[-1] < losses[0]


def test_a_start_records_what_it_runs(undisturbed, demo_corpus):
    start, = map(json.loads, (undisturbed[0] / "runs.jsonl").read_text().splitlines())
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert start["commit"] == (git or None) and isinstance(start["uncommitted"], list if git else type(None))
    assert start["packages"]["torch"] == torch.__version__.split("+")[0] or start["packages"]["torch"] == torch.__version__
    assert start["corpus"] == Corpus(str(demo_corpus), Config()).check() == undisturbed[1]["corpus"]
    assert start["config"]["width"] == 32 and start["devices"] and start["ranks"] == 1 and start["step"] == 0


# --- the split does not matter

def assert_like_one_rank(out, ckpt, undisturbed):
    """Sums over ranks run in another order, which is worth 1e-7 a step, and AdamW divides by the root of squares, which makes
    more of it where gradients are near zero: parameters get 1e-4, losses 1e-5.
    """
    assert_same(ckpt, undisturbed[1], rtol=0, atol=1e-4)
    expected = rows(undisturbed[0])
    assert [row.keys() for row in rows(out)] == [row.keys() for row in expected]
    for row, other in zip(rows(out), expected):
        for key in row.keys() & {"train/loss", "train/flow_loss", "train/duration_loss", "val/flow_loss"}:
            assert row[key] == pytest.approx(other[key], rel=1e-5), (row["step"], key)


def test_two_ranks_train_as_one_does(two_ranks, undisturbed):
    assert_like_one_rank(*two_ranks, undisturbed)


def test_two_accumulation_steps_train_as_one_batch_does(demo_corpus, undisturbed, tmp_path):
    assert_like_one_rank(tmp_path, run(demo_corpus, tmp_path, "--batch_size", 8), undisturbed)


def test_another_seed_is_told_apart_by_the_tolerances(demo_corpus, undisturbed, tmp_path, monkeypatch):
    """The comparison must be able to fail: the same weights to start from and the same utterances, but other noise."""
    real = data.sample_rng
    monkeypatch.setattr(data, "sample_rng", lambda cfg, epoch, i: real(cfg, epoch + 1, i))
    ckpt = run(demo_corpus, tmp_path)
    with pytest.raises(AssertionError):
        assert_same(ckpt, undisturbed[1], rtol=0, atol=1e-4)
    losses, expected = ([row["train/loss"] for row in rows(out) if "train/loss" in row] for out in (tmp_path, undisturbed[0]))
    assert any(loss != pytest.approx(other, rel=1e-5) for loss, other in zip(losses, expected))


def test_the_first_gradients_do_not_depend_on_the_split(demo_corpus):
    """Before any optimiser there is float32's rounding only."""
    cfg = Config(text_encoder_name="random", train_text_encoder=True, width=32, layers=1, heads=2, text_encoder_width=32,
                 text_encoder_heads=2, text_encoder_layers=1, effective_batch_size=16, batch_size=16)
    corpus = Corpus(str(demo_corpus), cfg)
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    gradients = []
    for batch_size, world in ((16, 1), (16, 2), (8, 1), (8, 4)):
        torch.manual_seed(0)
        cfg.batch_size = batch_size
        model = TTS(cfg)
        for rank in range(world):
            for batch in TrainingSteps(corpus, cfg, model.tokenise, rank, world)[0]:
                model(batch)["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [2, 4, 7])
def test_another_number_of_ranks_goes_on_in_the_epoch_without_repeating_or_skipping(demo_corpus, stop):
    cfg = Config(text_encoder_name="random", effective_batch_size=12, batch_size=12)
    corpus = Corpus(str(demo_corpus), cfg)
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    seen = []
    for step in range(8):  # two epochs of four steps, of which the steps from `stop` on are done by three ranks
        world = 1 if step < stop else 3
        for rank in range(world):
            steps = TrainingSteps(corpus, cfg, lambda text: [1], rank, world)
            for batch in steps[step]:
                seen += [mel[:n].double().sum().item() for mel, n in zip(batch["mel"], batch["mel_lengths"])]
    for epoch in (seen[:48], seen[48:]):
        assert len(epoch) == len(set(epoch)) == 48


def test_a_run_of_two_ranks_goes_on_with_one(demo_corpus, two_ranks, undisturbed, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes((two_ranks[0] / "metrics.jsonl").read_bytes())
    ckpt = run(demo_corpus, tmp_path, "--resume", two_ranks[0] / "ckpt_step_00000008.pt")
    assert_like_one_rank(tmp_path, ckpt, undisturbed)
    with pytest.raises(UserError, match="effective_batch_size was 16, is 8"):
        run(demo_corpus, tmp_path, "--resume", "latest", "--effective_batch_size", 8, "--batch_size", 8)


def test_ranks_that_disagree_are_noticed(monkeypatch):
    """The check must be able to fail: a maximum over ranks in which the other rank's weights are larger."""
    model = torch.nn.Linear(2, 2)
    here = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
    monkeypatch.setattr(train, "over_ranks", lambda op, value, world, device: max(value, here + 1.0))
    with pytest.raises(RuntimeError, match="differ"):
        train.check_ranks_agree(model, 2, "cpu")


# --- interruption does not matter

@pytest.mark.parametrize(("how", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 4), (signal.SIGUSR1, 10), ("STOP", 13),
                                         (signal.SIGHUP, 16)])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(demo_corpus, undisturbed, tmp_path, monkeypatch, how, step):
    if how == signal.SIGHUP:  # as it is without nohup, under which the tests may run
        monkeypatch.setattr(train.signal, "getsignal", lambda number: signal.SIG_DFL)
    before_step(monkeypatch, {step: (tmp_path / "STOP").touch if how == "STOP" else lambda: os.kill(os.getpid(), how)})
    assert run(demo_corpus, tmp_path)["step"] == step + 1
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert not (tmp_path / "STOP").exists()
    assert_same(run(demo_corpus, tmp_path, "--resume", "latest"), undisturbed[1], rtol=0, atol=0)
    assert rows(tmp_path) == rows(undisturbed[0])


def test_a_run_out_of_time_goes_on_when_it_gets_more(demo_corpus, undisturbed, tmp_path):
    first = run(demo_corpus, tmp_path, "--max_train_seconds", 0.01)
    assert first["step"] < 20 and first["train_seconds"] >= 0.01
    last = run(demo_corpus, tmp_path, "--resume", "latest")
    assert_same(last, undisturbed[1], rtol=0, atol=0)
    assert [r for r in rows(tmp_path) if r["step"] > first["step"]] == [r for r in rows(undisturbed[0]) if r["step"] > first["step"]]
    assert last["train_seconds"] > first["train_seconds"]


def test_a_dropout_that_somebody_adds_resumes_exactly_too(demo_corpus, tmp_path, monkeypatch):
    class Dropping(TTS):
        def forward(self, batch):
            return super().forward(batch | {"mel": torch.nn.functional.dropout(batch["mel"], 0.1, self.training)})
    monkeypatch.setattr(train, "TTS", Dropping)
    whole = run(demo_corpus, tmp_path / "whole", "--max_steps", 6)
    run(demo_corpus, tmp_path / "parts", "--max_steps", 3, "--lr_decay", "constant")
    torch.rand(7)
    part = run(demo_corpus, tmp_path / "parts", "--max_steps", 6, "--lr_decay", "constant", "--resume", "latest")
    whole = run(demo_corpus, tmp_path / "constant", "--max_steps", 6, "--lr_decay", "constant")
    assert_same(part, whole, rtol=0, atol=0)


def test_an_evaluation_that_was_cut_off_is_made_up_for(demo_corpus, undisturbed, tmp_path, monkeypatch):
    flags = ("--eval_interval", 10, "--eval_judge", "none", "--eval_steps", 1, "--eval_num_samples", 2)

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluator, "evaluate", killed)
        run(demo_corpus, tmp_path, *flags)
    run(demo_corpus, tmp_path, *flags, "--resume", "latest")
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["step_00000010", "step_00000020"]
    spoken = [line["step"] for line in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
              if "time/eval_sec" in line]
    assert spoken == [10, 20]
    assert [r for r in rows(tmp_path) if "eval/alignment" not in r] == rows(undisturbed[0])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    run(demo_corpus, tmp_path, *flags, "--resume", "latest")  # nothing is left to do
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_ranks_that_torchrun_started_again_go_on(demo_corpus, undisturbed, tmp_path, monkeypatch):
    run(demo_corpus, tmp_path, "--max_steps", 20, "--max_train_seconds", 0.01)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert_same(run(demo_corpus, tmp_path), undisturbed[1], rtol=0, atol=0)


def test_two_runs_at_once_in_one_folder(demo_corpus, undisturbed, tmp_path, monkeypatch):
    second = []
    before_step(monkeypatch, {5: lambda: second.append(command(demo_corpus, tmp_path, "--resume", "latest"))})
    assert_same(run(demo_corpus, tmp_path), undisturbed[1], rtol=0, atol=0)
    assert second[0].returncode == 2 and f"process {os.getpid()} on" in second[0].stderr and "STOP" in second[0].stderr
    assert second[0].stderr.count("\n") == 1


def test_sigterm_to_the_whole_process_group_finds_the_loader_alive(demo_corpus, tmp_path):
    """Schedulers signal every process of a job: the loader's worker must outlive the step that is going on."""
    process = subprocess.Popen([sys.executable, "train.py", *arguments(demo_corpus, tmp_path, "--max_steps", 100000),
                                "--loader_workers", "1"], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while process.poll() is None and not ((tmp_path / "metrics.jsonl").exists() and rows(tmp_path)):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM" in out and "Traceback" not in err, err
    assert read_checkpoint(str(tmp_path / "latest.pt"))["step"] >= 3


def test_resume_from_an_earlier_checkpoint_drops_the_later_lines(demo_corpus, undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    (tmp_path / "run" / "latest.pt").unlink()
    (tmp_path / "run" / "ckpt_step_00000004.pt").rename(tmp_path / "run" / "latest.pt")  # as a kill -9 after step 4 leaves it
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "train/lo')
    with open(tmp_path / "run" / "runs.jsonl", "a") as f:
        f.write('{"step": 4, "ti')
    (tmp_path / "run" / "ckpt.tmp").touch()
    assert_same(run(demo_corpus, tmp_path / "run", "--resume", "latest"), undisturbed[1], rtol=0, atol=0)
    assert rows(tmp_path / "run") == rows(undisturbed[0]) and not list((tmp_path / "run").glob("*.tmp"))
    first, cut_off, last = (tmp_path / "run" / "runs.jsonl").read_text().splitlines()
    assert json.loads(first)["step"] == 0 and json.loads(last)["step"] == 4


def test_an_existing_run_and_a_changed_recipe_are_refused(demo_corpus, undisturbed, tmp_path):
    out, ckpt = undisturbed
    before = {p: p.read_bytes() for p in out.iterdir() if p.name != "lock"}
    with pytest.raises(UserError, match="--resume latest"):
        run(demo_corpus, out)
    with pytest.raises(UserError, match="learning_rate was 0.007, is 0.01"):
        run(demo_corpus, out, "--max_steps", 22, "--resume", "latest", "--learning_rate", 0.01)
    other = shutil.copytree(demo_corpus, tmp_path / "other")
    index = other / "metadata" / "audio_index.parquet"
    table = pq.read_table(index).to_pylist()
    table[0]["text"], table[1]["text"] = table[1]["text"], table[0]["text"]  # the same statistics, other utterances
    pq.write_table(pa.Table.from_pylist(table), index)
    with pytest.raises(UserError, match="the corpus was"):
        run(other, out, "--max_steps", 22, "--resume", "latest")
    torch.save({k: v for k, v in ckpt.items() if k != "window"}, tmp_path / "old.pt")
    with pytest.raises(UserError, match="does not fit this version"):
        run(demo_corpus, tmp_path / "run", "--resume", tmp_path / "old.pt")
    assert {p: p.read_bytes() for p in out.iterdir() if p.name != "lock"} == before
    (out / "latest.pt").rename(tmp_path / "latest.pt")  # killed before its first checkpoint: nothing to go on from, but
    with pytest.raises(UserError, match="--resume latest"):  # its numbers are not thrown away unasked
        run(demo_corpus, out)
    (tmp_path / "latest.pt").rename(out / "latest.pt")


# --- what a machine does to a run

def limit_files(size):
    """No file of this process may grow beyond `size` bytes, as on a full disk; -1: any may."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_disk_that_is_full_for_a_while(demo_corpus, undisturbed, tmp_path, monkeypatch, capsys):
    held = []

    def full():
        limit_files(2000)

    def free():
        held.extend(p.name for p in tmp_path.iterdir())
        held.append(read_checkpoint(str(tmp_path / "latest.pt"))["step"])
        limit_files(-1)
    before_step(monkeypatch, {5: full, 14: free})
    try:
        assert_same(run(demo_corpus, tmp_path), undisturbed[1], rtol=0, atol=0)
    finally:
        limit_files(-1)
    assert rows(tmp_path) == rows(undisturbed[0])  # lines that found no room were written later
    assert "the checkpoint could not be written" in capsys.readouterr().err
    assert held[-1] == 4 and "ckpt_step_00000008.pt" not in held and "ckpt.tmp" not in held


def test_a_disk_that_stays_full_ends_the_run(demo_corpus, tmp_path, monkeypatch):
    before_step(monkeypatch, {5: lambda: limit_files(2000)})
    try:
        with pytest.raises(UserError, match=r"the checkpoint could not be written \(OSError: .*File too large\), the 5 last times"):
            run(demo_corpus, tmp_path, "--checkpoint_interval", 2, "--log_interval", 20)
        limit_files(-1)
        with pytest.raises(UserError, match=r"step 7 could not be written; the last good one is .*latest.pt"):
            run(demo_corpus, tmp_path, "--resume", "latest", "--max_steps", 7)
    finally:
        limit_files(-1)
    assert read_checkpoint(str(tmp_path / "latest.pt"))["step"] == 4 and not list(tmp_path.glob("*.tmp"))


def test_a_folder_that_goes_away_ends_the_run(demo_corpus, tmp_path, monkeypatch):
    before_step(monkeypatch, {5: lambda: shutil.rmtree(tmp_path / "run")})
    with pytest.raises(UserError, match="the checkpoint could not be written"):
        run(demo_corpus, tmp_path / "run", "--checkpoint_interval", 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corpus_that_goes_away_ends_the_run_with_a_line(demo_corpus, tmp_path, monkeypatch, workers):
    corpus = shutil.copytree(demo_corpus, tmp_path / "corpus")
    before_step(monkeypatch, {5: lambda: shutil.rmtree(corpus / "mel_shards")})
    with pytest.raises(UserError, match=r"^the corpus at .*stopped at step \d+, the last good checkpoint is .*latest.pt$"):
        run(corpus, tmp_path / "run", "--loader_workers", workers)
    assert read_checkpoint(str(tmp_path / "run" / "latest.pt"))["step"] >= 4


def test_evaluations_that_fail_do_not_end_a_run(demo_corpus, undisturbed, tmp_path, monkeypatch, capsys):
    class Judge:
        name, floor = "crashing", None

        def transcribe(self, wavs, cfg):
            raise RuntimeError("no more memory")
    monkeypatch.setattr(evaluator, "load_judge", lambda cfg, device: Judge())
    flags = ("--eval_interval", 8, "--eval_judge", "ctc", "--eval_steps", 1, "--eval_num_samples", 2, "--resume", "latest")
    assert_same(run(demo_corpus, tmp_path, *flags), undisturbed[1], rtol=0, atol=0)
    assert "step 8: no evaluation: RuntimeError: no more memory" in capsys.readouterr().out
    with pytest.raises(UserError, match="vocoder"):  # a run that starts is told at once
        run(demo_corpus, tmp_path / "new", *flags, "--eval_vocoder", "bigvgan", "--eval_vocoder_model", tmp_path / "none")
    run(demo_corpus, tmp_path, *flags, "--eval_vocoder", "bigvgan", "--eval_vocoder_model", tmp_path / "none", "--max_steps", 21)
    captured = capsys.readouterr()
    assert "evaluations will fail" in captured.err and "step 21: no evaluation: cannot get the vocoder" in captured.out


# --- numbers that explode

BROKEN = """
import sys
import torch
import model, train
real, calls = model.TTS.forward, [0]
def forward(self, batch):
    if self.training:
        calls[0] += 1
        if calls[0] in (3, 4, 11, 12, 13) and train.os.environ["RANK"] == "1":
            batch["mel"][0, 0, 0] = float("inf")
    return real(self, batch)
model.TTS.forward = forward
train.run_cli(train.main)
"""


def test_a_step_that_is_broken_on_one_rank_is_skipped_on_all(demo_corpus, tmp_path):
    (tmp_path / "broken.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + BROKEN)
    done = command(demo_corpus, tmp_path / "run", "--gpus", 0, "--nproc", 2, "--log_interval", 1, "--max_skipped_steps", 3,
                   program=[*TORCHRUN, str(tmp_path / "broken.py")])
    train_rows = [row for row in rows(tmp_path / "run") if "optim/lr" in row]
    assert [row["optim/skipped_steps"] for row in train_rows] == [0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 3, 4], done.stderr[-2000:]
    assert ["train/loss" in row for row in train_rows] == [n not in (3, 4, 11, 12) for n in range(1, 13)]
    message = [line for line in done.stderr.splitlines() if line.startswith("error:")][0]
    assert "not finite in 3 steps in a row, the last of them step 13 (train_" in message.replace("demo_", "train_"), message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'latest.pt'}" in message and done.returncode != 0
    ckpt = read_checkpoint(str(tmp_path / "run" / "latest.pt"))
    assert ckpt["step"] == 12 and ckpt["skipped"] == 4 and ckpt["skipped_in_a_row"] == 2
    assert all(value.isfinite().all() for value in ckpt["model"].values())


def test_a_learning_rate_that_explodes_ends_the_run(demo_corpus, tmp_path):
    with pytest.raises(UserError, match=r"not finite in 4 steps in a row.*Lower learning_rate"):
        run(demo_corpus, tmp_path, "--learning_rate", 1e30, "--adamw_learning_rate", 1e30, "--max_skipped_steps", 4)


# --- the rest

def test_limits_by_epochs_seconds_and_kept_checkpoints(demo_corpus, tmp_path):
    by_epoch = run(demo_corpus, tmp_path / "a", "--max_epochs", 1, "--overfit_first_n_samples", 16,
                   "--checkpoint_interval", 1, "--keep_checkpoints", 1)
    assert by_epoch["step"] == 1  # 16 utterances, all in one step
    assert [p.name for p in (tmp_path / "a").glob("ckpt*")] == ["ckpt_step_00000001.pt"]
    by_time = run(demo_corpus, tmp_path / "b", "--max_train_seconds", 0.5, "--max_steps", 10000)
    assert 0.5 <= by_time["train_seconds"] < 10 and by_time["step"] < 10000


def test_users_mistakes_are_one_line_and_status_2(demo_corpus, tmp_path):
    cases = {("--effective_batch_size", 64, "--batch_size", 64): "only 48 training", ("--gpus", 3, "--batch_size", 6,
             "--effective_batch_size", 6): "CUDA GPUs", ("--data_dir", tmp_path / "none"): "no processed corpus",
             ("--hop_length", 128): "hop_length is 256", ("--eval_interval", 1, "--eval_prompts", "nope.txt"): "nope.txt",
             ("--resume", tmp_path / "no.pt"): "no checkpoint", ("--out_dir", "/proc/x"): "cannot write"}
    for flags, expected in cases.items():
        with pytest.raises(UserError, match=expected):
            train.main(arguments(demo_corpus, tmp_path / "run", *flags))
    done = command(tmp_path / "none", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.startswith("error: no processed corpus") and done.stderr.count("\n") == 1


def test_works_without_packages_that_the_config_does_not_ask_for(demo_corpus, tmp_path):
    code = ("import sys; [sys.modules.__setitem__(m, None) for m in ('wandb', 'whisper', 'bigvgan', 'matplotlib')]; "
            f"import train; train.main({[a for a in arguments(demo_corpus, tmp_path, '--max_steps', 1) if a != '--no_wandb']!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "no W&B in this run" in done.stderr and (tmp_path / "latest.pt").exists()


def test_learning_rate_schedule():
    cfg = Config(max_steps=100, warmup_steps=10, lr_decay="linear", min_lr_ratio=0.1)
    assert lr_factor(0, cfg) == 0.1 and lr_factor(9, cfg) == 1.0 and lr_factor(10, cfg) == 1.0
    assert lr_factor(100, cfg) == pytest.approx(0.1)
    cosine = Config(max_steps=100, warmup_steps=0, lr_decay="cosine")
    assert lr_factor(50, cosine) == pytest.approx(0.5) and lr_factor(100, cosine) == pytest.approx(0, abs=1e-12)
    factors = [lr_factor(s, cosine) for s in range(101)]
    assert factors == sorted(factors, reverse=True)
    assert lr_factor(99, Config(max_steps=100, warmup_steps=0, lr_decay="constant")) == 1


def test_averages_follow_the_weights_and_swap_back():
    torch.manual_seed(0)
    model = TTS(Config(text_encoder_name="random", width=32, layers=1, heads=2, text_encoder_width=32, text_encoder_heads=2,
                       text_encoder_layers=1))
    ema = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    start = {k: v.clone() for k, v in ema.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    update_ema(ema, model, 0.9, step=1000)
    for name, value in ema.items():
        torch.testing.assert_close(value, start[name] + 0.1)
    with averaged(model, ema):
        assert not model.training
        torch.testing.assert_close(model.no_text.data, start["no_text"] + 0.1)
    assert model.training
    torch.testing.assert_close(model.no_text.data, start["no_text"] + 1.0)
    torch.testing.assert_close(ema["no_text"], start["no_text"] + 0.1)


def test_muon_gets_the_blocks_matrices_and_adamw_the_rest():
    model = TTS(Config(text_encoder_name="random", train_text_encoder=True, width=32, layers=2, heads=2, text_encoder_width=32,
                       text_encoder_heads=2, text_encoder_layers=1))
    muon, adamw = ({id(p) for g in o.param_groups for p in g["params"]} for o in make_optimizers(model, model.cfg))
    names = {id(p): n for n, p in model.named_parameters()}
    assert muon | adamw == set(names) and not muon & adamw
    assert all(".block" in names[i] or names[i].startswith("text_blocks.") for i in muon)
    assert {names[i] for i in adamw} >= {"text_encoder.shared.weight", "decoder.inp.weight", "decoder.out.weight",
                                         "decoder.modulation.weight", "text_proj.weight"}


def test_muon_steps_as_torchs_does(monkeypatch):
    """Tall, wide and square matrices together, with torch's five quintics; torch's go through bfloat16, hence the tolerance."""
    monkeypatch.setattr(train, "QUINTICS", {3: ((3.4445, -4.7750, 2.0315),) * 5})
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((32, 16), (16, 32), (16, 16), (32, 16), (8, 8))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pairs = [(Muon(ours, 0.1, 0.05, 0.9), ours),
             (torch.optim.Muon(theirs, 0.1, 0.05, 0.9, adjust_lr_fn="match_rms_adamw"), theirs)]
    for step in range(3):
        for optimizer, weights in pairs:
            for n, p in enumerate(weights):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + n))
            optimizer.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=0.01)  # of updates of 0.02 a weight and step


@given(st.sampled_from([(16, 48), (192, 192), (192, 512), (256, 300), (257, 300), (512, 1024)]), st.integers(0, 9))
def test_what_muon_orthogonalises_has_singular_values_near_1(shape, seed):
    m, n = shape
    rng = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(k, m, generator=rng))[0] for k in shape)
    lowest = 0.02 if m <= 256 else 0.005
    spread = torch.logspace(0, -1, m)
    spread = (spread / spread.norm()).clamp(min=lowest)
    found = orthogonal((left * spread @ right.T)[None] * 7)[0]
    values = torch.linalg.svdvals(found)
    assert 0.85 < values.min() and values.max() < 1.15
    torch.testing.assert_close(left.T @ found @ right, torch.eye(m), atol=0.15, rtol=0)  # and the directions stay
    assert orthogonal(torch.zeros(1, m, n)).abs().max() == 0


def test_validation_repeats_and_does_not_depend_on_the_batch_size(demo_corpus):
    cfg = Config(text_encoder_name="random", width=32, layers=1, heads=2, text_encoder_width=32, text_encoder_heads=2,
                 text_encoder_layers=1, batch_size=8, val_num_samples=8)
    corpus = Corpus(str(demo_corpus), cfg)
    cfg.mel_mean, cfg.mel_std = corpus.mel_stats
    torch.manual_seed(0)
    model = TTS(cfg)
    values = []
    for batch_size in (8, 8, 3):
        cfg.batch_size = batch_size
        values.append(validation_loss(model, corpus, cfg, 0, 1, torch.device("cpu")))
    assert values[0] == values[1]
    for key in values[0]:
        assert values[2][key] == pytest.approx(values[0][key], rel=1e-5)
