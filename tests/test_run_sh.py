"""run.sh: the commands it starts, its refusals, one installer at a time, and a job on two machines that loses a process."""
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import audio
from checkpoint import read_checkpoint
from common import UserError
from config import AUDIO_FIELDS, Config, to_yaml
from corpus import Corpus
from espeak import espeak_wav

SMALL = ("--config configs/grammar.yaml --gpus 0 --width 32 --heads 2 --layers 2 --text_encoder_width 32 "
         "--text_encoder_heads 2 --text_encoder_layers 1 --effective_batch_size 8 --batch_size 8 --log_interval 1 "
         "--val_interval 0 --eval_interval 0 --checkpoint_interval 4 --warmup_steps 2 --no_wandb").split()
STEPS = 12
STEERING = ("SLURM", "PET_", "TORCHELASTIC_", "NNODES", "RDZV_", "MAX_RESTARTS", "DRY_RUN", "NUM_GPUS", "BATCH_SIZE")
SLURM = {"SLURM_JOB_ID": "4123", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
         "SLURM_STEP_NODELIST": "node[07-08]"}


def environment(**ours):
    env = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | ours


def together(cases):
    """Run (variables, command) pairs at the same time. Returns [(status, stdout, stderr)]."""
    programs = [subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(**env), text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for env, command in cases]
    try:
        streams = [program.communicate(timeout=600) for program in programs]
        return [(program.returncode, *both) for program, both in zip(programs, streams)]
    finally:
        for program in programs:
            program.kill()


@pytest.fixture
def script(run_sh):
    return run_sh or pytest.skip("run.sh would install packages first; run the tests by ./run.sh test")


# --- the command

@pytest.fixture
def scontrol(tmp_path):
    """A PATH with a scontrol that knows one list of machines, in place of Slurm's."""
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames node[07-08]" ] || { echo "bad list" >&2; exit 1; }\n'
                       "printf 'node07\\nnode08\\n'\n")
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def split(stdout):
    """A printed command as (program, its flags, train.py's arguments)."""
    words = shlex.split(stdout)
    cut = words.index("train.py")
    flags = [f for f in words[:cut] if f.startswith("--") and f != "--"]
    program = " ".join(words[:words.index(flags[0])] if flags else words[:cut])
    return program, {f: f if f == "--standalone" else words[words.index(f) + 1] for f in flags}, words[cut + 1:]


