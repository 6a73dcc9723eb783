"""run.sh: what it would start, its refusals, one installer at a time, and a job on two machines that loses a process."""
import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import train
from checkpoint import read_checkpoint

SMALL = ("--config configs/demo.yaml --gpus 0 --width 32 --heads 2 --layers 2 --text_encoder_width 32 "
         "--text_encoder_heads 2 --text_encoder_layers 1 --effective_batch_size 8 --batch_size 8 --log_interval 1 "
         "--val_interval 0 --eval_interval 0 --checkpoint_interval 4 --loader_workers 0 --warmup_steps 2 --no_wandb").split()
STEPS = 48
STEERING = ("SLURM", "PET_", "TORCHELASTIC_", "NNODES", "RDZV_", "MAX_RESTARTS", "DRY_RUN", "NUM_GPUS", "BATCH_SIZE")
SLURM = {"SLURM_JOB_ID": "4123", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
         "SLURM_STEP_NODELIST": "node[07-08]"}


def environment(**ours):
    env = {k: v for k, v in os.environ.items() if not k.startswith(STEERING)}
    return env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | ours


def together(cases):
    """Run commands side by side, each with its variables; [(status, stdout, stderr)]."""
    programs = [subprocess.Popen([str(word) for word in command], cwd=ROOT, env=environment(**env), text=True,
                                 stdout=subprocess.PIPE, stderr=subprocess.PIPE) for env, command in cases]
    try:
        said = [program.communicate(timeout=600) for program in programs]
        return [(program.returncode, *streams) for program, streams in zip(programs, said)]
    finally:
        for program in programs:
            program.kill()


@pytest.fixture
def script(run_sh):
    return run_sh or pytest.skip("run.sh would install packages first; run the tests by ./run.sh test")


# --- what it would start

@pytest.fixture
def scontrol(tmp_path):
    """A folder with a scontrol that knows one list of machines, as Slurm's would name them."""
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


