"""Judges: counting errors, listening, loading. Training the ctc judge is tested with the demo corpus."""
import dataclasses
import zlib

import numpy as np
import pytest
import torch
import whisper

from common import UserError
from config import Config
from eval import ctc
from eval.judge import LOOP, WhisperJudge, choose_judge, edit_counts, listen, load_judge

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
        return {"text": " a text ", "segments": []}
    judge.model.transcribe, judge.language = transcribe, {}
    assert judge.transcribe([np.zeros(22050, np.float32)], CFG) == ["a text"]
    assert not asked.get("without_timestamps") and asked["temperature"] == 0 and not asked["condition_on_previous_text"]


def test_whisper_leaves_a_loop():
    """An untrained Whisper repeats itself at temperature 0. At a higher one it does not, and says the same each time."""
    judge = WhisperJudge.__new__(WhisperJudge)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        judge.model = whisper.model.Whisper(whisper.model.ModelDimensions(80, 1500, 8, 1, 1, 51864, 100, 8, 1, 1)).eval()
        torch.nn.init.normal_(judge.model.decoder.positional_embedding)  # Whisper leaves it as the memory was
        judge.language, wavs = {}, [np.random.default_rng(0).uniform(-0.1, 0.1, 16000).astype(np.float32)]
    loop = judge.model.transcribe(wavs[0], temperature=0.0, fp16=False)
    assert max(segment["compression_ratio"] for segment in loop["segments"]) > LOOP
    heard, again = (judge.transcribe(wavs, dataclasses.replace(CFG, sample_rate=16000)) for _ in range(2))
    assert heard == again and len(zlib.compress(heard[0].encode())) * LOOP >= len(heard[0].encode()) > 0


def test_whisper_is_asked_for_the_language(tmp_path):
    sizes = dict(n_mels=80, n_audio_ctx=1500, n_audio_state=8, n_audio_head=1, n_audio_layer=1, n_text_ctx=448,
                 n_text_state=8, n_text_head=1, n_text_layer=1)
    for name, n_vocab in (("many.pt", 51865), ("english.pt", 51864)):
        model = whisper.model.Whisper(whisper.model.ModelDimensions(n_vocab=n_vocab, **sizes))
        torch.save({"dims": vars(model.dims), "model_state_dict": model.state_dict()}, tmp_path / name)
    italian = WhisperJudge(str(tmp_path / "many.pt"), "cpu", "it")
    asked = {}
    italian.model.transcribe = lambda wav, **options: asked.update(options) or {"text": "", "segments": []}
    italian.transcribe([np.zeros(22050, np.float32)], CFG)
    assert asked["language"] == "it" and italian.name.endswith(" it")
    assert italian.normalise(" Premi 1, però. ") == "premi 1 però"
    assert WhisperJudge(str(tmp_path / "english.pt"), "cpu").normalise("It's fifty two.") == "it is 52"
    for name, language in (("english.pt", "it"), ("many.pt", "xx")):
        with pytest.raises(UserError, match=f"eval_language = '{language}': the Whisper model '.*{name}' does not know it"):
            WhisperJudge(str(tmp_path / name), "cpu", language)


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


def test_auto_is_whisper_if_it_loads_and_stays_what_the_run_chose(tmp_path, capsys):
    weights = whisper.model.Whisper(whisper.model.ModelDimensions(80, 1500, 8, 1, 1, 51864, 448, 8, 1, 1))
    torch.save({"dims": dataclasses.asdict(weights.dims), "model_state_dict": weights.state_dict()}, tmp_path / "whisper.pt")
    here = Config(eval_judge="auto", out_dir=str(tmp_path), eval_whisper_model=str(tmp_path / "whisper.pt"))
    without = dataclasses.replace(here, eval_whisper_model=str(tmp_path / "none.pt"))
    assert choose_judge(here, torch.device("cpu")) == "whisper" and capsys.readouterr().out == ""
    assert choose_judge(without, torch.device("cpu")) == "ctc" and "ctc, trained on the corpus itself, because cannot load" in capsys.readouterr().out
    assert choose_judge(dataclasses.replace(without, eval_judge="none"), "cpu") == "none"
    for chosen, cfg in (("ctc", here), ("whisper", without)):  # a resumed run keeps its judge, whatever can be loaded now
        (tmp_path / "config.yaml").write_text(f"eval_judge: {chosen}\n")
        assert choose_judge(cfg, torch.device("cpu")) == chosen


def test_a_position_of_the_large_recogniser_has_two_symbols():
    """Its symbols have the rate of the small one's, and do not depend on the batch."""
    model, mels = ctc.Recogniser(80, 16, stride=4).eval(), torch.randn(2, 37, 80)
    mels[1, 21:] = 0
    scores, lengths = model(mels, torch.tensor([37, 21]))
    assert lengths.tolist() == [19, 11] and scores.shape == (2, 20, len(ctc.ALPHABET) + 1)
    torch.testing.assert_close(model(mels[1:, :21], torch.tensor([21]))[0][0, :11], scores[1, :11], atol=1e-4, rtol=1e-4)
    assert ctc.Recogniser(80)(mels, torch.tensor([37, 21]))[1].tolist() == [19, 11]
