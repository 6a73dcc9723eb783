"""From a corpus to batches: what is trained on, in which order, with which silence, noise, times and text dropout.

    python data.py data/demo_bigvgan --config configs/grammar.yaml   # check a corpus: all its problems, or what it holds

Everything random about a training sample comes from a generator seeded with (seed, epoch, utterance). So a step's batch is a
pure function of (config, step), and neither the number of ranks nor a restart changes it.
"""
import dataclasses
import itertools
import json
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import audio
from common import UserError, run_cli
from config import Config, load_config
from corpus import SPLITS, Corpus
from text_encoder import load_tokeniser

STEPS_AHEAD = 4  # for each loader thread


# --- what is trained on

def fitting_rows(corpus: Corpus, split: str, cfg: Config, tokenise) -> tuple[np.ndarray, np.ndarray]:
    """Indices of a split's utterances of at most block_size frames: those that can be aligned, and those that cannot.

    The alignment search gives each token a position. A text in a script of two or three bytes per letter can have more
    tokens than its speech has positions. Raises UserError if most training texts have.
    """
    rows = corpus.split(split, cfg)
    tokens = np.array([len(tokenise(corpus.spoken[i])) for i in rows], dtype=np.int64)
    crowded = cfg.alignment_search & (tokens > -(-corpus.frames[rows] // cfg.patch))
    if split == "train" and 2 * crowded.sum() > len(rows):
        helps = 2 * (tokens <= corpus.frames[rows]).sum() > len(rows)
        advice = "set patch: 1" if helps else "use a text encoder with fewer tokens, or set alignment_search: false"
        raise UserError(f"{crowded.sum()} of {len(rows)} training texts of {corpus.dir} have more tokens than their speech "
                        f"has positions (patch = {cfg.patch}: {positions_per_second(cfg):.0f} a second), such as "
                        f"{[corpus.ids[i] for i in rows[crowded][:3]]}; {advice}")
    return rows[~crowded], rows[crowded]


def training_rows(corpus: Corpus, cfg: Config, tokenise) -> np.ndarray:
    """Indices of the training split, cut to overfit_first_n_samples if that is set. Raises UserError if they are too few."""
    rows = fitting_rows(corpus, "train", cfg, tokenise)[0][:cfg.overfit_first_n_samples or None]
    if len(rows) < cfg.effective_batch_size:
        raise UserError(f"effective_batch_size = {cfg.effective_batch_size} but only {len(rows)} training utterances of "
                        f"{corpus.dir} fit (block_size = {cfg.block_size} frames, overfit_first_n_samples = "
                        f"{cfg.overfit_first_n_samples}); lower it")
    return rows


def positions_per_second(cfg: Config) -> float:
    return cfg.sample_rate / cfg.hop_length / cfg.patch


def describe(corpus: Corpus, cfg: Config, tokenise) -> str:
    """One line: utterances, hours, what is left out, and the padding waste of the first epoch's batches."""
    train, splits = training_rows(corpus, cfg, tokenise), {s: fitting_rows(corpus, s, cfg, tokenise) for s in SPLITS}
    dropped = corpus.splits.count("train") - len(corpus.split("train", cfg))
    hours = corpus.frames[train].sum() * cfg.hop_length / cfg.sample_rate / 3600
    held_out = ", ".join(f"{len(splits[s][0])} {s}" for s in ("val", "test"))
    return (f"corpus {corpus.dir}: {len(train)} training utterances ({hours:.2f} h), {held_out}; left out: {dropped} longer "
            f"than {cfg.block_size} frames, {len(splits['train'][1])} with more tokens than positions; padding waste "
            f"{padding_waste(corpus.frames, train, cfg):.1%}")


# --- the order of an epoch

def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int, buckets: bool = True) -> list[np.ndarray]:
    """One epoch's batches, each an array of `batch_size` indices into `lengths`; a pure function of its arguments.

    With `buckets`, a batch holds utterances of similar length, and the batches come in random order. The sort adds a jitter
    of up to 2 % to the lengths, so that every epoch groups them differently. A random remainder of less than a batch is
    left out.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))[:len(lengths) // batch_size * batch_size]
    if buckets:
        order = order[np.argsort(-lengths[order] * rng.uniform(0.98, 1.02, len(order)), kind="stable")]
    batches = order.reshape(-1, batch_size)
    return list(rng.permutation(batches)) if buckets else list(batches)


def rank_rows(step_rows: np.ndarray, micro: int, rank: int, world: int, cfg: Config) -> np.ndarray:
    """The part of a step's utterances that `rank` processes in accumulation step `micro`: equal parts, or one more."""
    return np.array_split(step_rows[micro * cfg.batch_size:(micro + 1) * cfg.batch_size], world)[rank]


def padding_waste(frames: np.ndarray, train: np.ndarray, cfg: Config) -> float:
    """The share of padding among all frames that the first epoch's forward passes see, on the config's number of ranks."""
    world = cfg.gpus or cfg.nproc
    used = padded = 0
    for batch in epoch_batches(frames[train], cfg.effective_batch_size, cfg.seed, 0, cfg.length_buckets):
        for micro, rank in itertools.product(range(cfg.effective_batch_size // cfg.batch_size), range(world)):
            lengths = frames[train][rank_rows(batch, micro, rank, world, cfg)]
            used, padded = used + lengths.sum(), padded + lengths.max() * len(lengths)
    return 1 - used / padded


# --- samples and batches

def sample_rng(cfg: Config, epoch: int, i: int) -> np.random.Generator:
    return np.random.default_rng([cfg.seed, epoch, i])


def silence_frames(rng: np.random.Generator, cfg: Config) -> int:
    """Frames of silence to append to an utterance. Always takes two numbers from `rng`."""
    chance, seconds = rng.random(), rng.random() * cfg.max_silence_sec
    return int(seconds * cfg.sample_rate / cfg.hop_length) if chance < cfg.silence_prob else 0


def padded(arrays: list[np.ndarray]) -> torch.Tensor:
    """Arrays (length, ...) as one tensor (B, longest, ...), zero beyond each length."""
    out = np.zeros((len(arrays), max(map(len, arrays)), *arrays[0].shape[1:]), arrays[0].dtype)
    for row, array in zip(out, arrays):
        row[:len(array)] = array
    return torch.from_numpy(out)


def collate(corpus: Corpus, indices, cfg: Config, tokenise, epoch: int) -> dict[str, torch.Tensor]:
    """Utterances as one padded batch, with all that is random about them.

    mel, noise (B, T, n_mels): normalised, zero beyond mel_lengths (B,). tokens (B, L): zero beyond token_lengths (B,).
    speech_lengths (B,): frames before the tail of silence. seconds (B,): with the tail. t (B,): times in (0, 1).
    drop_text (B,): bool.
    """
    mels, noises, times, drops = [], [], [], []
    for i in indices:
        rng = sample_rng(cfg, epoch, int(i))
        tail = silence_frames(rng, cfg)
        times.append(cfg.timestep_logit_mean + cfg.timestep_logit_std * rng.standard_normal())
        drops.append(rng.random() < cfg.text_condition_dropout)
        mel = np.asarray(corpus.mel(i), np.float32)
        if tail:
            mel = np.concatenate([mel, np.full((tail, cfg.n_mels), audio.LOG_MEL_FLOOR, np.float32)])
        mels.append(audio.normalise(mel, cfg))
        noises.append(rng.standard_normal(mel.shape, dtype=np.float32))
    tokens = [np.array(tokenise(corpus.spoken[i])) for i in indices]
    mel_lengths = torch.tensor([len(m) for m in mels])
    return {"mel": padded(mels), "noise": padded(noises), "mel_lengths": mel_lengths,
            "speech_lengths": torch.from_numpy(corpus.frames[indices]),
            "seconds": mel_lengths * (cfg.hop_length / cfg.sample_rate),
            "tokens": padded(tokens), "token_lengths": torch.tensor([len(t) for t in tokens]),
            "t": torch.sigmoid(torch.tensor(times, dtype=torch.float32)), "drop_text": torch.tensor(drops)}


def at_step(cfg: Config, step: int) -> Config:
    """The config with the mean of the training times that holds at `step`."""
    if cfg.timestep_logit_mean_end is None:
        return cfg
    late = max(0.0, 3 * step / cfg.max_steps - 2)
    mean = (1 - late) * cfg.timestep_logit_mean + late * cfg.timestep_logit_mean_end
    return dataclasses.replace(cfg, timestep_logit_mean=mean)


class TrainingSteps:
    """Item n is step n's work for one rank: a list of batches, one per accumulation step.

    Each batch also has `frames` and `utterances`, the counts of the whole step over all ranks; the loss divides by them.
    """

    def __init__(self, corpus: Corpus, cfg: Config, tokenise, rank: int, world: int):
        self.corpus, self.cfg, self.tokenise, self.rank, self.world = corpus, cfg, tokenise, rank, world
        self.indices = training_rows(corpus, cfg, tokenise)
        self.steps_per_epoch = len(self.indices) // cfg.effective_batch_size
        self._epoch = -1, []  # the epoch last asked for, and its batches

    def __len__(self):
        return self.cfg.max_steps

    def _rows(self, step: int) -> np.ndarray:
        cfg, epoch = self.cfg, step // self.steps_per_epoch
        known, batches = self._epoch
        if epoch != known:
            lengths = self.corpus.frames[self.indices]
            batches = epoch_batches(lengths, cfg.effective_batch_size, cfg.seed, epoch, cfg.length_buckets)
            self._epoch = epoch, batches
        return self.indices[batches[step % self.steps_per_epoch]]

    def utterances(self, step: int) -> list[str]:
        """The ids of a step's utterances, on all ranks."""
        return [self.corpus.ids[i] for i in self._rows(step)]

    def longest(self) -> dict:
        """This rank's part of a batch of the longest utterances, with tails of silence: what needs the most memory."""
        cfg = dataclasses.replace(self.cfg, silence_prob=1.0 if self.cfg.silence_prob else 0.0)
        rows = self.indices[np.argsort(-self.corpus.frames[self.indices], kind="stable")[:cfg.batch_size]]
        return collate(self.corpus, rank_rows(rows, 0, self.rank, self.world, cfg), cfg, self.tokenise, 0)

    def __getitem__(self, step: int) -> list[dict]:
        cfg, epoch, rows = self.cfg, step // self.steps_per_epoch, self._rows(step)
        frames = int(self.corpus.frames[rows].sum())
        frames += sum(silence_frames(sample_rng(cfg, epoch, int(i)), cfg) for i in rows)
        micro_batches = []
        for micro in range(cfg.effective_batch_size // cfg.batch_size):
            mine = rank_rows(rows, micro, self.rank, self.world, cfg)
            batch = collate(self.corpus, mine, at_step(cfg, step), self.tokenise, epoch)
            micro_batches.append(batch | {"frames": torch.tensor(frames), "utterances": torch.tensor(len(rows))})
        return micro_batches


def training_loader(steps: TrainingSteps, start: int, threads: int = 1, pin: bool = False):
    """Yield the items of `steps` from `start` on, made ahead of time by `threads` threads; pinned for copies to a GPU.

    Threads suffice, because reading, NumPy's random numbers and copies release Python's lock. Raises UserError if the corpus
    can no longer be read.
    """
    def make(n):
        return [{k: v.pin_memory() if pin else v for k, v in batch.items()} for batch in steps[n]]
    with ThreadPoolExecutor(threads) as pool:
        ahead, numbers = deque(), iter(range(start, len(steps)))
        try:
            for n in numbers:
                ahead.append(pool.submit(make, n))
                if len(ahead) == STEPS_AHEAD * threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def main(argv: list[str]) -> int | None:
    if argv and not argv[0].startswith("--"):
        argv = ["--data_dir", argv[0]] + argv[1:]
    cfg, problems = load_config(argv), []
    try:
        corpus = Corpus(cfg.data_dir, cfg, problems.append)
        if corpus.is_whole:
            corpus.check(problems.append)
        tokenise, _ = load_tokeniser(cfg)
        crowded = [corpus.ids[i] for split in SPLITS for i in fitting_rows(corpus, split, cfg, tokenise)[1]]
    except UserError as e:  # the check cannot go on
        problems.append(str(e))
    if problems:
        print("\n".join(f"error: {problem}" for problem in problems), file=sys.stderr)
        return 2
    print(json.dumps({k: v for k, v in corpus.stats.items() if k != "characters"}))
    print(f"{(corpus.frames > cfg.block_size).sum()} of {len(corpus)} utterances are longer than block_size = "
          f"{cfg.block_size} frames and left out; {corpus.stats.get('rejected', 0)} were rejected at preparation "
          f"(metadata/rejected.jsonl)\n{len(crowded)} have more tokens than positions (patch = {cfg.patch}: "
          f"{positions_per_second(cfg):.0f} a second) and are left out{': ' if crowded else ''}{', '.join(crowded)}\n"
          f"read every frame and found no problem; fingerprint {corpus.fingerprint()[:12]}")


if __name__ == "__main__":
    run_cli(main)
