"""The speedrun's script: what a run's score is, and what it refuses. The runs themselves are no matter for tests."""
import importlib.util
from pathlib import Path

import pytest

from config import UserError

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("records_run", ROOT / "records" / "run.py")
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)


def metrics(*rates):
    rows = [{"step": 5, "train/loss": 1.0}]
    return rows + [{"step": 10 * n, "eval/cer": rate, "time/train_sec": 30.0 * n, "time/eval_sec": 6.0} for n, rate in enumerate(rates, 1)]


def test_the_score_is_the_training_time_of_the_first_evaluation_at_the_target():
    found = records.time_to_target(metrics(0.3, 0.05, 0.01), "eval/cer", 0.05)
    assert found == {"minutes": 1.0, "step": 20, "rate": 0.05, "train_minutes": 1.5, "eval_minutes": pytest.approx(0.3)}
    never = records.time_to_target(metrics(0.3, 0.06), "eval/cer", 0.05)
    assert never["minutes"] is None and never["rate"] == 0.06 and never["train_minutes"] == 1.0
    with pytest.raises(UserError, match="eval_interval"):
        records.time_to_target(metrics(), "eval/cer", 0.05)
    line = records.row("demo-cpu", "name", "idea", [found, found | {"minutes": 3.0}, found | {"minutes": 2.0}], "2026-01-01")
    assert line == "| demo-cpu | **2.00** | 1.00 (5.0% at 20), 3.00 (5.0% at 20), 2.00 (5.0% at 20) | idea | 2026-01-01 | [log](name/) |"
    assert "| not reached | 1.00 (5.0% at 20), 1.00 (6.0% at 20) |" in records.row("t", "n", "i", [found, never], "d")


def test_mistakes_are_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "HERE", tmp_path)
    (tmp_path / "taken").mkdir()
    for flags, complaint in ((["--name", "taken"], "exists already"), (["--name", "new", "--seeds", "0"], "--seeds 0")):
        with pytest.raises(UserError, match=complaint):
            records.main(["demo-cpu", "--idea", "x", *flags])
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
