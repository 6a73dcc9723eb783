"""Judges: counting errors, listening, loading. Training the ctc judge is tested with the demo corpus."""
import dataclasses

import numpy as np
import pytest
import torch
import whisper

from common import UserError
from config import Config
from eval import ctc
from eval.judge import WhisperJudge, edit_counts, listen, load_judge

CFG = Config(eval_judge="ctc")


def talkative_judge() -> dict:
    """The content of a judge_ctc.pt that was not trained: random weights, large enough to recognise many symbols."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ctc.Recogniser(80, 16)
    for p in model.parameters():
        p.data.mul_(2)
    return {"model": model.state_dict(), "width": 16, "mel_mean": -2.0, "mel_std": 2.0,
            "floor": {"cer": 0.1, "wer": 0.2, "recordings": 6}}


def noise(seed: int, samples: int) -> np.ndarray:
    """Noise whose loudness changes, in which that judge hears a text of its own for each seed."""
    rng = np.random.default_rng(seed)
    return (rng.uniform(-1, 1, samples) * rng.uniform(0, 0.5, samples // 1000 + 1).repeat(1000)[:samples]).astype(np.float32)


def judge_of(saved: dict) -> ctc.CTCJudge:
    model = ctc.Recogniser(80, saved["width"])
    model.load_state_dict(saved["model"])
    return ctc.CTCJudge(model, saved)


def test_whisper_keeps_its_timestamps():
    """Without them it lost 54 of 61 words of a recording, after a sentence that it took for the end."""
    judge, asked = WhisperJudge.__new__(WhisperJudge), {}
    judge.model = whisper.model.Whisper(whisper.model.ModelDimensions(80, 1500, 8, 1, 1, 51864, 448, 8, 1, 1))

    def transcribe(wav, **options):
        asked.update(options)
        return {"text": " a text "}
    judge.model.transcribe = transcribe
    assert judge.transcribe([np.zeros(22050, np.float32)], CFG) == ["a text"]
    assert not asked.get("without_timestamps") and asked["temperature"] == 0 and not asked["condition_on_previous_text"]


def test_judges_with_other_weights_have_other_names():
    saved = talkative_judge()
    assert judge_of(saved).name == judge_of(saved).name
    other = saved | {"model": saved["model"] | {"out.bias": saved["model"]["out.bias"] + 1e-6}}
    assert judge_of(other).name != judge_of(saved).name and judge_of(other).name.startswith("ctc ")


@pytest.mark.parametrize("reference, hypothesis, counts", [
    ("the red fox ran", "the red box ran", [1, 4, 1, 15]), ("a dog", "dog", [1, 2, 2, 5]), ("dog", "a dog", [1, 1, 2, 3]),
    ("a dog", "", [2, 2, 5, 5]), ("a dog", "a dog", [0, 2, 0, 5])])
def test_errors_counted_by_hand(reference, hypothesis, counts):
    assert edit_counts(reference, hypothesis) == counts


def test_what_a_judge_hears_does_not_depend_on_the_other_wavs():
    judge, wavs = judge_of(talkative_judge()), [noise(*job) for job in enumerate((22050, 9000, 5000, 30000))]
    texts = ["One fox ran.", "Two foxes", "A wav is missing.", "…"]
    together = listen(judge, texts, [*wavs[:2], None, wavs[3]], CFG)
    assert len({row["hypothesis"] for row in together}) == 4
    assert together[2] == dict.fromkeys(("hypothesis", "wer", "cer", "edits"))
    assert together[3]["hypothesis"] and together[3]["edits"] is None  # the judge cannot recognise an ellipsis
    for i in (0, 1, 3):
        assert together[i] == listen(judge, texts[i:i + 1], wavs[i:i + 1], CFG)[0]
        assert judge.transcribe(wavs, CFG)[i] == together[i]["hypothesis"]
    edits = edit_counts("one fox ran", together[0]["hypothesis"])
    assert listen(judge, texts[:1], wavs[:1], CFG, "vocoded_")[0] == {
        "vocoded_hypothesis": together[0]["hypothesis"], "vocoded_edits": edits, "vocoded_wer": edits[0] / 3,
        "vocoded_cer": edits[2] / 11}
    assert listen(None, texts[:1], wavs[:1], CFG) == [dict.fromkeys(("hypothesis", "wer", "cer", "edits"))]


def test_whisper_normaliser_and_refusals(tmp_path):
    from whisper.normalizers import EnglishTextNormalizer
    normalise = EnglishTextNormalizer()
    assert edit_counts(normalise("Fifty two men."), normalise("52 men"))[::2] == [0, 0]
    (tmp_path / "broken.pt").write_bytes(b"not a model")
    for name in ("no-such-model", str(tmp_path / "broken.pt")):
        with pytest.raises(UserError, match=f"{name}.*eval_whisper_model"):
            load_judge(Config(eval_judge="whisper", eval_whisper_model=name), torch.device("cpu"))
    assert load_judge(dataclasses.replace(CFG, eval_judge="none"), "cpu") is None
