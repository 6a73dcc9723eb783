"""The page to type into, in a real Chromium; skipped without gradio or a browser."""
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

import serve
from config import UserError
from sample import SENTENCE, sample

ROOT = Path(__file__).resolve().parents[1]
TEXT = "One short line. And a second one."


def test_without_gradio_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install 'gradio"):
        serve.serve(small_model(), None, 1, 2.0, "127.0.0.1", 0)


@pytest.fixture
def page(tmp_path):
    """A model, and the address of its page."""
    pytest.importorskip("gradio", reason="no gradio here; pip install 'gradio>=6,<7'")
    model = small_model().eval()
    torch.save({"model": model.saved_state(), "ema": {}, "step": 3, "config": dataclasses.asdict(model.cfg)}, tmp_path / "c.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "sample.py", "--ckpt", str(tmp_path / "c.pt"), "--serve", "--port", str(port), "--steps", "2",
               "--device", "cpu"]
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                assert server.poll() is None and time.monotonic() < deadline, (log.seek(0), log.read())
                time.sleep(0.1)
            yield model, f"http://127.0.0.1:{port}", command
        finally:
            server.terminate()
            server.wait(60)


def test_one_types_presses_and_hears(page, chromium):
    from selenium.webdriver.support.ui import WebDriverWait
    model, address, command = page

    def until(script):
        return WebDriverWait(chromium, 60, 0.1).until(lambda b: b.execute_script(f"return {script}"), script)

    def field(label):
        return chromium.find_element("xpath", f"//label[.//span[contains(., '{label}')]]//*[self::textarea or self::input]")
    chromium.get(address)
    until("[...document.querySelectorAll('button')].some(b => b.textContent.trim() == 'Speak')")
    field("Text").send_keys(TEXT)
    press = "[...document.querySelectorAll('button')].find(b => b.textContent.trim() == 'Speak').click()"
    chromium.execute_script(press)
    found = until("[...document.querySelectorAll('a[download]')].map(a => a.href).find(s => s.includes('.wav'))")
    chromium.set_script_timeout(60)
    seconds = chromium.execute_async_script("const a = new Audio(arguments[0]); a.onloadedmetadata = () => arguments[1](a.duration); "
                                            "a.onerror = () => arguments[1](-1);", found)
    frames = sum(len(mel) for mel in sample(model, ["One short line.", "And a second one."], steps=1))
    assert seconds == pytest.approx(frames * 256 / 22050 + SENTENCE, abs=0.02)
    until("[...document.images].some(i => i.src.includes('.png') && i.naturalWidth > 100)")  # the log-mel
    outside = "performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('blob:') && !n.startsWith('data:'))"
    assert chromium.execute_script(f"return {outside}") == []
    field("Text").clear()
    field("Text").send_keys("…")
    chromium.execute_script(press)
    until("document.body.innerText.includes('nothing to say')")
    chromium.get_log("browser")  # of a refusal the browser tells too; the next test starts anew
    taken = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert taken.returncode == 2 and "give another --port" in taken.stderr and "Traceback" not in taken.stderr
