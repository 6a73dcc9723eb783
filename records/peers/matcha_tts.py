"""Train Matcha-TTS (arXiv 2309.03199) on a processed corpus and evaluate it as train.py evaluates our model: a peer.

    records/peers/matcha_tts.sh --config configs/demo.yaml --minutes 20 --at 5,10,15 --out .artifacts/peers/matcha
    records/peers/matcha_tts.sh --config configs/demo.yaml --ckpt .artifacts/peers/matcha/latest.pt --eval_prompts test

matcha_tts.sh makes its virtual environment first. Corpus, prompts, vocoder and judge are those of the config, whose fields
are flags. Model, losses, phonemes, optimiser and sampler are those of the package and of its published configs. Only the
training loop is ours, because the package's wants wav files and torchaudio. The folder gets the files of a run of train.py,
so metric.py and `evaluator.py --compare` take both. Minutes count training, but not phonemes and evaluations.
"""
import argparse
import itertools
import math
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import audio
import evaluator
from checkpoint import link_checkpoint, numbered_checkpoint
from common import UserError, first_line, progress, replacing, run_cli, tell, write_file
from config import Config, load_config, to_yaml
from corpus import Corpus
from data import epoch_batches, padded
from distributed import Ranks
from eval.judge import choose_judge
from eval.measures import markdown
from metric import Metrics, provenance
from model import autocast
from text_encoder import byte_tokens

# The published defaults. The package on PyPI has no config files
ENCODER = {"encoder_type": "RoPE Encoder",
           "encoder_params": dict(n_feats=80, n_channels=192, filter_channels=768, filter_channels_dp=256, n_heads=2,
                                  n_layers=6, kernel_size=3, p_dropout=0.1, spk_emb_dim=64, n_spks=1, prenet=True),
           "duration_predictor_params": dict(filter_channels_dp=256, kernel_size=3, p_dropout=0.1)}
DECODER = dict(channels=[256, 256], dropout=0.05, attention_head_dim=64, n_blocks=1, num_mid_blocks=2, num_heads=2,
               act_fn="snakebeta")
FLOW = dict(name="CFM", solver="euler", sigma_min=1e-4)
BATCH_SIZE, GRAD_CLIP = 32, 5.0
SAMPLER = dict(eval_steps=10, eval_temperature=0.667, eval_cfg_scale=1.0)  # no guidance
MULTIPLE = 16  # of frames: the decoder, a U-Net, halves them twice. Of frames and tokens: bfloat16 needs few shapes on a CPU
LOSSES = ("duration_loss", "prior_loss", "flow_loss")  # in the order in which the model returns them


class Peer(NamedTuple):
    """Matcha-TTS, as evaluator.speak takes it."""
    net: torch.nn.Module
    tokens: object  # the function of a text to its token ids

    @torch.inference_mode()
    def speak(self, texts: list[str], cfg: Config) -> tuple[list, list]:
        """The log-mel (frames, n_mels) of each text, and the list of its one alignment (frames, tokens)."""
        self.net.eval()
        mels, maps = [], []
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)
            for text in progress(texts, desc="synthesizing", unit="prompt"):
                ids = torch.tensor([self.tokens(text)])
                found = self.net.synthesise(ids, torch.tensor([ids.shape[1]]), cfg.eval_steps, cfg.eval_temperature)
                mels.append(found["mel"][0].T)
                maps.append([found["attn"].reshape(ids.shape[1], -1).T.numpy()])
        return mels, maps


def load_peer(mel_mean: float, mel_std: float) -> Peer:
    """An untrained Matcha-TTS for log-mels of this mean and deviation. Raises UserError if its packages are missing."""
    try:
        import espeakng_loader
        from omegaconf import OmegaConf
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
        EspeakWrapper.set_library(espeakng_loader.get_library_path())
        EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
        from matcha.models.matcha_tts import MatchaTTS  # after these two lines, because it starts espeak
        from matcha.text import cleaned_text_to_sequence, cleaners, symbols
        from matcha.utils.utils import intersperse
    except ImportError as e:
        raise UserError(f"Matcha-TTS cannot be imported here ({first_line(e)}); start records/peers/matcha_tts.sh instead, "
                        "which installs it into .venv-matcha") from None

    def tokens(text):  # without phonemes that the package lacks, such as the nasal vowel of "blanc", at which it fails
        phonemes = cleaners.english_cleaners2(text)
        return intersperse(cleaned_text_to_sequence([p for p in phonemes if p in symbols]), 0)
    net = MatchaTTS(len(symbols), 1, 64, 80, *map(OmegaConf.create, (ENCODER, DECODER, FLOW)),
                    {"mel_mean": mel_mean, "mel_std": mel_std}, out_size=None)
    return Peer(net, tokens)


