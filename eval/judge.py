"""The judges, which turn speech into text, and the counting of errors in it.

A judge has transcribe(wavs, cfg), normalise(text), a name, and a floor: its own error rates on recordings, or None.
"""
import dataclasses
import os

import jiwer
import numpy as np
import torch

import audio
from common import UserError, first_line, pick_device, progress, tell
from config import Config, load_yaml
from eval.ctc import fingerprint, load_ctc_judge

WHISPER_RATE = 16000  # Hz, of Whisper's input
LOOP = 2.4  # a text that zlib makes more than this many times smaller repeats itself (Whisper's own threshold)


class WhisperJudge:
    """openai-whisper, by a model's name or the path of its .pt file. Raises UserError if the package or model is missing, or
    if it does not know the language.
    """

    def __init__(self, name: str, device, language: str = "en"):
        try:
            import whisper
            from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer
            from whisper.tokenizer import LANGUAGES
        except ImportError as e:
            raise UserError(f"eval_judge: whisper needs a package that is not installed ({e.name}): pip install "
                            "openai-whisper, or set eval_judge: ctc") from None
        try:
            self.model = whisper.load_model(name, device=device)  # downloads it if needed, with a progress bar
        except Exception as e:  # unknown names, failed downloads and damaged files raise many types
            raise UserError(f"cannot load the Whisper model '{name}' ({type(e).__name__}: {first_line(e)[:160]}). Expected "
                            "a name such as base.en, which is downloaded once (145 MB), or the path of a .pt file; without "
                            "a network, set eval_whisper_model to such a path, or eval_judge to ctc") from None
        self.name, self.floor = f"whisper {os.path.basename(name)}", None
        if os.path.exists(name):  # a published name stands for its weights, whose SHA-256 Whisper checks
            self.name += f" {fingerprint(self.model)}"
        if language != "en" and not (self.model.is_multilingual and language in LANGUAGES):
            raise UserError(f"eval_language = {language!r}: the Whisper model '{name}' does not know it; expected a code "
                            "such as it, and a model of many languages such as base (those that end in .en know English)")
        self.language = {"language": language} if self.model.is_multilingual else {}
        self.name += "" if language == "en" else f" {language}"
        # Whisper's normaliser for other languages puts a space where a text ends in a sign
        basic = BasicTextNormalizer()
        self.normalise = EnglishTextNormalizer() if language == "en" else lambda text: " ".join(basic(text).split())

    def transcribe(self, wavs: list[np.ndarray], cfg: Config) -> list[str]:
        """Wavs, each (samples,) at cfg.sample_rate, to texts as Whisper writes them."""
        texts = []
        for wav in progress(wavs, desc="listening", unit="prompt"):
            wav = audio.resample(wav, cfg.sample_rate, WHISPER_RATE).astype(np.float32)
            # With timestamps, although most recordings have fewer errors without: if Whisper ends too early, only a
            # timestamp makes it go on from there (docs/costs.md). One by one: on a CPU a batch is no faster
            texts.append(self.hear(wav, fp16=self.model.device.type == "cuda", condition_on_previous_text=False))
        return texts

    def hear(self, wav: np.ndarray, **options) -> str:
        """The likeliest text. Only where Whisper falls into a loop ("push the push, push the push, …"), it is asked again at
        higher temperatures, as its authors do (arXiv 2212.04356, 4.5): one loop of 168 words cost 100 sentences 23 points.
        """
        device = self.model.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the default is all GPUs, also other ranks'
            torch.manual_seed(0)
            for temperature in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
                result = self.model.transcribe(wav, temperature=temperature, **options, **self.language)
                if all(segment["compression_ratio"] <= LOOP for segment in result["segments"]):
                    break
        return result["text"].strip()


def choose_judge(cfg: Config, device) -> str:
    """cfg.eval_judge; for "auto" what the run in cfg.out_dir has chosen, or else whisper if its model loads, or ctc."""
    if cfg.eval_judge != "auto":
        return cfg.eval_judge
    try:
        chosen = load_yaml(os.path.join(cfg.out_dir, "config.yaml")).get("eval_judge", "auto")
    except UserError:  # this is not a run, or not yet
        chosen = "auto"
    if chosen != "auto":
        return chosen
    try:
        load_judge(dataclasses.replace(cfg, eval_judge="whisper"), device)
    except UserError as e:
        tell(f"the judge is ctc, trained on the corpus itself, because {e}")
        return "ctc"
    return "whisper"


def load_judge(cfg: Config, device):
    """The judge that cfg.eval_judge names, or None for "none". An "auto" must be chosen before. Raises UserError."""
    if cfg.eval_judge == "auto":
        raise ValueError("choose_judge comes first")
    if cfg.eval_judge == "whisper":
        name = cfg.eval_whisper_device
        device = device if name == "auto" else pick_device(name)
        return WhisperJudge(cfg.eval_whisper_model, device, cfg.eval_language)
    return load_ctc_judge(cfg.data_dir, cfg, device) if cfg.eval_judge == "ctc" else None


def edit_counts(reference: str, hypothesis: str) -> list[int]:
    """Word errors, reference words, character errors and reference characters of two normalised texts."""
    counts = []
    for result in (jiwer.process_words(reference, hypothesis), jiwer.process_characters(reference, hypothesis)):
        wrong = result.substitutions + result.deletions
        counts += [wrong + result.insertions, wrong + result.hits]
    return counts


def listen(judge, texts: list[str], wavs: list, cfg: Config, kind: str = "") -> list[dict]:
    """For each text, what the judge hears in its wav: hypothesis, wer, cer and edits. `kind` precedes these names.

    All are None if there is no judge or no wav. The last three are None if normalising leaves nothing of the text.
    """
    order = sorted((i for i, wav in enumerate(wavs) if judge and wav is not None), key=lambda i: len(wavs[i]))
    heard = dict(zip(order, judge.transcribe([wavs[i] for i in order], cfg))) if order else {}  # by length: little padding
    rows = []
    for i, text in enumerate(texts):
        reference = judge.normalise(text) if i in heard else ""
        edits = edit_counts(reference, judge.normalise(heard[i])) if reference else None
        rows.append({f"{kind}hypothesis": heard.get(i), f"{kind}wer": edits and edits[0] / edits[1],
                     f"{kind}cer": edits and edits[2] / edits[3], f"{kind}edits": edits})
    return rows