@pytest.mark.slow
def test_the_command_follows_the_environment(script, demo_corpus, scontrol):
    job = [script, *SMALL, "--data_dir", demo_corpus]
    by_hand = {"NNODES": "2", "RDZV_ENDPOINT": "10.0.0.1:29500"}
    cases = {
        "one process": ({}, job), "two ranks": ({}, [*job, "--nproc", "2"]), "restarts": ({"MAX_RESTARTS": "2"}, job),
        "from a voice": ({}, [script, "--init_from", "voices/joe"]),
        "by hand": (by_hand, job), "named": (by_hand | {"RDZV_ID": "mine", "MAX_RESTARTS": "0"}, [*job, "--resume", "x.pt"]),
        "srun": (SLURM | {"PATH": scontrol}, job), "srun, but": (SLURM | by_hand, job),
        "srun on one": (SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1"}, job),
        "sbatch": ({"SLURM_JOB_ID": "4123", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2"}, job)}
    got = {}
    results = together((env | {"DRY_RUN": "1"}, command) for env, command in cases.values())
    for name, (status, out, err) in zip(cases, results):
        assert status == 0, (name, err)
        noted = name in ("by hand", "srun", "srun, but")
        assert ("adding --resume latest" in err) == noted and err.count("\n") == noted, (name, err)
        got[name] = split(out)
    arguments = [str(word) for word in job[1:]]
    for name in ("one process", "srun on one", "sbatch"):
        assert got[name] == ("python", {}, arguments), name
    assert got["from a voice"] == ("python", {}, ["--config", "configs/finetune.yaml", "--init_from", "voices/joe"])
    torchrun, machines = "python -m torch.distributed.run", "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 python -m torch.distributed.run"
    common = {"--nproc-per-node": "1", "--shutdown-timeout": "300",
              "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
    alone = common | {"--standalone": "--standalone"}
    two = alone | {"--nproc-per-node": "2", "--max-restarts": "0"}
    assert got["two ranks"] == (torchrun, two, [*arguments, "--nproc", "2"])
    assert got["restarts"] == (torchrun, alone | {"--max-restarts": "2"}, arguments)
    meet = common | {"--nnodes": "2", "--rdzv-backend": "c10d", "--rdzv-endpoint": "10.0.0.1:29500", "--rdzv-id": "grammar",
                     "--max-restarts": "3"}
    assert got["by hand"] == (machines, meet, [*arguments, "--resume", "latest"])
    assert got["named"] == (machines, meet | {"--rdzv-id": "mine", "--max-restarts": "0"}, [*arguments, "--resume", "x.pt"])
    slurm = meet | {"--rdzv-id": "4123-grammar"}
    assert got["srun"] == (machines, slurm | {"--rdzv-endpoint": "node07:16230"}, [*arguments, "--resume", "latest"])
    assert got["srun, but"] == (machines, slurm, [*arguments, "--resume", "latest"])


@pytest.mark.slow
def test_mistakes_are_one_line_and_status_2(script, demo_corpus, scontrol, tmp_path):
    job = [script, *SMALL, "--data_dir", demo_corpus, "--out_dir", tmp_path / "run"]
    two = {"NNODES": "2", "RDZV_ENDPOINT": "127.0.0.1:29500"}
    cases = [
        ({"NNODES": "0"}, job, "not a positive integer"), ({"NNODES": "two"}, job, "not a positive integer"),
        (two | {"NNODES": "2:4"}, job, "no range: the number of ranks"), ({"NNODES": "2"}, job, "not host:port"),
        *((two | {"RDZV_ENDPOINT": wrong}, job, "not host:port") for wrong in ("node07", ":1", "a:b", "a:70000")),
        ({"MAX_RESTARTS": "-1"}, job, "MAX_RESTARTS = -1"), (two | {"MAX_RESTARTS": "x"}, job, "MAX_RESTARTS = x"),
        (two | {"NNODES": "4"}, [*job, "--nproc", "4"], "batch_size = 8 is less than one utterance for each of 16 ranks, 4 on"),
        (two, [*job, "--data_dir", tmp_path / "none"], "first run once: ./run.sh prepare --config configs/grammar.yaml"),
        (SLURM | {"PATH": scontrol, "SLURM_STEP_NODELIST": "else"}, job, "(bad list); set RDZV_ENDPOINT"),
        *([] if shutil.which("scontrol") else [(SLURM, job, "(command not found); set RDZV_ENDPOINT")]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, job, "srun starts 8 run.sh on 2 machine(s)")]
    for (env, _, expected), (status, out, err) in zip(cases, together((e | {"DRY_RUN": "1"}, c) for e, c, _ in cases)):
        assert (status, out) == (2, "") and expected in err, (env, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (env, err)
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_torchrun_tells_processes_that_it_restarted_them(script, demo_corpus, tmp_path):
    """By this train.py knows that the run in its folder is its own: see test_ranks_that_torchrun_started_again_go_on."""
    job = [script, *SMALL, "--data_dir", demo_corpus, "--gpus", "0"]
    (_, printed, _), = together([({"MAX_RESTARTS": "1", "DRY_RUN": "1"}, job)])
    command = shlex.split(printed)
    (tmp_path / "program.py").write_text("import os, sys\ncount = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
                                         f"open({str(tmp_path)!r} + '/' + count, 'w')\nsys.exit(count == '0')\n")
    command = [sys.executable, *command[1:command.index("train.py")], tmp_path / "program.py"]
    (status, _, err), = together([({}, command)])
    assert status == 0 and {p.name for p in tmp_path.iterdir()} == {"program.py", "0", "1"}, err


# --- set-up and corpus

@pytest.mark.slow
def test_the_tests_flag_fast_leaves_the_slow_ones_out(script, tmp_path):
    """Further words go to pytest."""
    (tmp_path / "test_x.py").write_text("import pytest\n\ndef test_quick():\n    pass\n\n@pytest.mark.slow\ndef test_slow():\n    pass\n")
    words = ["-n0", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml", "--noconftest", tmp_path / "test_x.py"]
    (status, out, err), = together([({}, [script, "test", "--fast", *words])])
    assert status == 0 and "1 passed, 1 deselected" in out, (out, err)


@pytest.mark.slow
def test_prepare_makes_the_corpus_and_trains_nothing(script, demo_corpus, tmp_path):
    maker, corpus = tmp_path / "prepare.py", tmp_path / "corpus"
    maker.write_text("import json, shutil, sys\n"
                     f"shutil.copytree({str(demo_corpus)!r}, out := sys.argv[sys.argv.index('--out') + 1])\n"
                     "json.dump(sys.argv[1:], open(out + '/argv', 'w'))\n")
    job = [script, "prepare", *SMALL, "--data_dir", corpus, "--prepare_script", maker, "--out_dir", tmp_path / "run"]
    for expected in (f"no corpus at {corpus} yet: running {maker}\n", ""):
        (status, out, err), = together([({"NNODES": "2"}, [*job, "--gpus", "8"])])  # which only training needs
        assert (status, out, err) == (0, f"the corpus is at {corpus}\n", expected)
        assert (corpus / "metadata" / "dataset_stats.json").exists() and not (tmp_path / "run").exists()
    handed_on = {"out": corpus} | {field: getattr(Config(), field) for field in AUDIO_FIELDS}
    assert json.loads((corpus / "argv").read_text()) == [word for k, v in handed_on.items() for word in (f"--{k}", str(v))]


@pytest.mark.slow
def test_the_corpus_has_the_log_mel_of_the_config_and_of_the_flags(script, tmp_path):
    """By a fragment, the user's own file behind it, and flags over both. A mistake is one line."""
    own, texts = tmp_path / "own.yaml", ["A red lamp.", "A green lamp.", "Nobody came.", "Good morning."]
    own.write_text("prepare_script: data/folder/prepare.py\nf_min: 20\nrun_name: own\n")
    (tmp_path / "wavs").mkdir()
    for n, text in enumerate(texts):
        audio.write_wav(tmp_path / "wavs" / f"{n}.wav", espeak_wav(text, 24000), 24000)
        (tmp_path / "wavs" / f"{n}.txt").write_text(text)
    job = [script, "prepare", "--source", tmp_path / "wavs", f"--config=configs/bigvgan24k.yaml,{own}", "--n-mels", "40"]
    good, bad = together([({}, [*job, "--data_dir", tmp_path / "corpus", "--f_max=7600"]),
                          ({}, [*job, "--data_dir", tmp_path / "bad", "--f_max=13000"])])
    assert good[0] == 0, good
    log_mel = dict(sample_rate=24000, n_mels=40, f_min=20.0, f_max=7600.0)
    Corpus(tmp_path / "corpus", Config(**log_mel)).check()
    with pytest.raises(UserError, match=r"sample_rate is 24000 \(config: 22050\), n_mels is 40 \(config: 80\), f_min is 20.0"):
        Corpus(tmp_path / "corpus", Config())
    assert bad == (2, "", "error: f_max = 13000.0: must lie above f_min = 20.0 and not above half the sample rate\n")
    # a run that starts from a voice takes that voice's, and not that of the voice which its config names
    (tmp_path / "voice").mkdir()
    (tmp_path / "voice" / "config.yaml").write_text(to_yaml(Config(**log_mel)))
    job = [script, "prepare", "--source", tmp_path / "wavs", "--init_from", tmp_path / "voice", "--data_dir", tmp_path / "own"]
    (status, _, err), = together([({}, job)])
    assert status == 0, err
    Corpus(tmp_path / "own", Config(**log_mel)).check()


@pytest.mark.slow
def test_a_second_run_sh_waits_while_one_installs(tmp_path):
    """The first one is this test: it holds the lock, and then leaves the mark of a finished installation."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    for name in ("requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_text("")
    (tmp_path / "config.py").write_text("print('started')\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    with open(tmp_path / ".venv" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = subprocess.Popen([tmp_path / "run.sh", "--help"], env=environment(PIP_NO_INDEX="1"), text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            assert second.stderr.readline() == "another run.sh is installing into .venv: waiting for it to end\n"
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=0.5)
            mark = subprocess.run([tmp_path / "run.sh", "installed"], capture_output=True, text=True)
            assert mark.returncode == 1
            (tmp_path / ".venv" / "installed").write_text(mark.stdout)
            fcntl.flock(lock, fcntl.LOCK_UN)
            out, err = second.communicate(timeout=60)
        finally:
            second.kill()
    assert second.returncode == 0 and err == "" and out.endswith("started\n")


def test_changed_requirements_and_moved_folders_need_an_installation(tmp_path):
    here = tmp_path / "here"
    (here / ".venv").mkdir(parents=True)
    shutil.copy(ROOT / "run.sh", here)
    for name in ("requirements.txt", "pyproject.toml"):
        (here / name).write_text("")

    def installed(folder):
        return subprocess.run([folder / "run.sh", "installed"], stdout=subprocess.PIPE, text=True)
    (here / ".venv" / "installed").write_text(installed(here).stdout)
    assert installed(here).returncode == 0
    assert installed(here.rename(tmp_path / "there")).returncode == 1
    assert installed((tmp_path / "there").rename(here)).returncode == 0
    for name in ("requirements.txt", "pyproject.toml"):
        (here / name).write_text("#\n")
        assert installed(here).returncode == 1
        (here / name).write_text("")


# --- two machines

def free_port():
    """A port below those that the system hands out, so that no program of this machine gets it by chance."""
    for port in range(15000 + os.getpid() % 10000, 32000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise OSError("no free port")


def losses(out):
    """[(step, loss)] in the order of the run's metrics."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


# Two ranks that share the imports, which cost more than this training
TWO_RANKS = """
import os, sys, train
from transformers import T5EncoderModel
os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(int(os.fork() == 0))
train.main(sys.argv[1:])
"""
# Ranks must leave without Python's shutdown: gloo's threads are still alive then, and sometimes one aborted the process.
# DIE: rank 0 dies by kill -9 while it writes the checkpoint of step 8, so that the run goes on from that of step 4.
HOOKS = """
import atexit, os, signal
replace = os.replace
def replace_or_die(source, target, **options):
    if str(target).endswith("ckpt_step_00000008.pt") and "DIE" in os.environ and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **options)
if "WORLD_SIZE" in os.environ:
    atexit.register(print, "shut down")
    os.replace = replace_or_die
"""


@pytest.mark.slow
def test_two_machines_survive_the_death_of_a_process(run_sh, demo_corpus, tmp_path):
    """Two agents on the loopback address. Rank 0 dies, and the job goes on as if nothing had happened."""
    (tmp_path / "sitecustomize.py").write_text(HOOKS)
    job, endpoint = [*SMALL, "--data_dir", demo_corpus, "--max_steps", str(STEPS), "--out_dir"], f"127.0.0.1:{free_port()}"
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    (status, out, err), = together([(env, [sys.executable, "-c", TWO_RANKS, *job, tmp_path / "one"])])
    assert status == 0, err
    assert "done at step" in out and "shut down" not in out
    agent = [run_sh, *job, tmp_path / "two"] if run_sh else [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--max-restarts", "3", "--",
        "train.py", *job, tmp_path / "two", "--resume", "latest"]
    env = {"NNODES": "2", "RDZV_ENDPOINT": endpoint, "PET_LOCAL_ADDR": "127.0.0.1", "PYTHONPATH": str(tmp_path), "DIE": "1"}
    agents = together([(env, agent)] * 2)
    assert [status for status, _, _ in agents] == [0, 0], agents
    assert "from step 4 " in "".join(out for _, out, _ in agents)
    assert losses(tmp_path / "two") == losses(tmp_path / "one") and [step for step, _ in losses(tmp_path / "two")] == list(range(1, STEPS + 1))
    one, two = (read_checkpoint(str(tmp_path / run / "latest.pt")) for run in ("one", "two"))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys() and len(one[part]) > 10
        for name in one[part]:
            assert torch.equal(one[part][name], two[part][name]), name
