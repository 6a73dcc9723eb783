"""
python -m pytest tests/test_skill.py

The commands of the research workflow (SKILL.md), as they are written there, in a folder where everything is small.
"""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from demo import prepare

import data
import evaluator
import metric
import model
import sample
import train
from eval import ctc

SKILL = ROOT / ".agents" / "skills" / "tts-research" / "SKILL.md"
MAINS = {"train.py": train.main, "evaluator.py": evaluator.main, "sample.py": sample.main, "model.py": model.main,
         "data.py": data.main, "metric.py": metric.main}
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
val_interval: 2
eval_interval: 2
eval_num_samples: 1
eval_steps: 1
overfit_first_n_samples: 8
no_wandb: true
"""


def test_its_header_is_complete():
    header = yaml.safe_load(SKILL.read_text().split("---")[1])
    assert header["name"] == SKILL.parent.name and len(header["description"]) < 1024
    assert "SKILL.md" in (ROOT / "README.md").read_text()


@pytest.mark.slow
def test_its_commands_work(tmp_path, monkeypatch, capsys):
    """In this process, because it has imported everything. test_run_sh.py shows that run.sh gives its flags to train.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ctc, "STEPS", 2)
    prepare.main("--out data/demo_bigvgan --train 24 --held-out 4 --workers 1".split())
    shutil.copytree(ROOT / "configs", "configs")
    for config in Path("configs").glob("grammar*.yaml"):
        config.write_text(config.read_text() + TINY)  # the last value of a key counts
    commands, used = "".join(re.findall(r"```bash\n(.*?)```", SKILL.read_text(), re.DOTALL)).splitlines(), set()
    for command in commands:
        program, *words = shlex.split(command.replace("./run.sh", "python train.py"))
        if program == "ruff":
            subprocess.run([Path(sys.executable).parent / "ruff", *words], cwd=ROOT, check=True)
        elif words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).exists() for word in words[2:] if not word.startswith("-")), command
        else:
            assert not MAINS[words[0]](words[1:]), command
            used.add(words[0])
    assert used == set(MAINS) and len(commands) >= 10
    assert all(Path(path).exists() for path in (".artifacts/local/idea/index.html", "idea.png", "idea.wav"))
    names = set(re.findall(r"`((?:train|val|eval|optim|time)/\w+)`", SKILL.read_text()))
    assert len(names) > 10 and names <= set().union(*metric.read_metrics(Path(".artifacts/local/idea/metrics.jsonl")))
    assert "| generated |" in Path(".artifacts/idea_test/summary.md").read_text() and "| B - A |" in capsys.readouterr().out


def test_it_reports_on_the_test_split_once():
    assert SKILL.read_text().count("--prompts test") == 1
