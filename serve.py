"""A web page to type a text into. It speaks and shows the log-mel. Needs gradio: pip install 'gradio>=6,<7'.

    python serve.py                                                              # voices/joe, at http://127.0.0.1:7860
    python serve.py --ckpt RUN/latest.pt --host 0.0.0.0 --port 8000 --steps 50   # for the whole network
"""
import argparse
import io
import os

import numpy as np
from PIL import Image

from common import UserError, run_cli
from eval.picture import mel_png
from sample import add_voice_flags, load_voice, read_pieces, synthesize


def build_page(gr, model, vocode, steps: int, cfg_scale: float, temperature: float, characters: str, normalise: bool):
    """The page. `gr` is the module gradio. `steps`, `cfg_scale` and `temperature` are what the page shows at first.

    `characters` and `normalise` are those of `read_pieces`.
    """
    cfg = model.cfg

    def respond(text, steps, cfg_scale, temperature, speed, seed):
        wavs, mels = [], []
        try:
            pieces = read_pieces(model, [[text]], speed, characters=characters, normalise=normalise)
            for piece, mel, wav in synthesize(model, vocode, pieces, cfg.eval_batch_size, seed=int(seed), steps=int(steps),
                                              cfg_scale=cfg_scale, temperature=temperature, speed=speed):
                wavs += [wav, np.zeros(round(piece.pause * cfg.sample_rate), np.float32)]
                mels.append(mel)
        except UserError as e:
            raise gr.Error(str(e)) from None
        wav = (np.concatenate(wavs[:-1]).clip(-1, 1) * 32767).round().astype(np.int16)
        return (cfg.sample_rate, wav), Image.open(io.BytesIO(mel_png(np.concatenate(mels), cfg)))

    inputs = [gr.Textbox(label="Text", lines=5, autofocus=True, max_length=5000),
              gr.Slider(1, 100, steps, step=1, label="Steps", info="more take longer"),
              gr.Slider(0, 6, cfg_scale, step=0.1, label="Guidance", info="1 is none; more keeps closer to the text"),
              gr.Slider(0, 1.5, temperature, step=0.05, label="Temperature", info="less is cleaner and less varied"),
              gr.Slider(0.5, 2, 1, step=0.05, label="Speed"),
              gr.Number(0, label="Seed", precision=0, minimum=0)]
    outputs = [gr.Audio(label="Speech", format="wav"), gr.Image(label="Log-mel", format="png")]
    return gr.Interface(respond, inputs, outputs, title="nanoAudioDiffusion", submit_btn="Speak", clear_btn=None,
                        flagging_mode="never", api_name="speak")


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_voice_flags(p)
    p.add_argument("--host", default="127.0.0.1", help="the address to listen on; 0.0.0.0: all of this machine's")
    p.add_argument("--port", type=int, default=7860)
    args = p.parse_args(argv)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # otherwise gradio contacts its makers' servers
    try:
        import gradio as gr
    except ImportError as e:
        raise UserError(f"the page needs a package that is not installed ({e.name}): pip install 'gradio>=6,<7'") from None
    model, vocode, ckpt = load_voice(args)
    page = build_page(gr, model, vocode, args.steps, args.cfg_scale, args.temperature, ckpt.get("characters", ""),
                      args.normalise)
    fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # gradio's own are downloaded
    try:
        page.launch(server_name=args.host, server_port=args.port, theme=fonts, show_error=True, ssr_mode=False)
    except OSError as e:
        raise UserError(f"cannot serve on {args.host}:{args.port}: {e}; give another --port or --host") from None


if __name__ == "__main__":
    run_cli(main)
