"""Train a voice: one process, or one per GPU (or CPU rank) under torchrun.

    python train.py --config configs/grammar.yaml                                 # two CPU cores, nothing to download
    python train.py --config configs/ljspeech_overfit64.yaml                      # one GPU, the debugging gate
    torchrun --standalone --nproc_per_node 2 train.py --config configs/ljspeech.yaml
    python train.py --config configs/grammar.yaml --resume latest                 # go on after a stop

Everything that a run writes lies in its out_dir. Ctrl-C, SIGTERM, SIGUSR1, SIGHUP or a file named STOP in out_dir ends the
run after the current step, with a checkpoint. Without torchrun, a second Ctrl-C ends it at once.
"""
import dataclasses
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import distributed
import evaluator
from checkpoint import last_checkpoint, naming_checkpoint, numbered_checkpoint, resume_checkpoint, save_checkpoint
from common import UserError, run_cli, tell, write_file
from config import Config, load_config, to_yaml
from corpus import Corpus
from data import TrainingSteps, collate, describe, fitting_rows, training_loader, training_rows
from distributed import Ranks, any_rank, on_all_ranks, reduce_over_ranks
from metric import Metrics, Window, peak_memory, provenance
from model import TTS, autocast, parameter_table
from optim import averaged, describe_schedule_change, make_optimizers, set_learning_rates, start_ema, update_ema

LOSSES = ("loss", "flow_loss", "duration_loss", "share_loss", "alignment_loss")
VALIDATION_EPOCH = 2**31  # training never reaches this epoch, so validation has noise and times of its own


# --- set-up

def load_model(cfg: Config, ranks: Ranks) -> tuple[Corpus, TTS]:
    """Open the corpus, take its statistics into `cfg`, and build the model. Raises UserError."""
    corpus = Corpus(cfg.data_dir, cfg)
    cfg.mel_mean = corpus.mel_stats[0] if cfg.mel_mean is None else cfg.mel_mean
    cfg.mel_std = corpus.mel_stats[1] if cfg.mel_std is None else cfg.mel_std
    torch.manual_seed(cfg.seed)
    model = TTS(cfg).to(ranks.device)
    about = describe(corpus, cfg, model.tokenise)
    tokens = {corpus.ids[i]: len(model.tokenise(corpus.spoken[i])) for i in training_rows(corpus, cfg, model.tokenise)}
    if long := [utt_id for utt_id, count in tokens.items() if count > model.most_tokens]:
        raise UserError(f"{len(long)} text(s) of {corpus.dir} have more than the {model.most_tokens} tokens that the text "
                        f"encoder reads, such as those of {long[:5]}; shorten them, or lower block_size")
    if ranks.rank == 0:
        table = parameter_table(model)
        tell(f"{about}\nparameters: " + ", ".join(f"{part} {count / 1e6:.2f} M" for part, (count, _) in table.items())
             + f", of which {table['total'][1] / 1e6:.2f} M are trained")
    return corpus, model


# --- parts of the loop

