"""The page behind `sample.py --serve`: a text, some knobs, a player, and the log-mel. Needs gradio, which is optional."""
import io
import os

import numpy as np

from config import UserError
from eval.page import draw_mel
from model import TTS
from sample import read_pieces, read_sentences, speak

MOST_CHARACTERS = 5000  # of a text, about six minutes: the page holds its sound in memory


def serve(model: TTS, vocode, steps: int, cfg_scale: float, host: str, port: int) -> None:
    """Show the page on `host`:`port` until Ctrl-C. Raises UserError if gradio is not there, or the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it would ask its makers' servers for its version and more
    try:
        import gradio as gr
    except ImportError as e:
        raise UserError(f"--serve needs a package that is not installed ({e.name}): pip install 'gradio>=6,<7'") from None
    from PIL import Image
    cfg = model.cfg

    def say(text, steps, cfg_scale, speed, seed):
        try:
            if len(text) > MOST_CHARACTERS:
                raise UserError(f"the text has {len(text):,} characters; this page takes {MOST_CHARACTERS:,}, and sample.py "
                                "any number")
            wavs, mels = [], []
            pieces = read_pieces(model, read_sentences([text]), speed)
            for piece, mel, wav in speak(model, vocode, pieces, 1, int(seed), cfg.eval_batch_size, steps=int(steps),
                                         cfg_scale=cfg_scale, speed=speed):
                wavs += [*wav, np.zeros(round(piece.pause * cfg.sample_rate), np.float32)]
                mels += mel
            if not wavs:
                raise UserError("nothing to say in the text; expected some words")
        except UserError as e:
            raise gr.Error(str(e)) from None
        wav = (np.concatenate(wavs[:-1]).clip(-1, 1) * 32767).round().astype(np.int16)
        return (cfg.sample_rate, wav), Image.open(io.BytesIO(draw_mel(np.concatenate(mels), cfg)))

    with gr.Blocks(title="nanoAudioDiffusion") as page:
        gr.Markdown("# nanoAudioDiffusion")
        with gr.Row():
            with gr.Column():
                text = gr.Textbox(label="Text", lines=5, autofocus=True)
                go = gr.Button("Speak", variant="primary")
                knobs = [gr.Slider(1, 100, steps, step=1, label="Steps", info="more are slower and finer"),
                         gr.Slider(0, 6, cfg_scale, step=0.1, label="Guidance", info="1 is none; more: closer to the text"),
                         gr.Slider(0.5, 2, 1, step=0.05, label="Speed"),
                         gr.Number(0, label="Seed", precision=0, minimum=0)]
            with gr.Column():
                sound = gr.Audio(label="Speech", format="wav")
                picture = gr.Image(label="Log-mel", format="png")
        gr.on([go.click, text.submit], say, [text, *knobs], [sound, picture], api_name="speak")
    system = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # its own fonts come from a server
    try:
        page.launch(server_name=host, server_port=port, theme=system, show_error=True, ssr_mode=False)
    except OSError as e:
        raise UserError(f"cannot serve on {host}:{port}: {e}; give another --port or --host") from None
