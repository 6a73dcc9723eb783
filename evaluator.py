"""Evaluate a voice: synthesize prompts, let a judge listen, count the errors. Training does it every eval_interval steps.

    python evaluator.py --ckpt RUN/latest.pt --prompts eval/prompts.txt --num 128 --out_dir DIR
    python evaluator.py --ckpt RUN/latest.pt --prompts val --recordings LJSpeech-1.1/wavs      # judge <utt_id>.wav too
    python evaluator.py --config configs/ljspeech.yaml --prompts test --recordings LJSpeech-1.1/wavs   # only recordings
    python evaluator.py --compare DIR_A DIR_B     # the difference in error rates on the prompts that both evaluations share

All config fields are flags, such as --eval_steps 8 --eval_cfg_scale 3.
DIR gets 000000.wav …, pictures of log-mels and attention, wer.jsonl (a line per prompt), summary.json, .md, index.html.
"""
import dataclasses
import json
import os
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import audio
from checkpoint import link_checkpoint, load_checkpoint, numbered_checkpoint
from common import UserError, first_line, make_folder, pick_device, progress, run_cli, tell, warn, write_file
from config import Config, from_flags, split_flags
from corpus import RECORDINGS, Corpus
from data import fitting_rows, training_rows
from distributed import Ranks, on_all_ranks
from eval import measures, voice
from eval.judge import choose_judge, listen, load_judge
from eval.page import write_page, write_run_page
from eval.picture import save_map
from metric import Metrics
from model import TTS
from normalise import as_spoken
from sample import fits, read_pieces, sample
from text import has_words
from text_encoder import byte_tokens
from train_vocoder import train_if_missing
from vocoder import load_vocoder, vocoder_name

# Number of prompts whose recordings the vocoder copies during training, and whose sound is measured (DNSMOS: 0.3 s a wav)
COPIES = 8


class Prompt(NamedTuple):
    text: str
    utt_id: str | None = None  # set if the prompt is an utterance of the corpus
    mel: np.ndarray | None = None  # the utterance's log-mel (frames, n_mels) float32
    spoken: str = ""  # the words to speak, if they are not the text


def file_prompt(text: str, cfg: Config, characters: str) -> Prompt:
    """A prompt that is not an utterance of the corpus. `characters` are those of the voice's texts."""
    spoken = as_spoken(text, characters) if cfg.normalise else text
    return Prompt(text, spoken=spoken if spoken != text else "")


def load_prompts(cfg: Config, tokenise=byte_tokens, corpus: Corpus | None = None, characters: str = "") -> list[Prompt]:
    """eval_num_samples prompts of cfg.eval_prompts, drawn with cfg.seed and in their original order. Raises UserError.

    With cfg.normalise they are spoken as `as_spoken` says. `characters` are the voice's; default: the corpus's.
    """
    source = cfg.eval_prompts
    if source in ("val", "test", "overfit"):
        corpus = corpus or Corpus(cfg.data_dir, cfg)
        overfit = source == "overfit"
        rows = training_rows(corpus, cfg, tokenise) if overfit else fitting_rows(corpus, source, cfg, tokenise)[0]
        prompts = [(corpus.texts[i], i) for i in rows]
    else:
        try:
            prompts = [(line.strip(), None) for line in Path(source).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"eval_prompts: cannot read {source} ({e}); expected val, test, overfit or a file") from None
    prompts = [(text, i) for text, i in prompts if has_words(text)]
    if not prompts:
        raise UserError(f"eval_prompts: found no prompts in {source}; expected a text per line")
    chosen = sorted(np.random.default_rng(cfg.seed).permutation(len(prompts))[:cfg.eval_num_samples])
    characters = characters or (corpus.spoken_characters if corpus else "")
    return [file_prompt(text, cfg, characters) if i is None
            else Prompt(text, corpus.ids[i], corpus.mel(i).astype(np.float32), corpus.spoken[i])
            for text, i in (prompts[n] for n in chosen)]


