"""What all tests share: the import path, quiet single-threaded libraries, a deterministic hypothesis, a small corpus."""
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# Libraries read these when they are imported, so they are set before anything else is. Child processes inherit them.
os.environ.update(OMP_NUM_THREADS="1", WANDB_SILENT="true", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
hypothesis.settings.register_profile("repo", derandomize=True, deadline=None, max_examples=25,
                                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
hypothesis.settings.load_profile("repo")


def pytest_collection_modifyitems(items):
    """Files that take long for their number of tests come first, so that no process is left with one of them at the end."""
    first = ["test_run_sh", "test_skill", "test_soak", "test_ljspeech", "test_train", "test_evaluator", "test_serve"]
    items.sort(key=lambda item: first.index(item.path.stem) if item.path.stem in first else len(first))


@pytest.fixture(scope="session")
def demo_prepare():
    """data/demo/prepare.py as a module (its folder is no package)."""
    spec = importlib.util.spec_from_file_location("demo_prepare", ROOT / "data" / "demo" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory):
    """48 training and 16 held-out utterances, made by the real command. Shared: copy it before you write into it."""
    out = tmp_path_factory.mktemp("demo") / "demo_bigvgan"
    command = [sys.executable, "data/demo/prepare.py", "--out", str(out), "--train", "48", "--held-out", "16"]
    result = subprocess.run([*command, "--workers", "2"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def run_sh():
    """run.sh, where it would start at once; None elsewhere, where it would first install packages from the network."""
    want = subprocess.run("cat requirements.txt <(sed -n 's/^bigvgan=\"\\(.*\\)\"$/\\1/p' run.sh) | cksum", shell=True,
                          executable="/bin/bash", cwd=ROOT, capture_output=True, text=True, check=True).stdout
    marker = ROOT / ".venv" / "installed"
    return "./run.sh" if marker.exists() and marker.read_text() == want else None


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, driven by selenium; the test is skipped where there is none."""
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
