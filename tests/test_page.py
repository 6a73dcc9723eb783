"""The listening pages: their HTML, and how they look and work in a real Chromium (skipped where there is none)."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rapidfuzz.distance import Levenshtein

import audio
import common
from common import UserError
from eval import page
from eval.page import main, marks, write_page, write_run_page

ROOT = Path(__file__).resolve().parents[1]
RATE, SECONDS = 8000, 2.0
SCRIPT = "</script><script>window.broken = 1</script>"
PROMPTS = ["The quiet baker and the tired cat sang under the church.", SCRIPT, "\"Quotes\" & 'more' <b>of</b>\u2028them",
           "שלום לכולם", "Zebras 😀 and naïve cafés", "word " * 300 + "W" * 2000]
HEARD = ["the quiet baeker and tired cat sang under the the church", "script", "quotes more of them", "שלום", None, "word"]
WER = [0.3, 2.0, 0.0, 0.5, None, 10.0]  # some of each: above 1, 0, none


def tone(path, seconds=SECONDS, pitch=440.0):
    audio.write_wav(path, 0.3 * np.sin(2 * np.pi * pitch / RATE * np.arange(int(seconds * RATE))), RATE)


def evaluation(folder, step=1000, full=True, prompts=PROMPTS, wer=WER, **summary):
    """The folder of a small evaluation. `full` adds everything that is optional."""
    folder.mkdir(parents=True)
    rows = []
    for n, prompt in enumerate(prompts):
        row = {"idx": n, "audio": f"{n:06d}.wav", "reference": prompt, "hypothesis": HEARD[n % len(HEARD)],
               "wer": wer[n % len(wer)], "cer": wer[n % len(wer)] and wer[n % len(wer)] / 2, "predicted_seconds": SECONDS}
        tone(folder / row["audio"], pitch=200.0 + 50 * n)
        if full:
            row |= {"vocoded": f"{n:06d}_vocoded.wav", "recording": f"{n:06d} recording #1.wav", "recording_seconds": SECONDS / 2,
                    "alignment_score": 0.9, "mcd": 5.25 if n else float("nan"), "vocoded_hypothesis": "vocoded", "vocoded_wer": 0.1, "vocoded_cer": 0.05}
            row |= {"dnsmos": 3.25, "vocoded_dnsmos": 3.5, "likeness": 0.9, "f0_spread": 2.0, "f0_correlation": 0.75} if n < 4 else {}
            for key in ("vocoded", "recording"):
                tone(folder / row[key], SECONDS / 2)
            for key in ("mel_png", "recording_mel_png", "attention_png"):
                row[key] = f"{n:06d}_{key}.png"
                Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 20), np.uint8)).save(folder / row[key])
        rows.append(json.dumps(row, ensure_ascii=False))
    (folder / "wer.jsonl").write_text("\n".join(rows), encoding="utf-8")
    summary = {"step": step, "ckpt": "latest.pt", "prompts": "val", "count": len(prompts), "wer": 0.4, "cer": 0.0004,
               "judge": "ctc", "judge_floor": {"wer": 0.002, "cer": 0.0003}, "vocoder": "griffinlim"} | summary
    if full:
        summary |= {"wer_interval": [0.31, 0.52], "vocoded_wer": 0.012, "alignment_score": 0.91, "mcd": 5.3, "duration_error": 0.05,
                    "dnsmos": 3.21, "vocoded_dnsmos": 3.43, "recording_dnsmos": 3.98, "f0_mean": 101.2, "f0_spread": 2.2}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def run_folder(path, steps=(1000, 2000, 3000), **kwargs):
    for n, step in enumerate(steps):
        evaluation(path / "eval" / f"step_{step:08d}", step, wer=[w and w / (n + 1) for w in WER], **kwargs)
    lines = [{"step": s, "train/flow_loss": 2 / s, "val/flow_loss": float("nan") if s == 10 else 1 / s}
             for s in range(10, 3001, 2)] + [{"step": s, "eval/wer": 0.5, "eval/cer": 100 / s, "eval/alignment_score": 0.9} for s in steps]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3001, "train/fl')
    return path


# --- the HTML

@pytest.mark.parametrize("reference, hypothesis, left, right", [
    ("A cat sat.", "a cat, sat", [("", "A cat sat.")], [("", "a cat, sat")]),  # case and punctuation are not errors
    ("don’t — forty-two", "don't forty two", [("", "don’t — forty-two")], [("", "don't forty two")]),
    ("one two three", "one three", [("", "one "), ("del", "two"), ("", " three")], [("", "one three")]),
    ("one two", "one one two", [("", "one two")], [("", "one "), ("ins", "one"), ("", " two")]),
    ("a baker.", "a baeker", [("", "a "), ("near", "baker.")], [("", "a "), ("near", "ba"), ("sub", "e"), ("near", "ker")]),
    ("cart a x", "cat x", [("near", "ca"), ("sub", "r"), ("near", "t"), ("", " "), ("del", "a"), ("", " x")],
     [("near", "cat"), ("", " x")]),
    ("cat", "dog", [("sub", "cat")], [("sub", "dog")]),
    ("", "word", [], [("ins", "word")]),
    ("word", "", [("del", "word")], []),
])
def test_marks(reference, hypothesis, left, right):
    assert marks(reference, hypothesis) == [left, right]


def test_marks_count_as_the_word_error_rate_does():
    import jiwer
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = (" ".join(rng.choice(["a", "cat", "cart", "the", "then", "he"], n)) for n in rng.integers(1, 12, 2))
        left, right = marks(a, b)
        assert "".join(text for _, text in left) == a and "".join(text for _, text in right) == b
        edits = Levenshtein.opcodes(a.split(), b.split())
        wrong = sum(max(e.src_end - e.src_start, e.dest_end - e.dest_start) for e in edits if e.tag != "equal")
        assert wrong == round(jiwer.wer(a, b) * len(a.split()))


def test_text_is_escaped_and_nothing_comes_from_outside(tmp_path):
    run = run_folder(tmp_path / "a <run>")
    main([str(run)])
    for path in (run / "index.html", run / "eval/step_00001000/index.html"):
        html = path.read_text(encoding="utf-8")
        assert "<script>window" not in html and html.count("</script>") == (2 if path.parent == run else 1)
        assert "a &lt;run&gt;" in html and "a <run>" not in html and "NaN" not in html.split("<script>")[0]
        for outside in ('src="http', 'href="http', "src=\"/", "@import", "url(", "fetch(", "importScripts"):
            assert outside not in html
    html = (run / "eval/step_00001000/index.html").read_text(encoding="utf-8")
    assert "&lt;/script&gt;&lt;script&gt;window.broken = 1" in html
    assert 'src="000000%20recording%20%231.wav"' in html and html.count('preload="none"') == html.count("<audio") == 18
    for number in ("40.0\u202f%", "31.0\u202f% to 52.0\u202f%", "vocoder copy: 1.2\u202f%", "judge on recordings: 0.03\u202f%",
                   "0.910", "5.30 dB", "5.0%"):
        assert number in html


def test_a_page_of_64_prompts_is_light(tmp_path):
    folder = evaluation(tmp_path / "e", prompts=[f"{PROMPTS[0]} {n}" for n in range(64)])
    assert write_page(folder).stat().st_size < 500_000
    assert sum(f.stat().st_size for f in folder.iterdir()) < 20e6


def read_data(run):
    return json.loads((run / "index.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0])


def test_what_is_missing_is_left_out(tmp_path, capsys):
    run = run_folder(tmp_path, full=False)
    one, _, three = (run / "eval" / f"step_0000{n}000" for n in (1, 2, 3))
    (one / "000000.wav").unlink()
    (three / "summary.json").unlink()  # it is being written
    (run / "eval" / "step_1_other").mkdir()
    write_run_page(run)
    assert "left out" in capsys.readouterr().err
    html = write_page(one).read_text(encoding="utf-8")
    assert "no audio file" in html and "<th" in html and "MCD" not in html and "000000.wav" not in html
    data = read_data(run)
    assert [e["step"] for e in data["evaluations"]] == [1000, 2000] and data["prompts"] == PROMPTS
    assert all(len(line) <= page.CURVE_POINTS for panel in data["panels"] for line in panel["lines"].values())
    assert "audio" not in data["evaluations"][0]["rows"]["0"] and "audio" in data["evaluations"][1]["rows"]["0"]
    shutil.rmtree(run / "eval")
    write_run_page(run)  # before the first evaluation: curves alone
    (tmp_path / "lines").mkdir()  # as sample.py --file writes it: nothing was judged
    (tmp_path / "lines" / "wer.jsonl").write_text('{"idx": 0, "audio": "0.wav", "reference": "a text", "predicted_seconds": 1}\n')
    (tmp_path / "lines" / "summary.json").write_text('{"ckpt": "latest.pt", "count": 1}')
    html = write_page(tmp_path / "lines").read_text(encoding="utf-8")
    assert "a text" in html and "WER</" not in html and "<dd>latest.pt" in html and "1.00</td>" in html


def test_prompts_that_change_or_repeat_are_told_apart(tmp_path):
    evaluation(tmp_path / "eval/step_00000001", 1, full=False, prompts=["a", "b", "a"])
    evaluation(tmp_path / "eval/step_00000002", 2, full=False, prompts=["c", "a"])
    write_run_page(tmp_path)
    data = read_data(tmp_path)
    assert data["prompts"] == ["a", "b", "a", "c"]
    assert [list(e["rows"]) for e in data["evaluations"]] == [["0", "1", "2"], ["3", "0"]]
    assert data["evaluations"][1]["rows"]["0"]["audio"] == "eval/step_00000002/000001.wav"


def test_wrong_folders_end_in_one_line(tmp_path, monkeypatch):
    for wrong in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError, match="holds neither a run .* expected"):
            main([str(wrong)])
    folder = evaluation(tmp_path / "e", full=False)
    before = write_page(folder).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot write .*No space"):
        patch.setattr(common.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        write_page(folder)
    assert (folder / "index.html").read_bytes() == before
    (folder / "summary.json").write_text('{"step": ')
    with pytest.raises(UserError, match="damaged"):
        main([str(folder)])
    (folder / "wer.jsonl").unlink()
    with pytest.raises(UserError, match="is damaged|cannot read .*wer.jsonl"):
        main([str(folder)])


@pytest.mark.slow
def test_the_command_line(tmp_path):
    run = run_folder(tmp_path / "run", full=False)
    done = subprocess.run([sys.executable, ROOT / "eval/page.py", "run"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("index.html\n") and not done.stderr
    assert len(list(run.glob("**/index.html"))) == 4


# --- in a browser

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = run_folder(tmp_path_factory.mktemp("page") / "run #1")
    main([str(path)])
    return path


@pytest.fixture
def browser(chromium):
    yield chromium
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert chromium.get_log("browser") == []  # no error, nor a warning


def js(browser, script, *args):
    return browser.execute_script(script, *args)


def until(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait
    WebDriverWait(browser, 60, 0.05).until(lambda b: js(b, f"return {condition}"), condition)


def keys(browser, *pressed):
    from selenium.webdriver.common.action_chains import ActionChains
    ActionChains(browser, duration=0).send_keys(*pressed).perform()


def click(browser, selector):
    browser.find_element("css selector", selector).click()


DURATIONS = """const done = arguments[0], all = [...document.querySelectorAll("audio[src]")];
Promise.all(all.map(a => new Promise(ok => { a.onloadedmetadata = a.onerror = () => ok(a.duration); a.preload = "auto"; a.load(); })))
  .then(done);"""
SLOW = "for (const a of document.querySelectorAll('audio')) a.defaultPlaybackRate = a.playbackRate = arguments[0]"
ORDER = "return [...document.querySelectorAll('tbody tr')].filter(r => !r.hidden).map(r => +r.cells[0].textContent)"


@pytest.mark.slow
def test_an_evaluation_is_heard_and_seen(browser, run):
    browser.get((run / "eval/step_00001000/index.html").as_uri())
    durations = browser.execute_async_script(DURATIONS)
    assert durations == pytest.approx([SECONDS, SECONDS / 2, SECONDS / 2] * len(PROMPTS), abs=0.05)
    js(browser, "for (const i of document.images) i.loading = 'eager'")
    until(browser, "[...document.images].length == 18 && [...document.images].every(i => i.complete && i.naturalWidth == 20)")
    assert js(browser, "return window.broken") is None
    texts = js(browser, "return [...document.querySelectorAll('td.reference p:first-child')].map(p => p.textContent)")
    assert texts == PROMPTS
    assert js(browser, "return document.querySelector('p.heard mark.ins').textContent") == "the"
    buttons = ".clip button"
    js(browser, SLOW, 0.1)  # so that no clip ends before it is looked at
    click(browser, buttons)
    until(browser, "document.querySelector('audio').currentTime > 0")
    assert js(browser, f"return document.querySelector('{buttons}').getAttribute('aria-pressed')") == "true"
    assert js(browser, "return [...document.querySelectorAll('.picture.playing')].length") == 2  # its log-mel and its attention
    browser.find_elements("css selector", buttons)[4].click()  # a second clip stops the first
    until(browser, "document.querySelectorAll('audio')[4].currentTime > 0 && document.querySelector('audio').paused")
    click(browser, ".picture[data-clip=audio]")  # a click on its middle plays from there
    until(browser, f"document.querySelector('audio').currentTime >= {SECONDS / 2 - 0.05}")
    js(browser, SLOW, 16)
    until(browser, "document.querySelector('audio').ended")
    until(browser, f"document.querySelector('{buttons}').getAttribute('aria-pressed') == 'false'")


@pytest.mark.slow
def test_an_evaluation_is_sorted_and_filtered(browser, run):
    from selenium.webdriver.common.keys import Keys
    browser.get((run / "eval/step_00001000/index.html").as_uri())
    assert js(browser, ORDER) == [0, 1, 2, 3, 4, 5]
    names = js(browser, "return [...document.querySelectorAll('th button')].map(b => b.textContent)")
    assert names == list(page.COLUMNS.values())
    for column, orders in {2: ([5, 1, 3, 0, 2, 4], [2, 0, 3, 1, 5, 4]), 3: ([5, 1, 3, 0, 2, 4], [2, 0, 3, 1, 5, 4]),
                           0: ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])}.items():  # the row without a value is last in both
        button = browser.find_elements("css selector", "th button")[column]
        for n, order in enumerate(orders):
            button.click() if n else button.send_keys(Keys.ENTER)  # keys work as well
            assert js(browser, ORDER) == order
            sorts = js(browser, "return [...document.querySelectorAll('th')].map(th => th.getAttribute('aria-sort'))")
            assert sorts[column] == (("descending", "ascending") if column else ("ascending", "descending"))[n]
            assert sum(s is not None for s in sorts) == 1
    browser.find_elements("css selector", "th button")[1].click()
    assert sorted(js(browser, ORDER)) == [0, 1, 2, 3, 4, 5] and js(browser, ORDER)[-1] in (3, 4)  # by text
    click(browser, "#failures")
    assert sorted(js(browser, ORDER)) == [0, 1, 3, 5]
    assert js(browser, "return document.getElementById('count').textContent") == "4 of 6 prompts"
    click(browser, "#find")
    keys(browser, "BAEKER")  # a word that the judge heard
    assert js(browser, ORDER) == [0]
    keys(browser, "x")
    assert js(browser, ORDER) == [] and browser.find_element("id", "none").is_displayed()


@pytest.mark.slow
def test_a_prompt_is_heard_across_the_steps(browser, run):
    from selenium.webdriver.common.keys import Keys
    browser.get((run / "index.html").as_uri())
    at = "return document.getElementById('at').textContent"
    source = "return decodeURI(document.querySelector('audio').src.split('eval/')[1])"
    assert js(browser, at) == "3,000" and js(browser, source) == "step_00003000/000000.wav"
    assert js(browser, "return document.querySelector('audio').paused")  # nothing plays before the user asks
    assert browser.execute_async_script(DURATIONS)[0] == pytest.approx(SECONDS, abs=0.05)
    marker = "return document.querySelector('.plot .now').style.left"
    before = js(browser, marker)
    js(browser, SLOW, 0.0625)  # two seconds last 32
    keys(browser, Keys.ARROW_LEFT)  # wherever the focus is
    assert js(browser, at) == "2,000" and js(browser, source) == "step_00002000/000000.wav" and js(browser, marker) != before
    until(browser, "!document.querySelector('audio').paused && document.querySelector('audio').readyState > 0")
    js(browser, "document.querySelector('audio').currentTime = 0.5")
    click(browser, "#auto")  # off
    slider = browser.find_element("id", "step")
    slider.send_keys(Keys.ARROW_LEFT)  # continues at the same position
    assert js(browser, at) == "1,000" and slider.get_attribute("aria-valuetext") == "step 1000"
    until(browser, "document.querySelector('audio').readyState > 0")
    assert js(browser, "const a = document.querySelector('audio'); return !a.paused && a.currentTime >= 0.5")
    slider.send_keys(Keys.ARROW_LEFT)  # the first stays the first
    assert js(browser, at) == "1,000"
    assert "WER30.0\u202f%CER15.0\u202f%" in js(browser, "return document.getElementById('numbers').textContent")
    js(browser, SLOW, 16)
    until(browser, "document.querySelector('audio').ended")
    slider.send_keys(Keys.END)  # nothing was playing, so nothing starts
    assert js(browser, at) == "3,000" and js(browser, "return document.querySelector('audio').paused")
    js(browser, "const s = arguments[0]; s.value = 1; s.dispatchEvent(new Event('change'))",
       browser.find_element("id", "prompt"))
    assert js(browser, "return document.getElementById('reference').textContent") == SCRIPT
    assert js(browser, "return window.broken") is None and js(browser, source) == "step_00003000/000001.wav"
    rungs = browser.find_elements("css selector", "#ladder li")
    assert len(rungs) == 3 and "script" in rungs[0].text
    rungs[0].find_element("tag name", "button").click()
    assert js(browser, at) == "1,000" and "now" in rungs[0].get_attribute("class")
    assert rungs[0].find_element("tag name", "a").get_attribute("href").endswith("eval/step_00001000/index.html")
    click(browser, ".plot")  # its middle is step 1,500 of 3,000: chooses the nearest evaluation
    assert js(browser, at) in ("1,000", "2,000")
    until(browser, "document.images.length == 3 && [...document.images].every(i => i.complete && i.naturalWidth == 20)")
    titles = js(browser, "return [...document.querySelectorAll('.chart b')].map(b => b.textContent)")
    assert titles == ["flow loss", "error rates", "alignment score"]
    assert js(browser, "return [...document.querySelectorAll('.plot path')].every(p => p.getTotalLength() > 0)")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["index.html", "eval/step_00001000/index.html"])
def test_light_dark_phone_and_keyboard(browser, run, name):
    from selenium.webdriver.common.keys import Keys
    browser.get((run / name).as_uri())

    def colour(selector, what):
        return js(browser, f"return getComputedStyle(document.querySelector('{selector}')).{what}.match(/[\\d.]+/g).map(Number)")

    def luminance(rgb):
        linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in rgb[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme, dark in (("light", False), ("dark", True)):
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]})
        paper = luminance(colour("body", "backgroundColor"))
        assert (paper < 0.1) == dark
        for text in ("body", ".soft", "a"):  # WCAG AA
            light, low = sorted((paper, luminance(colour(text, "color"))), reverse=True)
            assert (light + 0.05) / (low + 0.05) >= 4.5, (scheme, text)
    for width in (375, 1200):
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500})
        for n in range(len(PROMPTS) if name == "index.html" else 1):  # the long word and the wide ones too
            if name == "index.html":
                js(browser, "const s = document.getElementById('prompt'); s.value = arguments[0]; "
                            "s.dispatchEvent(new Event('change'))", n)
            assert js(browser, "return document.documentElement.scrollWidth") <= width
    seen = set()
    for _ in range(12):
        keys(browser, Keys.TAB)
        seen.add(js(browser, "return document.activeElement.id || document.activeElement.tagName"))
        assert js(browser, "return getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert seen >= ({"prompt", "step", "auto", "BUTTON"} if name == "index.html" else {"find", "failures", "BUTTON"})


def test_the_page_shows_the_sound_of_what_has_it(tmp_path):
    text = page.write_page(evaluation(tmp_path / "full")).read_text(encoding="utf-8")
    assert "<b>3.21</b>" in text and "vocoder copy: 3.43" in text and "recording: 3.98" in text and "<b>101</b>" in text
    assert text.count("likeness 0.90") == text.count("corr. 0.75") == 4 and text.count("copy 3.50") == 4
    bare = page.write_page(evaluation(tmp_path / "bare", full=False)).read_text(encoding="utf-8")
    assert "DNSMOS" not in bare and "F0" not in bare