def read_recordings(folder: str | None, prompts: list[Prompt], cfg: Config) -> list[np.ndarray | None]:
    """Each prompt's <utt_id>.wav in `folder` at cfg.sample_rate, or None. Raises UserError if `folder` has none of them.

    Without a folder they are those that the corpus has kept.
    """
    kept = os.path.join(cfg.data_dir, RECORDINGS)
    paths = [os.path.join(folder or kept, f"{p.utt_id}.wav") if p.utt_id else "" for p in prompts]
    if folder and not any(map(os.path.isfile, paths)):
        names = next((f"such as {p.utt_id}.wav" for p in prompts if p.utt_id), "for the corpus's utterances: --prompts val")
        raise UserError(f"--recordings {folder}: found no prompt's recording; expected files {names}")
    return [audio.read_wav(path, cfg.sample_rate) if os.path.isfile(path) else None for path in paths]


def prepare(cfg: Config, corpus: Corpus, tokenise, ranks: Ranks, evaluated: bool) -> list[Prompt]:
    """The prompts of a run. Loads vocoder and judge once, so that a missing download is an error now and not hours later.

    If the run was `evaluated` before, only warn: a missing judge should not stop a long training. Raises UserError.
    """
    prompts = load_prompts(cfg, tokenise, corpus)
    try:
        if ranks.rank == 0:
            train_if_missing(cfg, ranks.device)
        load_vocoder(cfg, ranks.device)
        if ranks.rank == 0:
            judge = load_judge(cfg, ranks.device)
            for path in sorted(Path(cfg.out_dir).glob("eval/step_*/summary.json"))[-1:] if judge else ():
                if (before := json.loads(path.read_text(encoding="utf-8"))["judge"]) != judge.name:
                    warn(f"the judge was {before} and is {judge.name} now: error rates from before and after this cannot be "
                         "compared, nor can best.pt be trusted")
    except UserError as e:
        if not evaluated:
            raise
        warn(f"evaluations will fail: {e}")
    return prompts


def agree_on_judge(cfg: Config, ranks: Ranks) -> None:
    """Let an eval_judge of "auto" become the judge that rank 0 chooses, on all ranks, if the run has evaluations."""
    if not cfg.eval_interval:
        return
    chosen = [choose_judge(cfg, ranks.device) if ranks.rank == 0 else None]
    if ranks.world > 1:
        dist.broadcast_object_list(chosen)
    cfg.eval_judge = chosen[0]


