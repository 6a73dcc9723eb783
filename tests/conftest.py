"""What all tests share: quiet single-threaded libraries, a deterministic hypothesis, a small corpus, a browser."""
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

# Libraries read these when they are imported, so set them before anything else. Child processes inherit them.
os.environ.update(OMP_NUM_THREADS="1", WANDB_SILENT="true", HF_HUB_OFFLINE="1")

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
hypothesis.settings.register_profile("repo", derandomize=True, deadline=None, max_examples=25,
                                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("repo")


def pytest_collection_modifyitems(items):
    """Start the slowest files first, so that no process is left with one of them at the end."""
    first = ["test_ljspeech", "test_skill", "test_run_sh", "test_soak", "test_train", "test_bench", "test_evaluator", "test_serve"]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory):
    """48 training and 16 held-out utterances. All tests and all processes of xdist share it: copy it before you write into it."""
    from demo import prepare  # data/demo/prepare.py
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    out = folder / "demo_bigvgan"
    with open(folder / "demo_corpus.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            prepare.main(["--out", str(out), "--train", "48", "--held-out", "16", "--workers", "1"])
    return out


@pytest.fixture(scope="session")
def run_sh():
    """run.sh if it would start at once, or None if it would first install packages from the network."""
    return "./run.sh" if subprocess.run([ROOT / "run.sh", "installed"], stdout=subprocess.DEVNULL).returncode == 0 else None


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, driven by selenium. The test is skipped where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver")
    found = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if not all(found.values()):
        pytest.skip("no Chromium with its driver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found["chromium"]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    profile = tempfile.mkdtemp()
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync", "disable-dev-shm-usage", "mute-audio", "window-size=1200,900",
                 "autoplay-policy=no-user-gesture-required", f"user-data-dir={profile}"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(found["chromedriver"]))
    driver.set_script_timeout(120)
    yield driver
    driver.quit()
    shutil.rmtree(profile, ignore_errors=True)