def test_the_command_follows_the_environment(script, demo_corpus, scontrol):
    job = [script, *SMALL, "--data_dir", demo_corpus]
    by_hand = {"NNODES": "2", "RDZV_ENDPOINT": "10.0.0.1:29500"}
    cases = {
        "one process": ({}, job), "two ranks": ({}, [*job, "--nproc", "2"]), "restarts": ({"MAX_RESTARTS": "2"}, job),
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
    common = {"--nproc-per-node": "1", "--shutdown-timeout": "300",
              "--signals-to-handle": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"}
    alone = common | {"--standalone": "--standalone"}
    two = alone | {"--nproc-per-node": "2", "--max-restarts": "0"}
    assert got["two ranks"] == ("torchrun", two, [*arguments, "--nproc", "2"])
    assert got["restarts"] == ("torchrun", alone | {"--max-restarts": "2"}, arguments)
    meet = common | {"--nnodes": "2", "--rdzv-backend": "c10d", "--rdzv-endpoint": "10.0.0.1:29500", "--rdzv-id": "demo",
                     "--max-restarts": "3"}
    torchrun = "env TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun"
    assert got["by hand"] == (torchrun, meet, [*arguments, "--resume", "latest"])
    assert got["named"] == (torchrun, meet | {"--rdzv-id": "mine", "--max-restarts": "0"}, [*arguments, "--resume", "x.pt"])
    slurm = meet | {"--rdzv-id": "4123-demo"}
    assert got["srun"] == (torchrun, slurm | {"--rdzv-endpoint": "node07:16230"}, [*arguments, "--resume", "latest"])
    assert got["srun, but"] == (torchrun, slurm, [*arguments, "--resume", "latest"])


def test_mistakes_are_one_line_and_status_2(script, demo_corpus, scontrol, tmp_path):
    job = [script, *SMALL, "--data_dir", demo_corpus, "--out_dir", tmp_path / "run"]
    two = {"NNODES": "2", "RDZV_ENDPOINT": "127.0.0.1:29500"}
    cases = [
        ({"NNODES": "0"}, job, "not a positive integer"), ({"NNODES": "two"}, job, "not a positive integer"),
        (two | {"NNODES": "2:4"}, job, "one number; the batch divides"), ({"NNODES": "2"}, job, "not host:port"),
        *((two | {"RDZV_ENDPOINT": wrong}, job, "not host:port") for wrong in ("node07", ":1", "a:b", "a:70000")),
        ({"MAX_RESTARTS": "-1"}, job, "MAX_RESTARTS = -1"), (two | {"MAX_RESTARTS": "x"}, job, "MAX_RESTARTS = x"),
        (two | {"NNODES": "3"}, job, "batch_size = 8 does not divide among 3 ranks"),
        (two | {"NNODES": "4"}, [*job, "--nproc", "4"], "does not divide among 16 ranks, 4 on each of 4 machines"),
        (two, [*job, "--data_dir", tmp_path / "none"], "first run once: ./run.sh prepare --config configs/demo.yaml"),
        (SLURM | {"PATH": scontrol, "SLURM_STEP_NODELIST": "else"}, job, "(bad list); set RDZV_ENDPOINT"),
        *([] if shutil.which("scontrol") else [(SLURM, job, "(command not found); set RDZV_ENDPOINT")]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "8"}, job, "srun starts 8 run.sh on 2 machine(s)")]
    for (env, _, expected), (status, out, err) in zip(cases, together((e | {"DRY_RUN": "1"}, c) for e, c, _ in cases)):
        assert (status, out) == (2, "") and expected in err, (env, err)
        assert err.startswith("error: ") and err.count("\n") == 1, (env, err)
    assert not (tmp_path / "run").exists() and not (tmp_path / "none").exists()


# --- set-up and corpus

def test_prepare_makes_the_corpus_and_trains_nothing(script, demo_corpus, tmp_path):
    maker, corpus = tmp_path / "prepare.py", tmp_path / "corpus"
    maker.write_text(f"import shutil, sys\nshutil.copytree({str(demo_corpus)!r}, sys.argv[sys.argv.index('--out') + 1])\n")
    job = [script, "prepare", *SMALL, "--data_dir", corpus, "--prepare_script", maker, "--out_dir", tmp_path / "run"]
    for said in (f"no corpus at {corpus} yet: running {maker}\n", ""):
        (status, out, err), = together([({"NNODES": "2"}, [*job, "--gpus", "8"])])  # which are training's affair
        assert (status, out, err) == (0, f"the corpus is at {corpus}\n", said)
        assert (corpus / "metadata" / "dataset_stats.json").exists() and not (tmp_path / "run").exists()


def test_a_second_run_sh_waits_while_one_installs(run_sh, tmp_path):
    """The first one is this test: it holds the lock, and then leaves what an installation leaves."""
    shutil.copy(ROOT / "run.sh", tmp_path)
    (tmp_path / "requirements.txt").write_text("")
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
                second.wait(timeout=1)
            mark = "cat requirements.txt <(sed -n 's/^bigvgan=\"\\(.*\\)\"$/\\1/p' run.sh) | cksum > .venv/installed"
            subprocess.run(["bash", "-c", mark], cwd=tmp_path, check=True)
            fcntl.flock(lock, fcntl.LOCK_UN)
            out, err = second.communicate(timeout=60)
        finally:
            second.kill()
    assert second.returncode == 0 and err == "" and out.endswith("started\n")


# --- two machines

def free_port():
    """A port below those that the system hands out, so that no program of this machine gets it by chance."""
    for port in range(15000 + os.getpid() % 10000, 32000):
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("", port))
            return port
    raise OSError("no free port")


def processes(marker):
    """{pid: environment} of this machine's processes that were started with TEST_MARKER=marker."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (folder / "environ").read_bytes().decode(errors="replace")
            variables = dict(variable.partition("=")[::2] for variable in text.split("\0"))
            if variables.get("TEST_MARKER") == marker:
                found[int(folder.name)] = variables
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def losses(out):
    """[(step, loss)] in the order in which the run's metrics have them."""
    rows = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]


