"""Speak lines that are hard to read aloud, and count in how many the judge hears all the words that it must.

    python eval/hard.py --ckpt RUN/latest.pt                    # eval/hard_prompts.txt, into RUN/eval/hard
    python eval/hard.py --ckpt RUN/latest.pt --no_normalise --out_dir /tmp/as_written

A line of the file is `group<tab>text<tab>words`. The words must be heard in this order; `a|b` is either. In the groups
letter, digit and word nothing else may be heard. The judge's texts are written out (normalise.py) before they are compared,
so "$45" and "forty-five dollars" are equal. Config fields are flags, as for evaluator.py, which does the rest.
"""
import dataclasses
import json
import re
from pathlib import Path

from checkpoint import load_checkpoint
from common import UserError, pick_device, run_cli, write_file
from config import from_flags, split_flags
from distributed import Ranks
from eval.judge import choose_judge
from evaluator import evaluate, evaluation_folder, file_prompt
from normalise import LETTERS, fold, write_out

ALONE = ("letter", "digit", "word")


def read_hard_prompts(path: str) -> list[tuple[str, str, str]]:
    """The (group, text, words) of each line. Raises UserError."""
    try:
        rows = [tuple(line.split("\t")) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read {path}: {e}; expected lines of group, text and words") from None
    if not rows or any(len(row) != 3 or not row[2].strip() for row in rows):
        raise UserError(f"{path}: expected in each line a group, a text and the words to hear, with tabs between them")
    return rows


def words_of(text: str) -> list[str]:
    """The words of what a judge wrote, in lower case and written out, long numbers digit by digit."""
    text = re.sub("[0-9]{5,}", lambda m: " ".join(m[0]), text)
    text = fold(write_out(text), "abcdefghijklmnopqrstuvwxyz' ")
    return [LETTERS.get(word, word) for word in text.split()]


def all_heard(words: str, hypothesis: str, group: str) -> bool:
    """Whether the words occur in the hypothesis in their order, and alone if the group asks for that."""
    wanted, heard = [[" ".join(words_of(one)) for one in word.split("|")] for word in words.split()], words_of(hypothesis)
    if group in ALONE:
        return len(wanted) == 1 and " ".join(heard) in wanted[0]
    rest = f" {' '.join(heard)} "
    for options in wanted:
        found = [(rest.index(f" {one} "), one) for one in options if f" {one} " in rest]
        if not found:
            return False
        at, one = min(found)
        rest = rest[at + len(one) + 1:]
    return True


def main(argv: list[str]) -> None:
    as_written = [flag for flag in argv if flag in ("--no_normalise", "--no-normalise")]
    flags = split_flags([flag for flag in argv if flag not in as_written], extra=("ckpt", "prompts", "device"))
    if "ckpt" not in flags:
        raise UserError("--ckpt is missing; expected a checkpoint such as .artifacts/local/demo/latest.pt")
    path, device, out = flags.pop("ckpt"), pick_device(flags.pop("device", "auto")), flags.pop("out_dir", None)
    source = flags.pop("prompts", str(Path(__file__).with_name("hard_prompts.txt")))
    rows = read_hard_prompts(source)
    model, ckpt = load_checkpoint(path, device)
    cfg = model.cfg = from_flags(flags | {"eval_prompts": source}, base=dataclasses.asdict(model.cfg))
    cfg.eval_judge = choose_judge(cfg, device)
    if cfg.eval_judge == "none":
        raise UserError("eval_judge = 'none': there is no judge for the lines; expected whisper or ctc")
    cfg.normalise &= not as_written
    prompts = [file_prompt(text, cfg, ckpt.get("characters", "")) for _, text, _ in rows]
    out = Path(out or evaluation_folder(path, "hard"))
    evaluate(model, cfg, prompts, out, Ranks(0, 1, device), ckpt["step"], path)
    table, counts = ["| group | text | spoken | heard | all words |", "|---|---|---|---|---|"], {}
    for (group, text, words), line in zip(rows, (out / "wer.jsonl").read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        good = all_heard(words, row["hypothesis"], group)
        counts.setdefault(group, []).append(good)
        table.append(f"| {group} | {text} | {row.get('spoken', text)} | {row['hypothesis']} | {'yes' if good else 'no'} |")
    longer = [good for group, of_group in counts.items() if group not in ALONE for good in of_group]
    table += ["", "| group | lines with all words heard | lines |", "|---|---|---|"]
    table += [f"| {group} | {sum(of_group)} | {len(of_group)} |" for group, of_group in counts.items()]
    table.append(f"| all but {', '.join(ALONE)} | {sum(longer)} | {len(longer)} |")
    write_file(out / "hard.md", "\n".join(table) + "\n")
    print("\n".join(table))


if __name__ == "__main__":
    run_cli(main)
