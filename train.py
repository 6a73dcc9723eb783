"""Train a voice: one process, or one per GPU (or per CPU share) under torchrun.

    python train.py --config configs/demo.yaml                                    # two CPU cores, nothing to download
    python train.py --config configs/ljspeech_overfit64.yaml                      # one GPU, the debugging gate
    torchrun --standalone --nproc_per_node 2 train.py --config configs/ljspeech.yaml
    python train.py --config configs/demo.yaml --resume latest                    # go on after a stop

Everything a run writes lies in its out_dir. Ctrl-C, SIGTERM, SIGUSR1, SIGHUP or a file named STOP in there ends it after the
current step, with a checkpoint; without torchrun a second Ctrl-C ends it at once.
"""
import dataclasses
import datetime
import errno
import fcntl
import math
import os
import signal
import socket
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import evaluator
from audio import load_vocoder
from checkpoint import read_checkpoint
from config import Config, UserError, first_line, load_config, run_cli, to_yaml
from data import Corpus, TrainingSteps, collate, training_loader
from eval.page import write_run_page, write_text
from metric import Metrics, peak_memory, provenance, tell, warn
from model import TTS, autocast, parameter_table

VALIDATION_EPOCH = 2**31  # an epoch that training never reaches: noise and times of its own, always the same


# --- ranks and devices

def start_ranks(cfg: Config) -> tuple[int, int, torch.device]:
    """Rank, world size and device; joins the process group that torchrun set up. Raises UserError."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if cfg.gpus and local >= torch.cuda.device_count():
        raise UserError(f"gpus = {cfg.gpus} but this machine has {torch.cuda.device_count()} CUDA GPUs; use --gpus 0 for "
                        "the CPU, or configs/demo.yaml, which needs none")
    if cfg.batch_size % world:
        raise UserError(f"batch_size = {cfg.batch_size} does not divide among {world} ranks")
    device = torch.device("cuda", local) if cfg.gpus else torch.device("cpu")
    if cfg.gpus:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:  # ranks wait for one another while Whisper listens, so the patience is long
        dist.init_process_group("nccl" if cfg.gpus else "gloo", timeout=datetime.timedelta(hours=4))
    return rank, world, device


def over_ranks(op, value: float, world: int, device) -> float:
    """A number's sum, maximum or minimum (`op` is dist.ReduceOp's) over all ranks."""
    if world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op)
    return tensor.item()


@contextmanager
def on_all_ranks(world: int, device):
    """A UserError within this, on any rank, is one on every rank: else the others would wait, or fail less clearly."""
    error = None
    try:
        yield
    except UserError as e:
        error = e
    if over_ranks(dist.ReduceOp.MAX, error is not None, world, device):
        raise error or UserError("another rank could not start; its message says why")


def lock_folder(out: Path):
    """The open file out/lock, locked as long as it stays open, so that one run at a time writes there. Raises UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / "lock", "a+")
    except OSError as e:
        raise UserError(f"cannot write to out_dir {out}: {e.strerror}; name another --out_dir") from None
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: a loader process would keep that alive
    except OSError as e:
        if e.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system that knows no locks
            lock.seek(0)
            raise UserError(f"{out} belongs to a run that is going on ({lock.read().strip()}); stop that one first (touch "
                            f"{out}/STOP), or name another --run_name") from None
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    for left in out.glob("*.tmp"):  # by a run that was killed while it wrote
        left.unlink()
    return lock


# --- optimisers

# Odd quintics in turn that bring singular values between a lowest one (0.02 of three, 0.005 of four) and 1 to within a tenth
# of 1: each is the one of least greatest error on what the one before leaves (the idea is Polar Express's, arXiv 2505.16932;
# found by linear programming on a grid). A matrix divided by its norm has values about 1 / sqrt(rows), so a larger one needs
# one more. The usual five, whose values end anywhere between 0.7 and 1.1, speak no better: records/README.md.
QUINTICS = {3: ((7.711, -22.1138, 16.2487), (3.2153, -2.4112, 0.5013), (2.2183, -1.594, 0.4107)),
            4: ((8.2987, -24.4305, 18.0903), (3.9152, -2.9211, 0.5592), (3.1746, -2.3804, 0.4978),
                (2.1895, -1.5672, 0.4079))}


def orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Wide matrices (N, m, n), m <= n, with their singular values all brought near 1, by products alone (Newton-Schulz)."""
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for a, b, c in QUINTICS[3 if x.shape[1] <= 256 else 4]:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose update is orthogonalised (Jordan et al. 2024) and scaled to AdamW's RMS (arXiv 2502.16982),
    so that the two share a scale of learning rates. For matrices only.

    Not torch.optim.Muon: that takes one matrix after another, in bfloat16, which a CPU without such instructions emulates,
    and then the optimiser takes twenty times as long as all the rest. Here matrices of one shape go together.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(sorted(p.shape)), []).append(p)
            for (_, longer), alike in shapes.items():
                grads = [p.grad for p in alike]
                averages = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in alike]
                torch._foreach_lerp_(averages, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, averages, group["momentum"])
                tall = [p.shape[0] > p.shape[1] for p in alike]
                wide = torch.stack([u.T if t else u for u, t in zip(updates, tall)])
                wide = orthogonal(wide.bfloat16()).float() if wide.is_cuda else orthogonal(wide)
                torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(alike, [u.T if t else u for u, t in zip(wide, tall)],
                                    alpha=-group["lr"] * 0.2 * longer**0.5)


def make_optimizers(model: TTS, cfg: Config) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else that trains."""
    encoder = getattr(model.text_encoder, "encoder", None) or model.text_encoder
    blocks = [*model.decoder.blocks, *model.text_blocks, *encoder.children()]
    inside = {p for block in blocks for m in block.modules() if isinstance(m, torch.nn.Linear) for p in [m.weight]}
    matrices = [p for p in model.parameters() if p.requires_grad and p in inside]
    rest = [p for p in model.parameters() if p.requires_grad and p not in inside]
    fused = {"fused": True} if next(model.parameters()).is_cuda else {}
    return [Muon(matrices, cfg.learning_rate, cfg.weight_decay, cfg.muon_momentum),
            torch.optim.AdamW(rest, lr=cfg.adamw_learning_rate, betas=(0.9, 0.95), weight_decay=cfg.weight_decay, **fused)]


def lr_factor(step: int, cfg: Config) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then cfg.lr_decay down to min_lr_ratio."""
    if step < cfg.warmup_steps:
        return (step + 1) / cfg.warmup_steps
    progress = (step - cfg.warmup_steps) / max(1, cfg.max_steps - cfg.warmup_steps)
    left = {"linear": 1 - progress, "cosine": 0.5 + 0.5 * math.cos(math.pi * progress), "constant": 1.0}[cfg.lr_decay]
    return cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * left


# --- averaged weights

def update_ema(ema: dict, model: TTS, decay: float, step: int) -> None:
    """Move the averages towards the weights; a short memory at first, so that the random start is soon forgotten."""
    decay = min(decay, (1 + step) / (10 + step))
    weights = dict(model.named_parameters())
    torch._foreach_lerp_(list(ema.values()), [weights[name].detach() for name in ema], 1 - decay)


@contextmanager
def averaged(model: TTS, ema: dict):
    """Within this, the model has its averaged weights and is in evaluation mode."""
    weights = dict(model.named_parameters())

    def swap():
        for name, average in ema.items():
            held = weights[name].data
            weights[name].data, ema[name] = average, held
    swap()
    model.eval()
    try:
        yield
    finally:
        swap()
        model.train()


# --- checkpoints

def check_ranks_agree(model: TTS, world: int, device) -> None:
    """Ranks start alike and step alike; if their weights ever differ, gradients were not averaged. Raises RuntimeError."""
    here = sum(p.detach().double().abs().sum() for p in model.parameters()).item()
    highest, lowest = (over_ranks(op, sign * here, world, device) * sign
                       for op, sign in ((dist.ReduceOp.MAX, 1), (dist.ReduceOp.MAX, -1)))
    if highest != lowest:
        raise RuntimeError(f"the ranks' weights differ: absolute sums from {lowest} to {highest}")


def save_checkpoint(cfg: Config, model: TTS, optimizers, ema: dict, step: int, rest: dict) -> None:
    """Write ckpt_step_<step>.pt and latest.pt, each whole or not at all; drop old numbered ones.

    `rest` is what else a run needs in order to go on. Raises OSError or RuntimeError, as the disk and torch.save do.
    """
    out = Path(cfg.out_dir)
    numbered, latest = out / f"ckpt_step_{step:08d}.pt", out / "latest.pt"
    tmp = out / "ckpt.tmp"
    try:
        with open(tmp, "wb") as f:
            torch.save({"model": model.saved_state(), "ema": ema, "optimizers": [o.state_dict() for o in optimizers],
                        "step": step, "config": dataclasses.asdict(cfg), **rest}, f)
            f.flush()
            os.fsync(f.fileno())  # else a machine that goes down could leave the new name on an empty file
        os.replace(tmp, numbered)
        try:
            os.link(numbered, tmp)  # the same bytes under a second name
        except OSError:  # a file system without hard links
            tmp.write_bytes(numbered.read_bytes())
        os.replace(tmp, latest)
    finally:
        tmp.unlink(missing_ok=True)
    for old in sorted(out.glob("ckpt_step_*.pt"))[:-cfg.keep_checkpoints]:
        old.unlink()


def last_checkpoint(out: Path) -> str:
    return str(out / "latest.pt") if (out / "latest.pt").exists() else "none yet"


@contextmanager
def naming_checkpoint(out: Path, step: int):
    """Within this, an error that ends the run also says from where one can go on."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{e}; stopped at step {step}, the last good checkpoint is {last_checkpoint(out)}") from None


