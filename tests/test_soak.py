"""
python -m pytest tests/test_soak.py

tests/soak.py with few kills, and proof that it notices what a kill must not leave.
"""
import json
import subprocess
import sys

import pytest
import soak
import torch
from conftest import ROOT


@pytest.mark.slow
def test_kills_change_neither_a_run_nor_a_corpus():
    done = subprocess.run([sys.executable, "tests/soak.py", "--kills", "2", "--quick", "--seed", "3"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training: kill 1/2 hit a checkpoint's write" in done.stdout and "bit for bit" in done.stdout
    assert "preparation: kill 1/2 hit a shard's write" in done.stdout and "byte-identical" in done.stdout


@pytest.fixture
def run(tmp_path):
    """What a kill leaves that hits a run while it writes a checkpoint."""
    for name in ("ckpt_step_00000008.pt", "latest.pt"):
        torch.save({"model": {"w": torch.zeros(1000)}, "config": {}, "step": 8}, tmp_path / name)
    rows = [{"step": s, "time": s, "train/loss": 1 / s} for s in range(1, 10)] + [{"step": 8, "val/flow_loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "ti')
    for name in ("config.yaml", "lock", "runs.jsonl", "ckpt_step_00000012.pt.tmp"):
        (tmp_path / name).write_text("")
    return tmp_path


@pytest.mark.parametrize("step", [0, 8])
def test_what_a_kill_may_leave_is_accepted(run, step):
    if step == 0:
        (run / "latest.pt").unlink()
    assert soak.read_run(run) == step
    with pytest.raises(soak.Violation, match="temporary files"):
        soak.read_run(run, may_be_writing=False)


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("latest.pt", slice(-100), "cannot be read as a checkpoint"), ("ckpt_step_00000008.pt", b"", "cannot be read as a checkpoint"),
    ("ckpt_step_00000004.pt", slice(None), "is of step 8"), ("latest.pt.tmp", b"", "temporary files"),
    ("ckpt.pt.1234", b"", "unknown files .*ckpt.pt.1234"),
    ("metrics.jsonl", b'{"step": 9, "train/loss": 1}\n{"step": 9, "train/loss": 2}\n', "train/loss of step 9 twice"),
    ("metrics.jsonl", b'{"step": 9, "tra\n{"step": 11, "train/loss": 2}\n', "broken line")])
def test_what_a_kill_must_not_leave_is_noticed(run, name, content, complaint):
    (run / name).write_bytes((run / "latest.pt").read_bytes()[content] if isinstance(content, slice) else content)
    with pytest.raises(soak.Violation, match=complaint):
        soak.read_run(run)


def test_old_checkpoints_that_pile_up_are_noticed(run):
    for step in (1, 2, 3):
        (run / f"ckpt_step_{step:08d}.pt").touch()
    with pytest.raises(soak.Violation, match="more checkpoints"):
        soak.read_run(run)