def make_batch(mels: list[np.ndarray], tokens: list[list[int]], cfg: Config) -> dict[str, torch.Tensor]:
    """Log-mels (frames, n_mels) and token ids of utterances as the arguments of Matcha-TTS.

    x is (B, tokens). y is (B, n_mels, frames) and normalised. Both are multiples of 16 long, and zero beyond each length.
    """
    y = padded([audio.normalise(mel.astype(np.float32), cfg) for mel in mels])
    y = torch.nn.functional.pad(y.transpose(1, 2), (0, -y.shape[1] % MULTIPLE))
    x = padded([np.array(ids, dtype=np.int64) for ids in tokens])
    return {"x": torch.nn.functional.pad(x, (0, -x.shape[1] % MULTIPLE)), "y": y.contiguous(),
            "x_lengths": torch.tensor([len(ids) for ids in tokens]), "y_lengths": torch.tensor([len(mel) for mel in mels])}


def training_batches(corpus: Corpus, cfg: Config, tokens):
    """An iterator over random batches, without end. The phonemes are made here, before it starts."""
    rows = corpus.split("train", cfg)
    if len(rows) < BATCH_SIZE:
        raise UserError(f"{corpus.dir} has {len(rows)} training utterances; expected at least a batch of {BATCH_SIZE}")
    ids = [tokens(corpus.spoken[i]) for i in progress(rows, desc="phonemes", unit="utt")]
    return (make_batch([corpus.mel(rows[n]) for n in batch], [ids[n] for n in batch], cfg) for epoch in itertools.count()
            for batch in epoch_batches(corpus.frames[rows], BATCH_SIZE, cfg.seed, epoch, buckets=False))


def train(peer: Peer, batches, prompts: list, cfg: Config, lr: float, marks: list[float], metrics: Metrics,
          ranks: Ranks) -> None:
    """Train until each of `marks` (minutes); save and evaluate the model there. Raises UserError if it diverges.

    Its two networks train in the type in which ours does (model.autocast). What is around them, the alignment search and the
    losses, stays in float32, and so do evaluations.
    """
    optimizer, out = torch.optim.Adam(peer.net.parameters(), lr=lr), Path(cfg.out_dir)
    networks = (peer.net.encoder, peer.net.decoder.estimator)
    step, train_seconds = 0, 0.0
    for mark in marks:
        peer.net.train()
        for net in networks:
            net.forward = autocast(cfg, ranks.device)(net.forward)
        while train_seconds < mark * 60:
            start = time.time()
            batch = next(batches)
            losses = peer.net(**batch)[:3]
            loss = sum(losses)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(peer.net.parameters(), GRAD_CLIP).item()
            if not math.isfinite(norm):
                raise UserError(f"the gradient was not finite at step {step + 1}, after {train_seconds / 60:.1f} minutes; "
                                f"lower --lr {lr:g}")
            optimizer.step()
            step, took = step + 1, time.time() - start
            train_seconds += took
            values = {f"train/{name}": value.item() for name, value in zip(LOSSES, losses)} | {"train/loss": loss.item()}
            metrics.log(step, values | {"optim/lr": lr, "optim/grad_norm": norm, "time/step_sec": took,
                                        "perf/frames_per_sec": int(batch["y_lengths"].sum()) / took})
            if step % 10 == 0:
                tell(f"step {step} | " + " | ".join(f"{name[6:]} {value:.4f}" for name, value in values.items())
                     + f" | grad {norm:.2f} | {took:.2f} s/step | {train_seconds / 60:.1f} of {marks[-1]:g} min")
        for net in networks:
            del net.forward  # the class's own again
        with replacing(numbered_checkpoint(out, step)) as tmp:
            torch.save({"net": peer.net.state_dict(), "step": step, "train_seconds": train_seconds, "lr": lr}, tmp)
        link_checkpoint(numbered_checkpoint(out, step), out / "latest.pt")
        evaluator.evaluate_run(peer, cfg, prompts, step, train_seconds, metrics, ranks, first=mark == marks[0])


