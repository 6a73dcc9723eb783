"""The web page, in a real Chromium; skipped without gradio or a browser."""
import contextlib
import dataclasses
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_model import small_model

import sample
import serve
from common import UserError
from text import SENTENCE

ROOT = Path(__file__).resolve().parents[1]


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install 'gradio"):
        serve.main(["--ckpt", "never read"])


def test_sample_starts_the_page_with_its_flags(monkeypatch):
    class Started(Exception):
        pass

    def start(*words):
        raise Started(*words)
    monkeypatch.setattr("os.execv", start)
    with pytest.raises(Started) as e:
        sample.main(["--ckpt", "x.pt", "--serve", "--port", "1"])
    assert e.value.args == (sys.executable, [sys.executable, str(ROOT / "serve.py"), "--ckpt", "x.pt", "--port", "1"])


@pytest.fixture
def page(tmp_path):
    """A model, its page's address, and the page's flags."""
    pytest.importorskip("gradio", reason="no gradio here; pip install 'gradio>=6,<7'")
    model = small_model().eval()
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, tmp_path / "c.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = ["--ckpt", str(tmp_path / "c.pt"), "--port", str(port), "--steps", "2", "--device", "cpu"]
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen([sys.executable, "serve.py", *flags], cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < deadline, (log.seek(0), log.read())
                time.sleep(0.1)
            yield model, f"http://127.0.0.1:{port}", flags
        finally:
            server.terminate()
            server.wait(60)


@pytest.mark.slow
def test_one_types_presses_and_hears(page, chromium):
    from selenium.webdriver.support.ui import WebDriverWait
    model, address, flags = page

    def until(script):
        return WebDriverWait(chromium, 60, 0.1).until(lambda b: b.execute_script(f"return {script}"), script)

    def field(label):
        return chromium.find_element("xpath", f"//label[.//span[contains(., '{label}')]]//*[self::textarea or self::input]")

    def speak(text):
        field("Text").clear()
        field("Text").send_keys(text)
        chromium.execute_script("[...document.querySelectorAll('button')].find(b => b.textContent.trim() == 'Speak').click()")
    chromium.get(address)
    until("[...document.querySelectorAll('button')].some(b => b.textContent.trim() == 'Speak')")
    shown = chromium.execute_script("return document.body.innerText")
    assert all(label in shown for label in ("Steps", "Guidance", "Temperature", "Speed", "Seed"))
    speak("One short line. And a second one.")
    wav = until("[...document.querySelectorAll('a[download]')].map(a => a.href).find(s => s.includes('.wav'))")
    chromium.set_script_timeout(60)
    seconds = chromium.execute_async_script("const a = new Audio(arguments[0]); a.onloadedmetadata = () => arguments[1](a.duration); "
                                            "a.onerror = () => arguments[1](-1);", wav)
    frames = sum(len(mel) for mel in sample.sample(model, ["One short line.", "And a second one."], steps=1))
    assert seconds == pytest.approx(frames * 256 / 22050 + SENTENCE, abs=0.02)
    until("[...document.images].some(i => i.src.includes('.png') && i.naturalWidth > 100)")  # the log-mel
    outside = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('blob:') && !n.startsWith('data:'))"
    assert chromium.execute_script(f"return {outside}") == []
    speak("…")
    until("document.body.innerText.includes('nothing to say')")
    chromium.get_log("browser")  # the browser logs the refusal too; leave an empty log to the next test
    with pytest.raises(UserError, match="give another --port"):
        serve.main(flags)
