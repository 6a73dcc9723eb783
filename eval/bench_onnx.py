"""A voice in torch, its ONNX graphs, and these with the decoder in int8: log-mels, speed, and what a judge hears.

    python sample.py --ckpt voices/joe --export my_voice --onnx
    python eval/bench_onnx.py --ckpt voices/joe --onnx my_voice --out_dir /tmp/onnx      # 128 lines of eval/prompts.txt
    python evaluator.py --compare /tmp/onnx/torch /tmp/onnx/int8         # errors, with the interval of the difference

All three speak each line in turn, with the same noise. --threads N uses N cores, 1 by default. With 1 the times are CPU
time, which other programs disturb little. Config fields are flags, such as --eval_steps 8. torch speaks in float32, as the
graphs do. Needs onnxruntime and onnxscript.
"""
import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic

import sample
import speak_onnx
from audio import write_wav
from checkpoint import load_checkpoint
from common import UserError, make_folder, progress, run_cli, write_file
from config import from_flags, split_flags
from eval.judge import choose_judge, listen, load_judge
from evaluator import load_prompts
from vocoder import load_vocoder


def script_noise(text: str, frames: int, n_mels: int, seed: int) -> torch.Tensor:
    """The noise of speak_onnx.py, as sample.text_noise gives it."""
    return torch.from_numpy(np.random.default_rng([seed, *text.encode()]).standard_normal((frames, n_mels), np.float32))


def load_speakers(model, folder: str, threads: int, options: dict) -> dict:
    """Name -> a function from a text to its log-mels (1, frames, n_mels), and one from such a log-mel to a wav."""
    vocode, session_options = load_vocoder(model.cfg, "cpu"), onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    voice = speak_onnx.load_voice(folder, session_options)
    with tempfile.TemporaryDirectory() as tmp:
        full, int8 = Path(folder, "decoder.onnx"), Path(tmp, "decoder.onnx")
        quantize_dynamic(full, int8, weight_type=QuantType.QInt8)
        print(f"the decoder has {full.stat().st_size / 1e6:.1f} MB, in int8 {int8.stat().st_size / 1e6:.1f} MB")
        decoder = onnxruntime.InferenceSession(int8, session_options, providers=["CPUExecutionProvider"])

    def torch_mels(text):
        with mock.patch.object(sample, "text_noise", script_noise):
            return [mel[None].numpy() for mel in sample.sample(model, [text], **options)]
    speakers = {"torch": (torch_mels, lambda mel: vocode(torch.from_numpy(mel[0])))}
    for name, of in (("onnx", voice), ("int8", voice | {"decoder": decoder})):
        speakers[name] = (lambda text, of=of: speak_onnx.sample(of, text, speed=1.0, **options),
                          lambda mel, of=of: of["vocoder"].run(None, {"log_mel": mel})[0][0])
    return speakers


def speak_all(speakers: dict, texts: list[str], clock) -> tuple:
    """Name -> wavs, name -> seconds of work for log-mels and for sound, and of each text the largest
    difference between the log-mels of onnx and torch."""
    wavs, seconds, differences = {name: [] for name in speakers}, {name: np.zeros(2) for name in speakers}, []
    for to_mels, to_wav in speakers.values():
        to_wav(to_mels(texts[0])[0])  # the first call takes longer
    for text in progress(texts, desc="speaking", unit="line"):
        mels = {}
        for name, (to_mels, to_wav) in speakers.items():
            times = [clock()]
            mels[name] = to_mels(text)
            times.append(clock())
            wavs[name].append(np.concatenate([to_wav(mel) for mel in mels[name]]))
            seconds[name] += np.diff([*times, clock()])
        if any(a.shape != b.shape for a, b in zip(mels["torch"], mels["onnx"], strict=True)):
            raise UserError(f"torch and ONNX predict another duration for the line that begins {text[:30]!r}; is it a line "
                            "that fits into one utterance, and is the folder an export of --ckpt?")
        differences.append(max(np.abs(a - b).max() for a, b in zip(mels["torch"], mels["onnx"])))
    return wavs, seconds, np.array(differences)


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--ckpt", default=sample.VOICE, help="the voice; default: the one in the box")
    p.add_argument("--onnx", required=True, metavar="DIR", help="its folder that sample.py --export --onnx wrote")
    p.add_argument("--threads", type=int, default=1, help="number of cores")
    p.add_argument("--out_dir", default="/tmp/onnx", help="folder for the wavs and what is heard in them")
    args, flags = p.parse_known_args(argv)
    if args.threads < 1 or not Path(args.onnx, "voice.json").is_file():
        raise UserError(f"--threads {args.threads}, --onnx {args.onnx}: expected one thread or more, and a folder that "
                        "sample.py --export --onnx wrote")
    threads, out = args.threads, make_folder(args.out_dir)
    torch.set_num_threads(threads)
    model, ckpt = load_checkpoint(args.ckpt, "cpu")
    flags = {"eval_prompts": "eval/prompts.txt", "eval_num_samples": "128"} | split_flags(flags)
    cfg = model.cfg = from_flags(flags, base=dataclasses.asdict(model.cfg))
    cfg.dtype, cfg.eval_judge = "float32", choose_judge(cfg, torch.device("cpu"))  # the graphs are in float32
    prompts = load_prompts(cfg, model.tokenise, characters=ckpt.get("characters", ""))
    options = {name: getattr(cfg, f"eval_{name}") for name in ("steps", "cfg_scale", "temperature")} | {"seed": cfg.seed}
    clock = time.process_time if threads == 1 else time.perf_counter
    speakers = load_speakers(model, args.onnx, threads, options)
    wavs, seconds, differences = speak_all(speakers, [prompt.spoken or prompt.text for prompt in prompts], clock)
    print(f"largest difference in log-mels: {differences.max():.2g}, in the median line {np.median(differences):.2g}\n\n"
          "| | log-mels, s per s of speech | sound | word errors | WER |\n|---|---|---|---|---|")
    judge = load_judge(cfg, torch.device("cpu"))
    for name, of_name in wavs.items():
        place = make_folder(out / name)
        rows = listen(judge, [prompt.text for prompt in prompts], of_name, cfg)
        for n, (row, prompt, wav) in enumerate(zip(rows, prompts, of_name)):
            row |= {"audio": f"{n:06d}.wav", "reference": prompt.text}
            write_wav(place / row["audio"], wav, cfg.sample_rate)
        write_file(place / "wer.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_file(place / "summary.json", json.dumps({"judge": judge and judge.name}))
        errors, words = np.sum([row["edits"][:2] for row in rows if row["edits"]] or [[0, 1]], axis=0)
        mels, sound = seconds[name] * cfg.sample_rate / sum(map(len, of_name))
        print(f"| {name} | {mels:.3f} | {sound:.3f} | {errors} of {words} | {errors / words:.1%} |", flush=True)


if __name__ == "__main__":
    run_cli(main)
