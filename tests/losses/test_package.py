"""Test the built package: the contents of the wheel, its requirements and its imports."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from environments import make_environment

import kdlite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Build the wheel and the sdist; return their folder."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("kdlite-*.whl"))


@pytest.mark.slow
def test_twine_accepts_the_wheel_and_the_sdist(built):
    pytest.importorskip("twine")
    files = list(built.iterdir())
    check = [sys.executable, "-m", "twine", "check", "--strict", *files]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("PASSED") == len(files) == 2


@pytest.mark.slow
def test_the_wheel_contains_only_kdlite_without_training(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "kdlite/py.typed" in names
    assert {name.partition("/")[0].rpartition(".")[2] for name in names} == {"kdlite", "dist-info"}
    sources = {f"kdlite/{path.name}" for path in (ROOT / "kdlite").iterdir() if path.suffix in (".py", ".typed")}
    assert {name for name in names if name.startswith("kdlite/")} == sources


@pytest.mark.slow
def test_the_package_requires_only_torch(wheel):
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    needs = [line for line in re.findall(r"^Requires-Dist: (.*)$", text, re.M) if "extra ==" not in line]
    assert [re.split(r"\W", need)[0] for need in needs] == ["torch"]
    assert f"Version: {kdlite.__version__}" in text


@pytest.mark.slow
def test_the_package_runs_in_an_environment_with_torch_only(wheel, tmp_path):
    """Use a new environment that contains only the wheel, torch and torch's requirements."""
    python = make_environment(tmp_path / "env", "torch")
    site = next((tmp_path / "env").glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    program = (
        "import torch, kdlite\n"
        "loss = kdlite.nkd_loss(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([0, 1]))\n"
        "assert loss.isfinite()\n"
        "try:\n    import numpy\nexcept ImportError:\n    print('no numpy,', kdlite.__file__)\n"
    )
    result = subprocess.run([python, "-I", "-W", "ignore", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"no numpy, {site}/kdlite/__init__.py"


def test_there_are_ten_public_names_and_each_has_an_example():
    assert kdlite.__all__ == [
        "FeatureTap",
        "Teacher",
        "WithWeakHead",
        "default_tap",
        "nkd_from_logprobs",
        "nkd_linear_loss",
        "nkd_loss",
        "nkd_topk_loss",
        "top_k_logprobs",
        "uskd_loss",
    ]
    for name in kdlite.__all__:
        assert ">>>" in getattr(kdlite, name).__doc__  # an example, which runs as a doctest
