"""Make, once for all tests, a run directory with every kind of artefact except an engine."""

import shutil
from pathlib import Path

import pytest
from commands import deploy
from students import write_run

from deploy import export, quantize
from deploy.runtimes import products_saturate

RESNET = Path(__file__).resolve().parents[2] / "examples/paper/cifar_models.py"


@pytest.fixture(scope="session")
def deployed(tmp_path_factory):
    """Return the run of a small ResNet with all artefacts. A test must not change these files."""
    run = write_run(tmp_path_factory.mktemp("deploy") / "run", f"{RESNET}:resnet8", 32, images=80)
    deploy(export, run)
    deploy(export, run, "--precision", "fp16", "--format", "onnx")
    deploy(quantize, run, "--target", "cpu", "--count", "64")
    deploy(quantize, run, "--target", "tensorrt", "--count", "64", *["--reduce-range"] * products_saturate())
    return run


@pytest.fixture
def run(deployed, tmp_path):
    """Return a copy of the run that a test may change."""
    return shutil.copytree(deployed, tmp_path / "run")
