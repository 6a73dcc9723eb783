"""Speak prompts, listen, count the errors: in training every eval_interval steps, and for any checkpoint from here.

    python evaluator.py --ckpt RUN/latest.pt --prompts eval/prompts.txt --out_dir DIR
    python evaluator.py --ckpt .artifacts/local/demo/latest.pt --prompts test --num 128 --out_dir /tmp/demo_test
    python evaluator.py --ckpt RUN/latest.pt --prompts val --eval_steps 8 --eval_cfg_scale 3   # config fields are flags
    python evaluator.py --ckpt RUN/latest.pt --prompts val --recordings LJSpeech-1.1/wavs      # judge <utt_id>.wav too
    python evaluator.py --config configs/ljspeech.yaml --prompts test --recordings LJSpeech-1.1/wavs   # recordings alone
    python evaluator.py --compare DIR_A DIR_B                   # are B's error rates other than A's, on the same prompts?

DIR gets 000000.wav …, pictures of log-mels and alignment, wer.jsonl (a line a prompt), summary.json and summary.md.
"""
import dataclasses
import gc
import json
import os
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import jiwer
import numpy as np
import torch
import torch.distributed as dist

import audio
from checkpoint import load_checkpoint
from config import Config, UserError, first_line, from_flags, run_cli, split_flags, waiting
from data import Corpus
from eval import ctc
from eval.measures import alignment_scores, figures, interval, markdown, mel_cepstral_distortion, rate_draws
from eval.page import draw, write_page, write_text
from metric import warn
from model import TTS
from sample import pick_device, sample

WHISPER_RATE = 16000
COPIES = 8  # in training, the vocoder's copies of so many recordings: enough to hear what is the vocoder's fault


# --- prompts

class Prompt(NamedTuple):
    text: str
    utt_id: str | None = None  # of the corpus's utterance, where the prompt is one
    mel: np.ndarray | None = None  # its log-mel (frames, n_mels)


def load_prompts(cfg: Config, corpus: Corpus | None) -> list[Prompt]:
    """`eval_num_samples` prompts of cfg.eval_prompts: a deterministic sample, in their own order. Raises UserError."""
    source = cfg.eval_prompts
    if source in ("val", "test", "overfit"):
        corpus = corpus or Corpus(cfg.data_dir, cfg)
        rows = corpus.training_indices(cfg) if source == "overfit" else corpus.split(source, cfg)
        prompts = [(corpus.texts[i], i) for i in rows]
    else:
        try:
            lines = Path(source).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"eval_prompts: cannot read {source} ({e}); expected a text file with a prompt a line, or "
                            "val, test or overfit") from None
        prompts = [(line.strip(), None) for line in lines]
    prompts = [(text, i) for text, i in prompts if any(c.isalnum() for c in text)]
    if not prompts:
        raise UserError(f"eval_prompts: {source} holds no prompts; expected a text a line")
    rng = np.random.default_rng(cfg.seed)
    chosen = (prompts[n] for n in sorted(rng.permutation(len(prompts))[:cfg.eval_num_samples]))
    return [Prompt(text) if i is None else Prompt(text, corpus.ids[i], corpus.mel(i)) for text, i in chosen]


# --- judges

class WhisperJudge:
    """openai-whisper by name or local .pt. Raises UserError if the package or the model cannot be had."""

    def __init__(self, name: str, device):
        try:
            import whisper
            from whisper.normalizers import EnglishTextNormalizer
        except ImportError as e:
            raise UserError(f"eval_judge: whisper needs a package that is not installed ({e.name}): pip install "
                            "openai-whisper, or set eval_judge: ctc") from None
        cache = os.path.join(os.getenv("XDG_CACHE_HOME", os.path.join(os.path.expanduser("~"), ".cache")), "whisper")
        if name in whisper.available_models() and not os.path.exists(os.path.join(cache, f"{name}.pt")):
            warn(f"downloading Whisper's {name} (base.en: 145 MB) to {cache}, once")
        try:
            self.model = whisper.load_model(name, device=device)
        except Exception as e:  # unknown names, failed downloads and broken files raise many types
            raise UserError(f"cannot load the Whisper model '{name}' ({type(e).__name__}: {first_line(e)[:160]}). A name "
                            "such as base.en is downloaded once (145 MB, to ~/.cache/whisper); on a machine without "
                            "network put its .pt there or set eval_whisper_model to its path; or set eval_judge: ctc"
                            ) from None
        self.name, self.floor = f"whisper {os.path.basename(name)}", None
        self.normalise = EnglishTextNormalizer()

    def transcribe(self, wavs: list[np.ndarray], cfg: Config) -> list[str]:
        """Wavs (samples,) at cfg.sample_rate to texts, as Whisper writes them."""
        texts = []
        for wav in waiting(wavs, desc="listening", unit="prompt"):
            wav = audio.resample(wav, cfg.sample_rate, WHISPER_RATE).astype(np.float32)
            english = {"language": "en"} if self.model.is_multilingual else {}
            result = self.model.transcribe(wav, fp16=self.model.device.type == "cuda", temperature=0.0,
                                           condition_on_previous_text=False, **english)
            texts.append(result["text"].strip())
        return texts