def kill_rank_0_and_finish(commands, env, out, tmp_path):
    """Start a job's agents, kill its rank 0 with -9 once there is a checkpoint, wait for the end; what they printed.

    Rank 0 prints a line a step, into a pipe of 4 KiB that nobody reads until the kill: it cannot come to the end before.
    """
    marker, agents = str(tmp_path), []
    env = environment(TEST_MARKER=marker, **env)
    with open(tmp_path / "stderr", "w+") as log:
        try:
            for command in commands:
                agents.append(subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=log,
                                               pipesize=4096))
            deadline = time.monotonic() + 600
            while not (out / "latest.pt").exists():
                assert time.monotonic() < deadline and all(a.poll() is None for a in agents), (log.seek(0), log.read())
                time.sleep(0.01)
            (worker,) = [pid for pid, variables in processes(marker).items()
                         if variables.get("RANK") == "0" and parent(pid) in [a.pid for a in agents]]
            os.kill(worker, signal.SIGKILL)
            with ThreadPoolExecutor() as readers:
                said = "".join(readers.map(lambda a: a.communicate(timeout=600)[0], agents))
            assert [a.returncode for a in agents] == [0] * len(agents), (log.seek(0), log.read())
            return said
        finally:
            while left := processes(marker):
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                for a in agents:
                    a.wait()


def assert_same_run(one, two):
    assert losses(two) == losses(one) and [step for step, _ in losses(two)] == list(range(1, STEPS + 1))
    one, two = (read_checkpoint(str(folder / "latest.pt")) for folder in (one, two))
    for part in ("model", "ema"):
        assert one[part].keys() == two[part].keys() and len(one[part]) > 10
        for name in one[part]:
            assert torch.equal(one[part][name], two[part][name]), name


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the process to kill in /proc")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@needs_proc
def test_two_machines_survive_the_death_of_a_process(run_sh, demo_corpus, tmp_path):
    """Two agents on the loopback address; rank 0 is killed; the job goes on from latest.pt as if nothing had happened."""
    job = [*SMALL, "--data_dir", str(demo_corpus), "--max_steps", str(STEPS), "--out_dir"]
    undisturbed = [*TORCHRUN, "--standalone", "--nproc-per-node", "2", "--", "train.py", *job, str(tmp_path / "one")]
    endpoint = f"127.0.0.1:{free_port()}"
    agent = [run_sh, *job, str(tmp_path / "two")] if run_sh else [
        *TORCHRUN, "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--max-restarts", "3", "--",
        "train.py", *job, str(tmp_path / "two"), "--resume", "latest"]
    env = {"NNODES": "2", "RDZV_ENDPOINT": endpoint, "PET_LOCAL_ADDR": "127.0.0.1"}
    # Ranks leave without Python's teardown: gloo's threads are alive still, and now and then one aborted the process
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\nif 'RANK' in os.environ: atexit.register(print, 'torn down')\n")
    (status, out, err), = together([({"PYTHONPATH": str(tmp_path)}, undisturbed)])
    assert status == 0, err
    assert "done at step" in out and "torn down" not in out
    assert "from step " in kill_rank_0_and_finish([agent, agent], env, tmp_path / "two", tmp_path)
    assert_same_run(tmp_path / "one", tmp_path / "two")


@needs_proc
def test_one_machine_with_restarts_takes_up_its_own_run(script, demo_corpus, tmp_path, monkeypatch):
    """No --resume was given: under a restarted torchrun the run that is there is this one."""
    job = [*SMALL, "--data_dir", str(demo_corpus), "--max_steps", str(STEPS), "--out_dir"]
    monkeypatch.chdir(ROOT)
    train.main([*job, str(tmp_path / "undisturbed")])
    job = [script, *job, str(tmp_path / "killed")]
    assert "from step " in kill_rank_0_and_finish([job], {"MAX_RESTARTS": "1"}, tmp_path / "killed", tmp_path)
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
