"""tests/soak.py with few kills, and that it would notice what it is there for."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import soak
import torch

ROOT = Path(__file__).resolve().parents[1]


def test_three_kills_change_neither_a_run_nor_a_corpus():
    done = subprocess.run([sys.executable, "tests/soak.py", "--kills", "3", "--quick", "--seed", "3"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training: kill 1/3" in done.stdout and "in the midst of ckpt.tmp" in done.stdout
    assert "preparation: kill 3/3" in done.stdout and "in the midst of mel_shards" in done.stdout
    assert "bit for bit" in done.stdout and "byte-identical" in done.stdout


def run_folder(folder: Path, step: int = 8) -> Path:
    """What a kill in the midst of a checkpoint write leaves."""
    folder.mkdir()
    for name in (f"ckpt_step_{step:08d}.pt", "latest.pt"):
        torch.save({"model": {"w": torch.zeros(1000)}, "config": {}, "step": step}, folder / name)
    rows = [{"step": s, "time": s, "train/loss": 1 / s} for s in range(1, 10)] + [{"step": 8, "val/flow_loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10, "ti')
    for name in ("config.yaml", "lock", "runs.jsonl", "ckpt.tmp"):
        (folder / name).write_text("")
    return folder


@pytest.mark.parametrize("spoil, complaint", [
    (lambda run: None, None),
    (lambda run: (run / "latest.pt").unlink(), None),
    (lambda run: (run / "latest.pt").write_bytes((run / "latest.pt").read_bytes()[:-100]), "cannot be read as a checkpoint"),
    (lambda run: (run / "ckpt_step_00000008.pt").write_bytes(b""), "cannot be read as a checkpoint"),
    (lambda run: (run / "ckpt_step_00000008.pt").rename(run / "ckpt_step_00000004.pt"), "is of step 8"),
    (lambda run: (run / "metrics.jsonl.tmp").write_text(""), "temporary files"),
    (lambda run: (run / "ckpt.pt.1234").write_text(""), "ckpt.pt.1234"),
    (lambda run: [(run / f"ckpt_step_{s:08d}.pt").write_text("") for s in (1, 2, 3)], "more checkpoints"),
    (lambda run: (run / "metrics.jsonl").open("a").write('me": 1}\n{"step": 9, "train/loss": 2}\n'), "train/loss of step 9 twice"),
    (lambda run: (run / "metrics.jsonl").open("a").write('\n{"step": 11, "train/loss": 2}\n'), "holds the line"),
])
def test_what_a_kill_must_not_leave_is_noticed(tmp_path, spoil, complaint):
    run = run_folder(tmp_path / "run")
    spoil(run)
    if complaint:
        with pytest.raises(soak.Violation, match=complaint):
            soak.read_run(run)
    else:
        assert soak.read_run(run) == (8 if (run / "latest.pt").exists() else 0)
        with pytest.raises(soak.Violation, match="temporary files"):
            soak.read_run(run, may_be_writing=False)


def test_equal_means_every_bit():
    state = {"state": {0: {"step": torch.tensor(3.0), "m": torch.tensor([0.1, float("nan")])}}, "groups": [{"lr": 0.1, "f": None}]}
    assert soak.equal(state, {"state": {0: {"step": torch.tensor(3.0), "m": torch.tensor([0.1, float("nan")])}},
                              "groups": [{"lr": 0.1, "f": None}]})
    for other in ({**state, "groups": [{"lr": 0.1}]}, {**state, "groups": [{"lr": 0.1, "f": 0}]}, {**state, "more": 1},
                  {**state, "state": {0: {**state["state"][0], "m": torch.tensor([0.1 + 1e-8, float("nan")])}}},
                  {**state, "state": {0: {**state["state"][0], "step": torch.tensor(3)}}}):
        assert not soak.equal(state, other)