def evaluate(model: TTS, cfg: Config, prompts: list[Prompt], out_dir, ranks: Ranks, step: int, ckpt: str,
             floors: bool = False, recordings: str | None = None, sounds: int = COPIES) -> dict:
    """Synthesize the prompts, judge them, and write wavs, pictures, figures and a page to out_dir. Returns the summary.

    With `floors` the judge also hears the prompts' own log-mels through the vocoder, and their files in the folder
    `recordings`. The figures of sound are those of the first `sounds` prompts. The ranks share the prompts. An error on one
    rank is raised on all, so that none waits for another forever.
    """
    start, out = time.time(), Path(out_dir)
    with on_all_ranks(ranks):
        mine = dict(list(enumerate(prompts))[ranks.rank::ranks.world])  # this rank's prompts by their index
        rows, facts = evaluate_part(model, cfg, mine, make_folder(out), ranks, floors, recordings, sounds)
    torch.cuda.empty_cache()  # of the vocoder and the judge
    if ranks.world > 1:
        parts = [None] * ranks.world
        dist.all_gather_object(parts, rows)
        rows = sorted(sum(parts, []), key=lambda row: row["idx"])
    voice.compare_voices(rows)
    summary = {"step": step, "ckpt": ckpt, "prompts": cfg.eval_prompts, "count": len(rows)} | measures.figures(rows) | facts
    summary |= {"steps": cfg.eval_steps, "cfg_scale": cfg.eval_cfg_scale, "temperature": cfg.eval_temperature,
                "seed": cfg.seed, "vocoder": vocoder_name(cfg, ranks.device),
                "spoken_seconds": sum(row["predicted_seconds"] for row in rows), "total_seconds": time.time() - start}
    with on_all_ranks(ranks):
        if ranks.rank == 0:
            write_file(out / "wer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            write_file(out / "summary.json", json.dumps(summary, indent=1))
            write_file(out / "summary.md", measures.markdown(summary))
            write_page(out)
    return summary


def speak(model: TTS, texts: list[str], cfg: Config, desc: str | None) -> tuple[list, list]:
    """The log-mel (frames, n_mels) of each text, and the list of its pieces' attention maps.

    A text that is too long for one piece is cut and spoken with pauses, as sample.py does. Another project's model brings a
    `speak` of its own (records/peers).
    """
    if hasattr(model, "speak"):
        return model.speak(texts, cfg)
    pieces = [piece._replace(line=n) for n, text in enumerate(texts)
              for piece in read_pieces(model, [[text]], whole=fits(model, text))]
    maps, mels = [], [[] for _ in texts]
    spoken = sample(model, [piece.text for piece in pieces], cfg.eval_steps, cfg.eval_cfg_scale, cfg.seed,
                    cfg.eval_temperature, batch_size=cfg.eval_batch_size, attention_maps=maps, desc=desc)
    for piece, mel in zip(pieces, spoken):
        pause = round(piece.pause * cfg.sample_rate / cfg.hop_length)
        mels[piece.line] += [mel, torch.full((pause, cfg.n_mels), audio.LOG_MEL_FLOOR)]
    of_text = [[of_piece for piece, of_piece in zip(pieces, maps) if piece.line == n] for n in range(len(texts))]
    return [torch.cat(parts[:-1]) for parts in mels], of_text


def evaluate_part(model: TTS, cfg: Config, prompts: dict[int, Prompt], out: Path, ranks: Ranks, floors: bool,
                  recordings: str | None, sounds: int) -> tuple[list[dict], dict]:
    """Evaluate one rank's prompts, given by their index. Returns their rows of wer.jsonl, and facts for the summary."""
    texts, words = zip(*((p.text, p.spoken or p.text) for p in prompts.values()), strict=True) if prompts else ((), ())
    rows = [{"idx": i, "reference": text} | ({"spoken": said} if said != text else {})
            for i, text, said in zip(prompts, texts, words)]
    wavs = {"recording": read_recordings(recordings, list(prompts.values()), cfg) if floors else [None] * len(rows)}
    start = time.time()
    mels, attention_maps = speak(model, words, cfg, None if ranks.rank else "synthesizing")
    sampled = time.time()
    vocode = load_vocoder(cfg, ranks.device)
    wavs["audio"] = [vocode(mel) for mel in progress(mels, desc="vocoding", unit="prompt", disable=ranks.rank > 0)]
    vocoded = time.time()
    wavs["vocoded"] = [vocode(torch.from_numpy(prompt.mel)) if prompt.mel is not None and (floors or i < COPIES) else None
                       for i, prompt in prompts.items()]
    del vocode  # frees the GPU's memory for the judge
    for kind in wavs:  # write the wavs before the judge is loaded, which may fail
        for row, wav in zip(rows, wavs[kind]):
            if wav is not None:
                row[kind] = f"{row['idx']:06d}.wav" if kind == "audio" else f"{row['idx']:06d}_{kind}.wav"
                audio.write_wav(out / row[kind], wav, cfg.sample_rate)
    judge = load_judge(cfg, ranks.device)
    heard_as = words if cfg.eval_judge == "ctc" else texts  # Whisper's normaliser reads numbers, the ctc judge has no digits
    for kind in wavs if floors else ["audio"]:
        for row, heard in zip(rows, listen(judge, heard_as, wavs[kind], cfg, "" if kind == "audio" else f"{kind}_")):
            row.update(heard)
    pairs = [None for _ in rows]  # of generated and recorded frames
    for n, (row, prompt, mel, maps) in enumerate(zip(rows, prompts.values(), mels, attention_maps)):
        row["predicted_seconds"], row["pieces"] = len(wavs["audio"][n]) / cfg.sample_rate, len(maps)
        row["alignment_score"] = round(float(np.mean([measures.alignment_scores(of_piece) for of_piece in maps])), 4)
        pictures = {"mel": mel.numpy(), "attention": maps[0]}
        if prompt.mel is not None:
            pictures["recording_mel"] = prompt.mel
            row["utt_id"], row["recording_seconds"] = prompt.utt_id, len(prompt.mel) * cfg.hop_length / cfg.sample_rate
            distortion, pairs[n] = measures.mel_cepstral_distortion(mel.numpy(), prompt.mel)
            row["mcd"] = round(distortion, 4)
        for name, values in pictures.items():
            row[f"{name}_png"] = save_map(out / f"{row['idx']:06d}_{name}.png", values, cfg)
    voice.measure_sound([row for row in rows if row["idx"] < sounds], wavs, pairs, cfg)  # the first of this rank's rows
    seconds = max(sum(row["predicted_seconds"] for row in rows), 1e-9)  # 0 on a rank without prompts
    return rows, {"judge": judge.name if judge else "none", "judge_floor": judge.floor if judge else None,
                  "sampler_rtf": (sampled - start) / seconds, "vocoder_rtf": (vocoded - sampled) / seconds}


def evaluate_run(model: TTS, cfg: Config, prompts: list, step: int, train_seconds: float, metrics: Metrics | None,
                 ranks: Ranks, first: bool) -> None:
    """Evaluate the model of a run as it is, log the figures, write the pages, and keep the best checkpoint.

    The `first` evaluation of a run also has the vocoder's copies and the recordings judged, and must not fail. Later errors
    are only reported.
    """
    out = Path(cfg.out_dir)
    folder, numbered = out / "eval" / f"step_{step:08d}", numbered_checkpoint(out, step)
    if metrics:
        tell(f"step {step}: synthesizing {len(prompts)} prompts, {cfg.eval_steps} Euler steps each")
    try:
        summary = evaluate(model, cfg, prompts, folder, ranks, step, str(numbered), floors=first)
    except Exception as e:  # on all ranks alike
        if first:
            raise
        warn(f"step {step}: evaluation failed: {first_line(e)}")
        if not isinstance(e, UserError):
            traceback.print_exc()
        return
    if metrics:
        names = [kind + rate for kind in ("", "vocoded_", "recording_") for rate in ("wer", "cer")]
        rates = {f"eval/{name}": summary[name] for name in names if summary[name] is not None}
        if "eval/cer" in rates and summary["cer"] <= metrics.best("eval/cer"):
            metrics.attempt("best.pt", link_checkpoint, numbered, out / "best.pt")
        others = {f"eval/{name}": summary[name] for name in measures.OTHER_NAMES if summary[name] is not None}
        metrics.log(step, rates | others | {"time/train_sec": train_seconds, "time/eval_sec": summary["total_seconds"]})
        metrics.media(step, folder)
        metrics.attempt("the listening page", write_run_page, out)
        shown = ", ".join(f"{name[5:].replace('_', ' ').upper()} {rate:.2%}" for name, rate in rates.items())
        tell(f"step {step}: {shown or 'evaluated'} after {train_seconds / 60:.1f} min of training")


def evaluation_folder(ckpt: str, name: str) -> Path:
    """Where an evaluation of a voice goes by default: into its run's folder, but not into an exported voice."""
    exported = os.path.isdir(ckpt)
    return (Path(".artifacts/local", Path(ckpt).resolve().name) if exported else Path(ckpt).parent) / "eval" / name


def judge_recordings(cfg: Config, folder: str, device) -> dict:
    """The judge's error rates on the recordings of cfg's prompts, <utt_id>.wav in `folder`. Raises UserError."""
    if cfg.eval_judge == "none":
        raise UserError("eval_judge = 'none': there is no judge for the recordings; expected whisper or ctc")
    prompts = load_prompts(cfg)
    wavs, judge = read_recordings(folder, prompts, cfg), load_judge(cfg, device)
    texts = [p.spoken or p.text if cfg.eval_judge == "ctc" else p.text for p in prompts]
    rows = [row for row in listen(judge, texts, wavs, cfg) if row["edits"]]
    if not rows:
        raise UserError(f"no recording in {folder} has a text that the judge {judge.name} can transcribe")
    return {"judge": judge.name, "count": len(rows), **measures.error_rates(rows)}


def compare(folder_a: str, folder_b: str) -> str:
    """A table of two evaluations' figures and paired differences, on the prompts that both have. Raises UserError."""
    parts, judges = [], []
    for folder in (folder_a, folder_b):
        try:
            judges.append(json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))["judge"])
            with open(Path(folder, "wer.jsonl"), encoding="utf-8") as f:
                rows = [json.loads(line) for line in f]
            parts.append({row["reference"]: row for row in rows if row["edits"]})
        except (OSError, ValueError, KeyError) as e:
            raise UserError(f"{folder} is not what an evaluation with a judge wrote ({type(e).__name__}: {first_line(e)}); "
                            "expected wer.jsonl and summary.json as evaluator.py writes them") from None
    shared = [text for text in parts[0] if text in parts[1]]
    if not shared:
        raise UserError(f"{folder_a} and {folder_b} share no judged prompt; evaluate both on the same --prompts and --num")
    if judges[0] != judges[1]:
        raise UserError(f"{folder_a} was judged by {judges[0]}, {folder_b} by {judges[1]}; evaluate both with one judge")
    a, b = (np.array([part[text]["edits"] for text in shared]) for part in parts)
    lines = [f"A = {folder_a}, B = {folder_b}; {len(shared)} shared prompts, judge {judges[0]}; 95 % intervals, paired", "",
             "| | A | B | B - A |", "|---|---|---|---|"]
    for name, at in (("WER", 0), ("CER", 2)):
        rate_a, rate_b = (part[:, at].sum() / part[:, at + 1].sum() for part in (a, b))
        draws = [measures.bootstrap_rates(part[:, at], part[:, at + 1]) for part in (a, b)]
        low, high = measures.interval(draws[1] - draws[0], a[:, at + 1].sum(), differences=True)
        lines.append(f"| {name} | {rate_a:.2%} | {rate_b:.2%} | {rate_b - rate_a:+.2%} ({low:+.2%} to {high:+.2%}) |")
    rated = [text for text in shared if all(part[text].get("dnsmos") is not None for part in parts)]
    if rated:
        a, b = (np.array([part[text]["dnsmos"] for text in rated]) for part in parts)
        low, high = np.percentile(measures.bootstrap_rates(b - a, np.ones(len(rated))), [2.5, 97.5])
        lines.append(f"| DNSMOS | {a.mean():.2f} | {b.mean():.2f} | {(b - a).mean():+.2f} ({low:+.2f} to {high:+.2f}) |")
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
    flags = split_flags(argv, extra=("ckpt", "prompts", "num", "device", "recordings"))
    path, out_dir, recordings = (flags.pop(name, None) for name in ("ckpt", "out_dir", "recordings"))
    device = pick_device(flags.pop("device", "auto"))
    for short, field in (("prompts", "eval_prompts"), ("num", "eval_num_samples")):
        if short in flags:
            flags[field] = flags.pop(short)
    if path is None and recordings is None:
        raise UserError("--ckpt is missing; expected a checkpoint such as .artifacts/local/demo/latest.pt")
    if path is None:
        cfg = from_flags(flags)
        cfg.eval_judge = choose_judge(cfg, device)
        heard = judge_recordings(cfg, recordings, device)
        print(f"{heard['count']} recordings, judge {heard['judge']}: WER {heard['wer']:.2%}, CER {heard['cer']:.2%}")
        if out_dir:
            write_file(make_folder(out_dir) / "recordings.json", json.dumps(heard))
        return
    model, ckpt = load_checkpoint(path, device)
    cfg = model.cfg = from_flags(flags, base=dataclasses.asdict(model.cfg))
    cfg.eval_judge = choose_judge(cfg, device)
    out = Path(out_dir or evaluation_folder(path, f"manual_{ckpt['step']:08d}"))
    prompts = load_prompts(cfg, model.tokenise, characters=ckpt.get("characters", ""))
    if missing := voice.missing_packages():
        tell(missing)
    summary = evaluate(model, cfg, prompts, out, Ranks(0, 1, device), ckpt["step"], path, True, recordings, len(prompts))
    for line in (out / "wer.jsonl").read_text(encoding="utf-8").strip().split("\n")[:8]:
        row = json.loads(line)
        print(f"  {row['reference']}\n    -> {row['hypothesis']}")
    note = f"; on recordings the judge has CER {summary['judge_floor']['cer']:.2%}" if summary["judge_floor"] else ""
    print(f"\n{measures.markdown(summary)}\n{out}: {summary['count']} prompts{note}")


if __name__ == "__main__":
    run_cli(main)