def load_judge(cfg: Config, device):
    """What listens: an object with transcribe(wavs, cfg), normalise(text), name and floor; None for eval_judge: none."""
    if cfg.eval_judge == "none":
        return None
    if cfg.eval_judge == "whisper":
        return WhisperJudge(cfg.eval_whisper_model, device if cfg.eval_whisper_device == "auto"
                            else pick_device(cfg.eval_whisper_device))
    judge = ctc.load_judge(cfg.data_dir, cfg)
    judge.name, judge.normalise = "ctc", ctc.normalise_text
    return judge


def edit_counts(reference: str, hypothesis: str) -> list[int]:
    """Word errors, reference words, character errors, reference characters of two normalised texts."""
    return [count for part in (jiwer.process_words(reference, hypothesis), jiwer.process_characters(reference, hypothesis))
            for count in (part.substitutions + part.deletions + part.insertions,
                          part.substitutions + part.deletions + part.hits)]


def listen(judge, texts: list[str], wavs: list, cfg: Config, kind: str = "") -> list[dict]:
    """A prompt's fields of what the judge hears: hypothesis, wer, cer and edits, after `kind`. No judge, no wav: None."""
    order = sorted((i for i, wav in enumerate(wavs) if judge and wav is not None), key=lambda i: len(wavs[i]))
    heard = dict(zip(order, judge.transcribe([wavs[i] for i in order], cfg) if order else ()))  # like lengths pad little
    fields = []
    for i, text in enumerate(texts):
        reference = judge.normalise(text) if i in heard else ""
        edits = edit_counts(reference, judge.normalise(heard[i])) if reference else None
        fields.append({f"{kind}hypothesis": heard.get(i), f"{kind}wer": edits and edits[0] / edits[1],
                       f"{kind}cer": edits and edits[2] / edits[3], f"{kind}edits": edits})
    return fields


# --- the evaluation

def make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; name another out_dir") from None


