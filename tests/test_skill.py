"""The research workflow's commands, as they are written, in a copy of this folder where everything is small."""
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import data
import evaluator
import metric
import model
import sample
import train
from config import Config
from eval import ctc

ROOT = Path(__file__).resolve().parents[1]
SKILL = ROOT / ".agents" / "skills" / "tts-research" / "SKILL.md"
TINY = """
width: 32
heads: 2
layers: 1
text_blocks: 1
text_encoder_width: 32
text_encoder_heads: 2
text_encoder_layers: 1
max_steps: 2
log_interval: 1
val_interval: 0
eval_interval: 2
eval_num_samples: 2
eval_steps: 1
overfit_first_n_samples: 8
loader_workers: 0
no_wandb: true
"""


@pytest.fixture
def small_copy(run_sh, demo_corpus, tmp_path):
    if not run_sh:
        pytest.skip("run.sh would install packages first; run the tests by ./run.sh test")
    copy = tmp_path / "copy"
    keep = shutil.ignore_patterns(".venv", ".git", ".artifacts", "*_bigvgan", "*_cache", ".hypothesis", "__pycache__", "examples")
    shutil.copytree(ROOT, copy, ignore=keep)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    shutil.copytree(demo_corpus, copy / "data" / "demo_bigvgan")
    for config in (copy / "configs").glob("demo*.yaml"):
        config.write_text(config.read_text() + TINY)  # of a key that comes twice the last one counts
    return copy


def test_its_head_is_what_assistants_read():
    head = yaml.safe_load(SKILL.read_text().split("---")[1])
    assert head["name"] == SKILL.parent.name and len(head["description"]) < 1024
    assert "SKILL.md" in (ROOT / "README.md").read_text()


def test_its_commands_work(small_copy, monkeypatch, capsys):
    """Programs in Python run in this process, which has imported what they need; the others by a shell."""
    mains = {"train.py": train.main, "evaluator.py": evaluator.main, "sample.py": sample.main, "model.py": model.main,
             "data.py": data.main, "metric.py": metric.main}
    monkeypatch.setattr(ctc, "STEPS", 2)
    monkeypatch.chdir(small_copy)
    ctc.load_judge("data/demo_bigvgan", Config())  # so that run.sh's process need not train one
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTEST_ADDOPTS": "-k accounting"}
    commands = "".join(re.findall(r"```bash\n(.*?)```", SKILL.read_text(), re.DOTALL)).splitlines()
    assert len(commands) >= 10
    used = set()
    for command in commands:
        program, *words = shlex.split(command)
        if program == "python" and words[0] in mains:
            assert not mains[words[0]](words[1:]), command
            used.add(words[0])
            continue
        done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    assert used == set(mains)
    assert Path(".artifacts/local/idea/index.html").exists() and Path("idea.wav").exists()
    assert "| generated |" in Path(".artifacts/idea_test/summary.md").read_text() and "| B - A |" in capsys.readouterr().out


def test_the_names_that_it_tells_to_watch_are_logged():
    code = "".join((ROOT / name).read_text() for name in ("train.py", "evaluator.py", "metric.py"))
    names = re.findall(r"`((?:train|val|eval|optim|time)/\w+)`", SKILL.read_text())
    assert len(names) > 6
    for name in names:
        assert f'"{name}"' in code, name
