"""Run each test process with one thread, and the tests that share a costly fixture in one process."""

import os
import shutil

import pytest

# Costly fixture -> the group of the slow tests that use it.
SHARED = {"trained": "run", "deployed": "run", "made": "device", "runs": "report", "html": "page", "forks": "forks"}

# A fake camera, which Chromium opens without asking the user.
CAMERA = "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"

# Before torch is imported. More threads would compete for the cores, and change the last bits of a sum.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_itemcollected(item):
    for group in {SHARED[name] for name in item.fixturenames if name in SHARED}:
        item.add_marker(pytest.mark.slow)
        item.add_marker(pytest.mark.xdist_group(group))
    if any(mark.kwargs.get("reason") == "needs a CUDA GPU" for mark in item.iter_markers("skipif")):
        item.add_marker(pytest.mark.gpu)


def pytest_make_parametrize_id(val, argname):
    """Use the argument's name as the id of a long text.

    pytest writes the id into PYTEST_CURRENT_TEST. With a variable of 128 KiB, Linux starts no process.
    """
    return argname if isinstance(val, str | bytes) and len(val) > 100 else None


def pytest_collection_modifyitems(items):
    # Slow tests run first, so that the test processes end at about the same time.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def artefact(tmp_path_factory):
    """Write student.onnx for the tests of the server."""
    from serving import write_artefact

    return write_artefact(tmp_path_factory.mktemp("serve"))


@pytest.fixture
def forks(tmp_path):
    from forks import Forks

    forks = Forks(tmp_path)
    yield forks
    forks.kill()


@pytest.fixture(scope="module")  # because Playwright runs an event loop until it is closed
def browser():
    """Start Chromium; skip the test if it is missing (`apt-get install chromium`)."""
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if not program:
        pytest.skip("Chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", *CAMERA])
        yield chromium
        chromium.close()