def evaluate(model: TTS, cfg: Config, prompts: list[Prompt], out_dir, device, step: int, ckpt: str,
             rank: int = 0, world: int = 1, floors: bool = False, recordings: str | None = None) -> dict:
    """Speak prompts, write sounds and pictures, judge them; ranks share the work. Returns the summary, the same on all.

    With `floors` the judge also hears the recordings: their log-mels through the vocoder, and <utt_id>.wav of the folder
    `recordings`. Vocoder and judge are loaded for this and freed after. Raises UserError, on every rank alike, if they
    cannot be had or anything fails on any rank.
    """
    out = Path(out_dir)
    start = time.time()
    rows, judge, took, error = [], None, {"sampler": 0.0, "vocoder": 0.0}, None
    try:
        make_folder(out)
        mine, maps = list(range(rank, len(prompts), world)), []
        texts = [prompts[i].text for i in mine]
        mels = sample(model, texts, cfg.eval_steps, cfg.eval_cfg_scale, cfg.seed, batch_size=cfg.eval_batch_size, maps=maps,
                      progress=None if rank else "speaking")
        sampled = time.time()
        vocode = audio.load_vocoder(cfg.eval_vocoder, cfg.eval_vocoder_model, device, cfg)
        sounds = {"": [vocode(mel) for mel in waiting(mels, desc="vocoding", unit="prompt", disable=rank > 0)]}
        took = {"sampler": sampled - start, "vocoder": time.time() - sampled}
        real = [None if prompts[i].mel is None else np.asarray(prompts[i].mel, np.float32) for i in mine]
        sounds["vocoded"] = [vocode(torch.from_numpy(mel)) if mel is not None and (floors or i < COPIES) else None
                             for i, mel in zip(mine, real)]
        sounds["recording"] = [read_recording(recordings, prompts[i].utt_id, cfg) for i in mine]
        for kind, wavs in sounds.items():
            for i, wav in zip(mine, wavs):
                if wav is not None:
                    audio.write_wav(out / f"{i:06d}{kind and '_' + kind}.wav", wav, cfg.sample_rate)
        del vocode
        judge = load_judge(cfg, device)
        heard = listen(judge, texts, sounds[""], cfg)
        floor = [listen(judge, texts, sounds[kind], cfg, f"{kind}_") for kind in ("vocoded", "recording") if floors]
        for k, i in enumerate(mine):
            row = {"idx": i, "audio": f"{i:06d}.wav", "reference": texts[k]} | heard[k]
            row |= {"predicted_seconds": len(sounds[""][k]) / cfg.sample_rate,
                    "alignment": round(float(alignment_scores(maps[k])), 4)}
            pictures = {"mel": mels[k].numpy(), "real_mel": real[k], "alignment": maps[k]}
            row |= {f"{name}_png": draw(out / f"{i:06d}_{name}.png", values, cfg) for name, values in pictures.items()
                    if values is not None}
            if real[k] is not None:
                row |= {"utt_id": prompts[i].utt_id, "true_seconds": len(real[k]) * cfg.hop_length / cfg.sample_rate,
                        "mcd": round(mel_cepstral_distortion(mels[k].numpy(), real[k]), 4)}
            row |= {kind: f"{i:06d}_{kind}.wav" for kind in ("vocoded", "recording") if sounds[kind][k] is not None}
            for more in floor:
                row |= more[k]
            rows.append(row)
    except Exception as e:  # a judge that crashes on one rank must neither end the run nor leave the others waiting
        error = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {first_line(e)}"
        if not isinstance(e, (UserError, OSError)):
            traceback.print_exc()
    spoken = sum(row["predicted_seconds"] for row in rows)
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (rows, error))
        rows = sorted((row for part, _ in parts for row in part), key=lambda row: row["idx"])
        error = next((e for _, e in parts if e), None)
    if error:
        raise UserError(error)
    summary = {"step": step, "ckpt": ckpt, "prompts": cfg.eval_prompts, "count": len(rows)} | figures(rows) | {
               "judge": judge.name if judge else "none", "judge_floor": judge.floor if judge else None,
               "steps": cfg.eval_steps, "cfg_scale": cfg.eval_cfg_scale,
               "vocoder": audio.vocoder_kind(cfg.eval_vocoder, device), "seed": cfg.seed,
               "spoken_seconds": sum(row["predicted_seconds"] for row in rows),
               "sampler_rtf": took["sampler"] / max(spoken, 1e-9), "vocoder_rtf": took["vocoder"] / max(spoken, 1e-9),
               "total_seconds": time.time() - start}
    del judge
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if rank == 0:
        write_text(out / "wer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_text(out / "summary.json", json.dumps(summary, indent=1))
        write_text(out / "summary.md", markdown(summary))
        try:
            write_page(out)
        except Exception as e:  # the figures are there; a page is not worth losing them
            warn(f"no listening page in {out} ({type(e).__name__}: {first_line(e)})")
    return summary


def read_recording(folder: str | None, utt_id: str | None, cfg: Config) -> np.ndarray | None:
    """<utt_id>.wav of a folder at cfg.sample_rate; None where there is none. Raises AudioError for a broken one."""
    path = os.path.join(folder, f"{utt_id}.wav") if folder and utt_id else ""
    return audio.read_wav(path, cfg.sample_rate) if os.path.isfile(path) else None


def judge_recordings(cfg: Config, prompts: list[Prompt], folder: str, device) -> dict:
    """What the judge makes of the prompts' own recordings, <utt_id>.wav of `folder`: judge, count, wer and cer.

    Raises UserError if the judge cannot be had or nothing can be judged.
    """
    wavs = [read_recording(folder, p.utt_id, cfg) for p in prompts]
    judge = load_judge(cfg, device)
    rows = [row for row in listen(judge, [p.text for p in prompts], wavs, cfg) if row["edits"]]
    if not rows:
        raise UserError(f"no prompt with a recording in {folder} has a text that the judge {judge.name} can hear")
    edits = np.array([row["edits"] for row in rows]).sum(axis=0)
    return {"judge": judge.name, "count": len(rows), "wer": edits[0] / edits[1], "cer": edits[2] / edits[3]}


# --- two evaluations

def compare(folder_a: str, folder_b: str) -> str:
    """The paired difference of two evaluations' rates, on the prompts they share, with its interval. Raises UserError."""
    parts, judges = [], []
    for folder in (folder_a, folder_b):
        try:
            judges.append(json.loads((Path(folder) / "summary.json").read_text(encoding="utf-8"))["judge"])
            lines = (Path(folder) / "wer.jsonl").read_text(encoding="utf-8").strip().split("\n")
            rows = [json.loads(line) for line in lines]
            parts.append({row["reference"]: [int(n) for n in row["edits"]] for row in rows if row["edits"]})
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder} is not what an evaluation with a judge wrote ({type(e).__name__}: {first_line(e)}); "
                            "expected wer.jsonl and summary.json as evaluator.py writes them") from None
    shared = [text for text in parts[0] if text in parts[1]]
    if not shared:
        raise UserError(f"{folder_a} and {folder_b} share no judged prompt; evaluate both on the same --prompts and --num")
    if judges[0] != judges[1]:
        raise UserError(f"{folder_a} was judged by {judges[0]}, {folder_b} by {judges[1]}; evaluate both with one judge")
    a, b = (np.array([part[text] for text in shared]) for part in parts)
    lines = [f"A = {folder_a}, B = {folder_b}; {len(shared)} shared prompts, judge {judges[0]}; 95 % intervals, paired", "",
             "| | A | B | B - A |", "|---|---|---|---|"]
    for name, at in (("WER", 0), ("CER", 2)):
        rates = [part[:, at].sum() / part[:, at + 1].sum() for part in (a, b)]
        low, high = interval(rate_draws(b[:, at], b[:, at + 1]) - rate_draws(a[:, at], a[:, at + 1]))
        difference = f"{rates[1] - rates[0]:+.2%} ({low:+.2%} to {high:+.2%})"
        lines.append(f"| {name} | {rates[0]:.2%} | {rates[1]:.2%} | {difference} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    if argv[0] == "--compare":
        if len(argv) != 3:
            raise UserError(f"--compare: found {len(argv) - 1} folders, expected two that evaluations wrote")
        print(compare(*argv[1:]))
        return
    flags = split_flags(argv, extra=("ckpt", "prompts", "out_dir", "num", "device", "recordings"))
    if "ckpt" not in flags and "recordings" not in flags:
        raise UserError("--ckpt is missing; expected a checkpoint such as .artifacts/local/demo/latest.pt")
    path, device = flags.pop("ckpt", None), pick_device(flags.pop("device", "auto"))
    for short, field in (("prompts", "eval_prompts"), ("num", "eval_num_samples")):
        if short in flags:
            flags[field] = flags.pop(short)
    recordings, out_dir = flags.pop("recordings", None), flags.pop("out_dir", None)
    if path is None:
        cfg = from_flags(flags)
    else:
        model, ckpt = load_checkpoint(path, device)
        beside = Path(path if os.path.isdir(path) else Path(path).parent)  # an exported folder is a place of its own
        out_dir = out_dir or str(beside / "eval" / f"manual_{ckpt['step']:08d}")
        cfg = model.cfg = from_flags(flags, base=dataclasses.asdict(model.cfg))
    prompts = load_prompts(cfg, None)
    if recordings and not any(p.utt_id and os.path.isfile(os.path.join(recordings, f"{p.utt_id}.wav")) for p in prompts):
        names = next((f"such as {p.utt_id}.wav" for p in prompts if p.utt_id), "for the corpus's utterances: --prompts val")
        raise UserError(f"--recordings {recordings}: found no prompt's recording; expected files {names}")
    if path is None:
        if cfg.eval_judge == "none":
            raise UserError("eval_judge = 'none': nobody listens to the recordings; expected whisper or ctc")
        heard = judge_recordings(cfg, prompts, recordings, device)
        print(f"{heard['count']} recordings, judge {heard['judge']}: WER {heard['wer']:.2%}, CER {heard['cer']:.2%}")
        if out_dir:
            make_folder(Path(out_dir))
            write_text(Path(out_dir) / "recordings.json", json.dumps(heard))
        return
    summary = evaluate(model, cfg, prompts, out_dir, device, ckpt["step"], path, floors=True, recordings=recordings)
    for line in (Path(out_dir) / "wer.jsonl").read_text(encoding="utf-8").strip().split("\n")[:8]:
        row = json.loads(line)
        print(f"  {row['reference']}\n    -> {row['hypothesis']}")
    print("\n" + markdown(summary) + f"\n{out_dir}: {summary['count']} prompts" + (
        "" if not summary["judge_floor"] else f"; on recordings the judge has CER {summary['judge_floor']['cer']:.2%}"))


if __name__ == "__main__":
    run_cli(main)
