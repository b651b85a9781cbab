"""Test that the JavaScript port in examples/port passes the conformance vectors."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import deploy
from plain_student import metadata_of, write_onnx

from deploy import pack

PORT = Path(__file__).resolve().parents[2] / "examples/port"
pytestmark = pytest.mark.trial


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """Return a folder with the port and its packages."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("port")
    if npm is None or shutil.which("node") is None:
        pytest.skip("node or npm is not installed")
    for file in ("classify.mjs", "package.json"):
        shutil.copy(PORT / file, folder)
    command = [npm, "install", "--ignore-scripts", "--no-audit", "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm cannot install the packages of the port: {done.stderr[:200]}")
    return folder


@pytest.mark.parametrize("changes", [{}, {"input_size": [3, 48, 81], "interpolation": "bilinear", "crop": 0.9},
                                     {"input_size": [1, 32, 32], "crop": 1.0}])  # fmt: skip
def test_the_port_passes_the_vectors_and_fails_on_wrong_ones(port, tmp_path, changes):
    (tmp_path / "config.json").write_text("{}")
    write_onnx(tmp_path, metadata_of(**changes))
    deploy(pack, tmp_path, "-o", tmp_path / "student.pyz")
    command = ["node", "classify.mjs", str(tmp_path)]
    done = subprocess.run(command, cwd=port, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("0 bytes differ") == 10
    index = tmp_path / "vectors/index.json"
    vectors = json.loads(index.read_text())
    vectors["logits"]["student.onnx"]["values"][2][0] += 0.1
    index.write_text(json.dumps(vectors))
    done = subprocess.run(command, cwd=port, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.count("FAIL") == 1