def evaluate_checkpoint(peer: Peer, cfg: Config, path: str, out: str | None, ranks: Ranks) -> None:
    """Evaluate a checkpoint that train() saved, and print the figures. Raises UserError."""
    try:
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
        peer.net.load_state_dict(ckpt["net"])
    except Exception as e:  # torch and pickle raise many types
        raise UserError(f"--ckpt {path} is not a checkpoint of this script ({type(e).__name__}: {first_line(e)})") from None
    folder = Path(out or Path(path).parent / "eval" / f"{Path(cfg.eval_prompts).stem}_{ckpt['step']:08d}")
    prompts = evaluator.load_prompts(cfg)
    summary = evaluator.evaluate(peer, cfg, prompts, folder, ranks, ckpt["step"], path, True, sounds=len(prompts))
    print(f"{markdown(summary)}\n{folder}: Matcha-TTS after {ckpt['train_seconds'] / 60:.1f} minutes, lr {ckpt['lr']:g}")


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.add_argument("--minutes", type=float, default=20.0, help="of training (20)")
    p.add_argument("--at", default="", help="minutes at which to evaluate before the end, such as 5,10")
    p.add_argument("--lr", type=float, default=1e-4, help="Adam's learning rate (1e-4, the published one)")
    p.add_argument("--out", help="the folder to write; default: .artifacts/peers/matcha_<lr>, or beside --ckpt")
    p.add_argument("--ckpt", help="evaluate this checkpoint instead of training")
    args, flags = p.parse_known_args(argv)
    cfg = load_config(flags)
    try:
        marks = sorted({*map(float, filter(None, args.at.split(","))), args.minutes})
    except ValueError:
        raise UserError(f"--at {args.at}: expected minutes such as 5,10") from None
    if not 0 < marks[0] or marks[-1] > args.minutes:
        raise UserError(f"--at {args.at} --minutes {args.minutes:g}: expected 0 < at < minutes")
    corpus, ranks = Corpus(cfg.data_dir, cfg), Ranks(0, 1, torch.device("cpu"))
    cfg.mel_mean, cfg.mel_std, cfg.no_wandb = *corpus.mel_stats, True
    for name, value in SAMPLER.items():
        setattr(cfg, name, value)
    torch.manual_seed(cfg.seed)
    peer = load_peer(cfg.mel_mean, cfg.mel_std)
    cfg.eval_judge = choose_judge(cfg, ranks.device)
    if args.ckpt:
        cfg.out_dir = str(Path(args.ckpt).parent)
        evaluate_checkpoint(peer, cfg, args.ckpt, args.out, ranks)
        return
    cfg.out_dir = args.out or f".artifacts/peers/matcha_{args.lr:g}"
    if (Path(cfg.out_dir) / "metrics.jsonl").exists():
        raise UserError(f"{cfg.out_dir} holds a run already; name another --out")
    prompts = evaluator.prepare(cfg, corpus, byte_tokens, ranks, evaluated=False)
    Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
    metrics = Metrics(cfg)
    write_file(Path(cfg.out_dir) / "config.yaml", to_yaml(cfg))
    metrics.record_start(provenance(cfg, 0, 1, ranks.device, corpus.fingerprint()) | {
        "peer": f"matcha-tts {version('matcha-tts')}", "lr": args.lr, "batch_size": BATCH_SIZE})
    parameters = sum(parameter.numel() for parameter in peer.net.parameters())
    tell(f"Matcha-TTS: {parameters / 1e6:.1f} M parameters, lr {args.lr:g}, {args.minutes:g} minutes "
         f"in batches of {BATCH_SIZE} on {torch.get_num_threads()} thread(s), in {cfg.out_dir}")
    train(peer, training_batches(corpus, cfg, peer.tokens), prompts, cfg, args.lr, marks, metrics, ranks)
    metrics.close()


if __name__ == "__main__":
    run_cli(main)
