"""The README's Python runs as written, block after block, and so do the examples."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_python_in_the_readme_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["loss"].isfinite()
    assert type(names["plain"]).__name__ == "ResNet"


def test_every_flag_in_the_readme_exists():
    import train

    flags = set(re.findall(r"--[a-z][a-z-]+", (ROOT / "README.md").read_text()))
    known = {option for action in train.get_parser()._actions for option in action.option_strings}
    assert flags - known <= {"--nproc-per-node", "--logdir"}  # torchrun and TensorBoard


@pytest.mark.parametrize("name", ["training_loop.py"])
def test_an_example_runs(name, tmp_path):
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )
    assert result.returncode == 0, result.stderr
    accuracies = dict(re.findall(r"^(\S+) +([\d.]+)%$", result.stdout, re.M))
    assert accuracies.keys() == {"teacher", "cross-entropy", "NKD", "USKD"}
    assert min(map(float, accuracies.values())) > 80
