"""The benchmark runs, for two configs in turn; what it measures is no matter for tests."""
import json
import os
import re
from pathlib import Path

import pytest
from matplotlib.image import imread

from config import UserError
from eval.bench import PARTS, main

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("--width 32 --heads 2 --layers 1 --text_encoder_width 32 --text_encoder_heads 2 --text_encoder_layers 1 "
         "--effective_batch_size 8 --batch_size 4 --device cpu --steps 1").split()


def test_two_configs_in_turn(demo_corpus, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    main(["--config", "configs/demo.yaml", "--against", "configs/demo_baseline.yaml", "--data_dir", str(demo_corpus), *SMALL])
    first, second, last = capsys.readouterr().out.splitlines()
    assert first.startswith("configs/demo.yaml: ") and second.startswith("configs/demo_baseline.yaml: ")
    for line in (first, second):
        _, *parts = map(float, re.findall(r"([\d.]+) ms", line))
        assert len(parts) == len(PARTS) and [part in line for part in PARTS]
        assert float(re.search(r"([\d,]+) frames/s", line)[1].replace(",", "")) > 0 and "padding waste" in line
    assert "ratio of frames/s" in last and "cpu, " in last


def test_how_the_cost_grows(demo_corpus, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(ROOT)
    flags = ["--config", "configs/demo.yaml", "--data_dir", str(demo_corpus), "--loader_workers", "0", *SMALL]
    main([*flags, "--scaling", str(tmp_path / "scaling.png")])
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"frames an utterance", "utterances a step", "width", "ranks"}
    assert list(found["utterances a step"]) == ["2", "4", "8", "16"] and list(found["width"]) == ["16", "32", "64", "128"]
    assert {"1", "2"} <= set(found["ranks"]) or os.cpu_count() == 1
    assert all(ms > 0 for points in found.values() for ms in points.values())
    assert imread(tmp_path / "scaling.png").shape[1] > 3 * imread(tmp_path / "scaling.png").shape[0]


def test_mistakes(monkeypatch, tmp_path):
    for picture in ("scaling", "scaling.xyz", str(tmp_path / "none" / "scaling.png")):
        with pytest.raises(UserError, match="--scaling.*png or .svg"):
            main(["--device", "cpu", "--scaling", picture])
    for steps in ("0", "few"):
        with pytest.raises(UserError, match="--steps"):
            main(["--steps", steps])
