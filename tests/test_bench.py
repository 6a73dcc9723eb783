"""The benchmark runs; what it measures is not tested."""
import re

import pytest
from conftest import ROOT

from common import UserError
from eval import bench

SMALL = ("--config configs/grammar.yaml --width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 "
         "--text_encoder_layers 1 --effective_batch_size 4 --batch_size 2 --device cpu --steps 1").split()


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
def test_two_configs_compared(demo_corpus, capsys):
    bench.main([*SMALL, "--against", "configs/grammar_baseline.yaml", "--data_dir", str(demo_corpus)])
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("configs/grammar.yaml: ") and second.startswith("configs/grammar_baseline.yaml: ")
    for line in (first, second):
        total, *parts = map(float, re.findall(r"([\d.]+) ms", line))
        assert len(parts) == len(bench.PARTS) and all(part in line for part in bench.PARTS)
        assert float(re.search(r"([\d,]+) frames/s", line)[1].replace(",", "")) > 0 and "padding waste" in line
    assert "ratio of frames/s" in last and "cpu, " in last


def test_too_few_steps_are_refused():
    with pytest.raises(UserError, match="--steps 0"):
        bench.main(["--steps", "0"])