@torch.no_grad()
def validation_losses(model: TTS, corpus: Corpus, cfg: Config, ranks: Ranks) -> dict[str, float]:
    """Losses on the same utterances, noise and times every time, without text dropout or silence tails.

    If training has tails, the predicted duration includes their mean, so the losses of duration and shares do not reach 0.
    """
    still = dataclasses.replace(cfg, silence_prob=0.0, text_condition_dropout=0.0)
    rows = fitting_rows(corpus, "val", cfg, model.tokenise)[0][:cfg.val_num_samples]
    n, sums = max(1, cfg.batch_size // ranks.world), dict.fromkeys(("flow_loss", "duration_loss", "share_loss"), 0.0)
    for start in range(ranks.rank * n, len(rows), ranks.world * n):
        batch = collate(corpus, rows[start:start + n], still, model.tokenise, VALIDATION_EPOCH)
        batch |= {"frames": torch.tensor(corpus.frames[rows].sum()), "utterances": torch.tensor(len(rows))}
        with autocast(cfg, ranks.device):
            losses = model({k: v.to(ranks.device) for k, v in batch.items()})
        sums = {name: value + losses[name].item() for name, value in sums.items()}
    return {f"val/{name}": reduce_over_ranks(dist.ReduceOp.SUM, value, ranks) for name, value in sums.items()}


def backward(model, batches: list[dict], cfg: Config, ranks: Ranks) -> torch.Tensor:
    """Forward and backward of a step's batches. Returns this rank's part of LOSSES, float64 (5,)."""
    sums = torch.zeros(len(LOSSES), dtype=torch.float64, device=ranks.device)
    for micro, batch in enumerate(batches):
        batch = {k: v.to(ranks.device, non_blocking=True) for k, v in batch.items()}
        if ranks.world > 1:
            model.require_backward_grad_sync = micro == len(batches) - 1
        with autocast(cfg, ranks.device):
            losses = model(batch)
        (losses["loss"] * ranks.world).backward()  # DDP takes the mean over ranks, but the step's loss is their sum
        sums += torch.stack([losses[name].detach() for name in LOSSES])
    return sums


def try_longest_batch(model, steps: TrainingSteps, cfg: Config, ranks: Ranks) -> None:
    """Forward and backward of the longest batch, so that want of memory shows now and not hours later. Raises UserError.

    Two passes, because with accumulation the second one finds memory taken by the gradients of the first. `momentum` takes
    the memory that Muon's momentum will need.
    """
    batch = steps.longest()
    counts = {"frames": batch["mel_lengths"].sum(), "utterances": torch.tensor(len(batch["mel"]))}
    try:
        momentum = [torch.empty_like(p) for p in model.parameters() if p.requires_grad]
        backward(model, [batch | counts] * 2, cfg, ranks)
        del momentum
    except torch.OutOfMemoryError:
        raise UserError(f"the longest {len(batch['mel'])} utterances, {batch['mel'].shape[1]} frames each, do not fit into "
                        f"the memory of {ranks.device}; lower batch_size and leave effective_batch_size = "
                        f"{cfg.effective_batch_size}, which accumulates gradients, or lower block_size") from None
    model.zero_grad(set_to_none=True)


def describe_divergence(cfg: Config, steps: TrainingSteps, step: int, in_a_row: int) -> str:
    ids = ", ".join(steps.utterances(step - 1)[:64])
    return (f"the gradient was not finite in {in_a_row} steps in a row, the last of them step {step} ({ids}); "
            f"the last good checkpoint is {last_checkpoint(Path(cfg.out_dir))}. Lower learning_rate, or look at the corpus: "
            f"python data.py {cfg.data_dir}")


# --- the run

def main(argv: list[str]) -> None:
    # --- set-up
    cfg = load_config(argv)
    ranks = distributed.start_ranks(cfg)
    out, say = Path(cfg.out_dir), tell if ranks.rank == 0 else lambda message: None
    restarted = any_rank(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), ranks)  # by torchrun, after a rank had died
    if restarted and ((out / "latest.pt").exists() or not cfg.resume):
        cfg.resume = "latest"
    evaluator.agree_on_judge(cfg, ranks)
    evaluated = any_rank(any(out.glob("eval/*/summary.json")), ranks)
    with on_all_ranks(ranks):
        corpus, model = load_model(cfg, ranks)
        prompts = evaluator.prepare(cfg, corpus, model.tokenise, ranks, evaluated) if cfg.eval_interval else []
        fingerprint = corpus.fingerprint()
        lock = distributed.lock_folder(out) if ranks.rank == 0 else None
    optimizers, ema = make_optimizers(model, cfg), start_ema(model, cfg.ema_decay)
    with on_all_ranks(ranks):
        ckpt = resume_checkpoint(cfg, model, optimizers, ema, fingerprint)
    first_step = step = ckpt["step"]
    if step and (before := ckpt["config"]["max_steps"]) != cfg.max_steps:
        say(describe_schedule_change(before, cfg, step))
    distributed.check_same_step(step, ranks)
    if cfg.compile:
        model.decoder.compile(dynamic=True)
    ddp = DistributedDataParallel(model, device_ids=[ranks.device.index] if cfg.gpus else None) if ranks.world > 1 else model
    trainable = [p for p in model.parameters() if p.requires_grad]
    steps = TrainingSteps(corpus, cfg, model.tokenise, ranks.rank, ranks.world)
    last_step = min(cfg.max_steps, cfg.max_epochs * steps.steps_per_epoch or cfg.max_steps)
    loader = training_loader(steps, step, cfg.loader_threads, pin=ranks.device.type == "cuda")
    with on_all_ranks(ranks):
        metrics = Metrics(cfg, step) if ranks.rank == 0 else None
        if metrics:
            write_file(out / "config.yaml", to_yaml(cfg))
            metrics.record_start(provenance(cfg, step, ranks.world, ranks.device, fingerprint))
    window = Window(LOSSES, ranks.device)
    if "window" in ckpt:
        window.load(ckpt["window"], ranks)
    train_seconds, skipped, in_a_row = (ckpt.get(k, 0) for k in ("train_seconds", "skipped", "skipped_in_a_row"))
    characters = "".join(sorted({*corpus.spoken_characters, *filter(str.isalpha, ckpt.get("characters", ""))}))
    # tried_step: of the newest checkpoint here, even if its write failed. A run that goes on in a new folder has none
    saved, tried_step, ckpt = True, step if not step or numbered_checkpoint(out, step).exists() else -1, None
    say(f"from {f'step {step}' if step else cfg.init_from or 'scratch'} to step {last_step}: {ranks.world} rank(s) on "
        f"{ranks.device.type}, {cfg.effective_batch_size} utterances a step, {steps.steps_per_epoch} steps an epoch; {out}")

    # --- the loop
    model.train()
    start = time.time()
    try_longest_batch(ddp, steps, cfg, ranks)
    if cfg.compile and metrics:
        metrics.log(step, {"time/compile_sec": time.time() - start})
    with distributed.stop_signals() as asked:
        while True:
            # Validate, save, evaluate
            stop = distributed.agree_to_stop(cfg, step, train_seconds, asked, ranks)
            done = stop or step >= last_step
            val_due, eval_due, save_due = (step > 0 and stop < 2 and every and (done or step % every == 0) for every in
                                           (cfg.val_interval, cfg.eval_interval, cfg.checkpoint_interval))
            if step == first_step:  # a resumed run may have done these before it stopped
                val_due, eval_due = (any_rank(metrics and due and key not in metrics.logged, ranks) for due, key in
                                     ((val_due, "val/flow_loss"), (eval_due, "time/eval_sec")))
            if val_due:
                with averaged(model, ema), naming_checkpoint(out, step):
                    losses = validation_losses(model, corpus, cfg, ranks)
                if metrics:
                    metrics.log(step, losses)
                say(f"step {step}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
            if step > tried_step and (done or eval_due or save_due):
                distributed.check_ranks_agree(model, ranks)
                state = {"train_seconds": train_seconds, "skipped": skipped, "skipped_in_a_row": in_a_row,
                         "window": window.state(ranks), "corpus": fingerprint, "characters": characters}
                if metrics:
                    saved = metrics.attempt("the checkpoint", save_checkpoint, cfg, model, optimizers, ema, step, state)
                tried_step = step
            if eval_due:
                with averaged(model, ema):
                    evaluator.evaluate_run(model, cfg, prompts, step, train_seconds, metrics, ranks, first=not evaluated)
                evaluated = True  # only the first evaluation of a run must not fail
            if done:
                break

            # Train
            start = time.time()
            with naming_checkpoint(out, step):
                batches = next(loader)
            waited = time.time() - start
            lr = set_learning_rates(optimizers, cfg, step)
            torch.manual_seed(hash((cfg.seed, step, ranks.rank)))  # for a dropout that you may add: it resumes exactly too
            losses = backward(ddp, batches, cfg, ranks)
            norm = torch.nn.utils.clip_grad_norm_(trainable, cfg.grad_clip or math.inf)
            broken = not norm.isfinite().item()  # on all ranks or on none, as DDP has added up their gradients
            if not broken:
                for optimizer in optimizers:
                    optimizer.step()
                update_ema(ema, model, cfg.ema_decay, step)
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            step, skipped, in_a_row = step + 1, skipped + broken, in_a_row + 1 if broken else 0
            if in_a_row >= cfg.max_skipped_steps:
                raise UserError(describe_divergence(cfg, steps, step, in_a_row))

            # Log
            took = time.time() - start
            train_seconds += took
            window.add(losses, int(batches[0]["frames"]), took, waited, broken)
            if step % cfg.log_interval == 0 or step >= last_step:
                means = {f"train/{name}": mean for name, mean in window.means(ranks).items()}
                if metrics:
                    values = {"optim/lr": lr, "optim/skipped_steps": skipped, **window.rates(), **means}
                    values |= {} if broken else {"optim/grad_norm": norm.item()}
                    metrics.log(step, values)
                    metrics.line(step, last_step, values)
                window.clear()

    # --- the end
    loader.close()
    if metrics:
        (out / "STOP").unlink(missing_ok=True)
        metrics.close()
    reason = f"stopped by {asked[0]}" if asked else ("done", "out of time", "stopped by another rank")[stop]
    say(f"{reason} at step {step} after {train_seconds / 60:.1f} min of training, peak memory "
        f"{peak_memory(cfg.gpus > 0):.1f} GiB per rank; {last_checkpoint(out)}"
        + (" (go on with --resume latest)" if step < last_step else ""))
    if not saved:
        raise UserError(f"the checkpoint of step {step} could not be written; the last good one is {last_checkpoint(out)}")
    if lock:
        lock.close()
    distributed.end_ranks(ranks)


if __name__ == "__main__":
    run_cli(main)