FREE_TO_CHANGE = ("run_name out_dir resume gpus nproc dtype compile data_dir prepare_script loader_workers batch_size "
                  "max_steps max_epochs max_train_seconds max_skipped_steps log_interval val_interval val_num_samples "
                  "checkpoint_interval keep_checkpoints no_wandb wandb_project wandb_url").split()


def resume_checkpoint(cfg: Config, model: TTS, optimizers, ema: dict, corpus: str | None) -> tuple[int, dict]:
    """Load the checkpoint that cfg.resume names; returns its step and the rest that was saved, (0, {}) for a fresh start.

    `corpus` is the fingerprint of the corpus, or None on ranks that did not read it all. Raises UserError if out_dir holds
    a run that was not asked for, or if the corpus or a field that shapes training has changed.
    """
    latest, metrics = (os.path.join(cfg.out_dir, name) for name in ("latest.pt", "metrics.jsonl"))
    if not cfg.resume:
        if os.path.exists(latest) or (os.path.exists(metrics) and os.path.getsize(metrics)):
            raise UserError(f"{cfg.out_dir} holds a run already; add --resume latest to go on with it, or name another "
                            "--run_name, or delete the folder")
        return 0, {}
    path = latest if cfg.resume == "latest" else cfg.resume
    if cfg.resume == "latest" and not os.path.exists(path):
        return 0, {}
    ckpt = read_checkpoint(path)
    if "optimizers" not in ckpt:
        raise UserError(f"{path} holds no optimiser state; only checkpoints that train.py wrote can be resumed")
    changed = [f"{k} was {v!r}, is {getattr(cfg, k, None)!r}" for k, v in ckpt["config"].items()
               if k not in FREE_TO_CHANGE and not k.startswith("eval_") and getattr(cfg, k, None) != v]
    if corpus and ckpt.get("corpus") != corpus:
        changed.append(f"the corpus was {str(ckpt.get('corpus'))[:12]}, is {corpus[:12]} (fingerprints)")
    if changed:
        raise UserError(f"cannot go on from {path}, these fields differ: {'; '.join(changed)}. Give them their old values, "
                        "or start another run")
    try:
        model.load_state_dict(ckpt["model"], strict=False)
        for optimizer, state in zip(optimizers, ckpt["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        for name in ema:
            ema[name].copy_(ckpt["ema"][name])
        return ckpt["step"], {key: ckpt[key] for key in ("train_seconds", "window", "skipped", "skipped_in_a_row")}
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise UserError(f"cannot go on from {path}: it does not fit this version of the code ({type(e).__name__}: "
                        f"{first_line(e)[:120]})") from None


# --- validation

@torch.no_grad()
def validation_loss(model: TTS, corpus: Corpus, cfg: Config, rank: int, world: int, device) -> dict[str, float]:
    """Losses on the same utterances, noise and times every time, without text dropout or silence tails."""
    still = dataclasses.replace(cfg, silence_prob=0.0, text_condition_dropout=0.0)
    rows = corpus.split("val", cfg)[:cfg.val_num_samples]
    n = max(1, cfg.batch_size // world)
    flow = duration = 0.0
    for start in range(rank * n, len(rows), world * n):
        batch = collate(corpus, rows[start:start + n], still, model.tokenise, VALIDATION_EPOCH)
        batch |= {"frames": torch.tensor(corpus.frames[rows].sum()), "utterances": torch.tensor(len(rows))}
        with autocast(cfg, device):
            losses = model({k: v.to(device) for k, v in batch.items()})
        flow, duration = flow + losses["flow_loss"].item(), duration + losses["duration_loss"].item()
    return {"val/flow_loss": over_ranks(dist.ReduceOp.SUM, flow, world, device),
            "val/duration_loss": over_ranks(dist.ReduceOp.SUM, duration, world, device)}


def main(argv: list[str]) -> None:
    cfg = load_config(argv)
    rank, world, device = start_ranks(cfg)
    out = Path(cfg.out_dir)
    if over_ranks(dist.ReduceOp.MAX, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), world, device):
        if (out / "latest.pt").exists() or not cfg.resume:  # torchrun started the ranks again: one of them had died
            cfg.resume = "latest"

    def say(message):
        if rank == 0:
            tell(message)

    # --- corpus, model, optimisers
    corpus = Corpus(cfg.data_dir, cfg)
    cfg.mel_mean = corpus.mel_stats[0] if cfg.mel_mean is None else cfg.mel_mean
    cfg.mel_std = corpus.mel_stats[1] if cfg.mel_std is None else cfg.mel_std
    say(corpus.describe(cfg))
    torch.manual_seed(cfg.seed)
    model = TTS(cfg).to(device)
    corpus.check_texts(model.tokenise, model.most_tokens)
    parts = ", ".join(f"{name} {count / 1e6:.2f} M" for name, (count, _) in parameter_table(model).items())
    say(f"parameters: {parts}; trainable {parameter_table(model)['total'][1] / 1e6:.2f} M")
    prompts = fingerprint = lock = None
    with on_all_ranks(world, device):
        if cfg.eval_interval:  # what evaluation needs is loaded once now, so that a missing download fails here
            prompts = evaluator.load_prompts(cfg, corpus)
            try:
                load_vocoder(cfg.eval_vocoder, cfg.eval_vocoder_model, device, cfg)
                if rank == 0:
                    evaluator.load_judge(cfg, device)
            except UserError as e:
                if not cfg.resume or not (out / "latest.pt").exists():
                    raise
                warn(f"evaluations will fail: {e}")  # hours of training are not thrown away for that
        if rank == 0:
            fingerprint, lock = corpus.check(), lock_folder(out)
    optimizers = make_optimizers(model, cfg)
    ema = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad} if cfg.ema_decay else {}
    with on_all_ranks(world, device):
        step, rest = resume_checkpoint(cfg, model, optimizers, ema, fingerprint)
    if over_ranks(dist.ReduceOp.MAX, step, world, device) != over_ranks(dist.ReduceOp.MIN, step, world, device):
        raise UserError(f"the ranks see different checkpoints (this one is at step {step}); out_dir {out} must lie on a "
                        "file system that all machines share")
    if cfg.compile:
        model.decoder.compile(dynamic=True)
    ddp = DistributedDataParallel(model, device_ids=[device.index] if cfg.gpus else None) if world > 1 else model

    # --- the run's folder
    steps = TrainingSteps(corpus, cfg, model.tokenise, rank, world)
    metrics, logged = None, set()
    if rank == 0:
        try:
            write_text(out / "config.yaml", to_yaml(cfg))
            metrics = Metrics(cfg, step)
            metrics.record_start(provenance(cfg, step, world, device, fingerprint)
                                 | {"steps_per_epoch": steps.steps_per_epoch})
        except OSError as e:
            raise UserError(f"cannot write to out_dir {out}: {e.strerror}; name another --out_dir") from None
        logged = metrics.logged  # what the run that goes on here has logged for this very step
    last_step = min(cfg.max_steps, cfg.max_epochs * steps.steps_per_epoch or cfg.max_steps)
    loader = training_loader(steps, step, cfg.loader_workers, pin=device.type == "cuda")
    say(f"{'from step ' + str(step) if step else 'training'} to step {last_step}: {world} rank(s) on {device.type}, "
        f"{cfg.effective_batch_size} utterances a step, {steps.steps_per_epoch} steps an epoch, in {out}")

    # --- a stop that was asked for
    asked_to_stop = []

    def on_signal(number, _):
        if asked_to_stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked_to_stop.append(signal.Signals(number).name)
    before = {number: signal.signal(number, on_signal)
              for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
              if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN}  # nohup asks not to hear it

    # --- the loop
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    train_seconds, skipped, in_a_row = (rest.get(k, 0) for k in ("train_seconds", "skipped", "skipped_in_a_row"))
    # What has come together since the last logged step. Losses of float32 are added up in float64, where that is exact,
    # so that neither the split over ranks nor a stop in between can change their mean.
    window = rest.get("window") or {"sums": [0.0] * 3, "steps": 0, "skipped": 0, "seconds": 0.0, "waited": 0.0, "frames": 0}
    sums = torch.tensor(window["sums"] if rank == 0 else [0.0] * 3, dtype=torch.float64, device=device)
    first_step = tried_step = step  # the latter: of the last checkpoint, written or not
    saved, compile_seconds = True, 0.0
    stop = 0  # 1: out of time, 2: asked to
    while True:
        # All ranks must come to the same verdict; asking costs a synchronisation, so GPUs ask at log steps only.
        if world == 1 or device.type == "cpu" or step % cfg.log_interval == 0:
            if rank == 0 and (out / "STOP").exists():
                asked_to_stop.append(f"{out}/STOP")
            stop = 2 if asked_to_stop else int(0 < cfg.max_train_seconds <= train_seconds)
            stop = over_ranks(dist.ReduceOp.MAX, stop, world, device)
        done = stop or step >= last_step
        moved = step > 0 and stop < 2  # who asks for a stop wants a checkpoint and no more
        val_due, eval_due, checkpoint_due = (moved and every and (done or step % every == 0)
                                             for every in (cfg.val_interval, cfg.eval_interval, cfg.checkpoint_interval))
        if step == first_step:  # the run that goes on here has done these already, unless it was stopped before
            val_due, eval_due = (over_ranks(dist.ReduceOp.MAX, due and key not in logged if rank == 0 else 0, world, device)
                                 for due, key in ((val_due, "val/flow_loss"), (eval_due, "time/eval_sec")))

        if val_due:
            with averaged(model, ema), naming_checkpoint(out, step):
                values = validation_loss(model, corpus, cfg, rank, world, device)
            if rank == 0:
                metrics.log(step, values)
            say(f"step {step}: validation flow loss {values['val/flow_loss']:.4f}, "
                f"duration loss {values['val/duration_loss']:.4f}")
        if step > tried_step and (done or eval_due or checkpoint_due):
            check_ranks_agree(model, world, device)
            total = sums.clone()
            if world > 1:
                dist.all_reduce(total)
            if rank == 0:
                rest = {"train_seconds": train_seconds, "skipped": skipped, "skipped_in_a_row": in_a_row,
                        "window": window | {"sums": total.tolist()}, "corpus": fingerprint,
                        "characters": corpus.stats.get("characters", "")}
                saved = metrics.attempt("the checkpoint", save_checkpoint, cfg, model, optimizers, ema, step, rest)
            tried_step = step
        if eval_due:
            say(f"step {step}: speaking {len(prompts)} prompts, {cfg.eval_steps} Euler steps each")
            try:
                with averaged(model, ema):
                    summary = evaluator.evaluate(model, cfg, prompts, out / "eval" / f"step_{step:08d}", device, step,
                                                 str(out / f"ckpt_step_{step:08d}.pt"), rank, world)
            except UserError as e:  # the same on all ranks
                summary = None
                say(f"step {step}: no evaluation: {e}")
            if rank == 0 and summary:
                rates = {} if summary["wer"] is None else {"eval/wer": summary["wer"], "eval/cer": summary["cer"]}
                metrics.log(step, rates | {"eval/alignment": summary["alignment"], "time/train_sec": train_seconds,
                                           "time/eval_sec": summary["total_seconds"]})
                metrics.media(step, out / "eval" / f"step_{step:08d}")
                try:
                    write_run_page(out)
                except Exception as e:  # it can be made anew at any time: python eval/page.py RUN
                    warn(f"no listening page in {out} ({type(e).__name__}: {first_line(e)})")
                if rates:
                    say(f"step {step}: WER {summary['wer']:.2%}, CER {summary['cer']:.2%} after "
                        f"{train_seconds / 60:.1f} min of training")
        if done:
            break

        tick = time.time()
        with naming_checkpoint(out, step):
            batches = next(loader)
        window["waited"] += time.time() - tick
        factor = lr_factor(step, cfg)
        for optimizer, peak in zip(optimizers, (cfg.learning_rate, cfg.adamw_learning_rate)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        # Nothing here draws from the global generator; a dropout that you add would, and should resume exactly too
        torch.manual_seed(hash((cfg.seed, step, rank)))
        step_sums = torch.zeros_like(sums)
        for micro, batch in enumerate(batches):
            batch = {k: v.to(device, non_blocking=True) for k, v in batch.items()}
            if world > 1:
                ddp.require_backward_grad_sync = micro == len(batches) - 1
            with autocast(cfg, device):
                losses = ddp(batch)
            (losses["loss"] * world).backward()  # DDP takes the ranks' mean, and the step's loss is their sum
            step_sums += torch.stack([losses[k].detach() for k in ("loss", "flow_loss", "duration_loss")])
        norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.grad_clip or math.inf)
        broken = over_ranks(dist.ReduceOp.MAX, not (norm + step_sums.sum()).isfinite().item(), world, device)
        if broken:  # on any rank: skip the step on all
            skipped, in_a_row, window["skipped"] = skipped + 1, in_a_row + 1, window["skipped"] + 1
        else:
            in_a_row = 0
            sums += step_sums
            for optimizer in optimizers:
                optimizer.step()
            if ema:
                update_ema(ema, model, cfg.ema_decay, step)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        step += 1
        window["steps"] += 1
        window["frames"] += int(batches[0]["frames"])
        if broken and in_a_row >= cfg.max_skipped_steps:
            ids = steps.utterances(step - 1)
            raise UserError(f"the loss or its gradient was not finite in {in_a_row} steps in a row, the last of them step "
                            f"{step} ({', '.join(ids[:64])}); the last good checkpoint is {last_checkpoint(out)}. Lower "
                            f"learning_rate, or look at the corpus: python data.py {cfg.data_dir}")

        log_now = step % cfg.log_interval == 0 or step >= last_step
        if log_now and world > 1:
            dist.all_reduce(sums)
        means = (sums / max(1, window["steps"] - window["skipped"])).tolist() if log_now else None  # waits for the device
        took, compiling = time.time() - tick, cfg.compile and step == first_step + 1  # compiling is no training
        if compiling:
            compile_seconds = took
        else:
            train_seconds += took
        window["seconds"] += took
        if log_now:
            if rank == 0:
                values = {"optim/lr": cfg.learning_rate * factor, "optim/skipped_steps": skipped,
                          "time/step_sec": window["seconds"] / window["steps"],
                          "time/data_wait_sec": window["waited"] / window["steps"],
                          "perf/frames_per_sec": window["frames"] / window["seconds"]}
                if window["steps"] > window["skipped"]:
                    values |= dict(zip(("train/loss", "train/flow_loss", "train/duration_loss"), means))
                if not broken:
                    values["optim/grad_norm"] = norm.item()
                if compile_seconds:
                    values["time/compile_sec"], compile_seconds = compile_seconds, 0.0
                metrics.log(step, values)
                metrics.line(step, last_step, values)
            sums.zero_()
            window = dict.fromkeys(window, 0)

    # --- the end
    for number, handler in before.items():
        signal.signal(number, handler)
    if rank == 0:
        (out / "STOP").unlink(missing_ok=True)  # heard
        metrics.close()
    why = f"stopped by {asked_to_stop[0]}" if asked_to_stop else "out of time" if stop else "done"
    say(f"{why} at step {step} after {train_seconds / 60:.1f} min of training, peak memory "
        f"{peak_memory(cfg.gpus > 0):.1f} GiB a rank; {last_checkpoint(out)}"
        + (" (go on with --resume latest)" if step < last_step else ""))
    if not saved:
        raise UserError(f"the checkpoint of step {step} could not be written; the last good one is {last_checkpoint(out)}")
    loader.close()
    if lock:
        lock.close()
    if world > 1:
        dist.destroy_process_group()
        # Gloo's threads outlive that (torch 2.13), and one that lets go of a tensor while Python is torn down aborts its
        # process: "terminate called without an active exception", in one run of hundreds. All is written, so leave at once.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    run_cli(main)
