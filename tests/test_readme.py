"""The README's Python runs as written, block after block, and so do the examples."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from students import write_student

import train

COMMANDS = ["export", "quantize", "build", "check", "benchmark", "serve", "triton", "pack", "predict"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_python_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_student(Path("RUN/student"), "mobilenet_v2", 32, arguments=["width_mult=0.25"])
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) == 3
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["loss"].isfinite()
    assert type(names["plain"]).__name__ == "ResNet"
    assert type(names["model"]).__name__ == "MobileNetV2"


@pytest.mark.parametrize(
    "page",
    ["README.md", "deploy/README.md", "examples/README.md", "examples/triton/README.md", "examples/paper/README.md"],
)
def test_every_flag_and_command_on_a_page_exists(page):
    text = (ROOT / page).read_text()
    commands = {name: importlib.import_module(f"deploy.{name}") for name in COMMANDS}
    parsers = [module.get_parser() for module in (train, *commands.values())]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    theirs = {"--nproc-per-node", "--max-restarts", "--logdir"}  # of torchrun and TensorBoard
    theirs |= {"--data-binary", "--model-repository", "--gpus", "--rm"}  # of curl, Triton and Docker
    theirs |= {"--system-site-packages", "--no-deps"}  # of venv and pip
    theirs |= {"--requirements"}  # of student.pyz, which knows two flags
    theirs |= {"--jobs", "--seeds"}  # of examples/paper/tiny_imagenet.py and examples/finetune.py
    theirs |= {"--litserve"}  # of examples/benchmark_serve.py
    theirs |= {"--minutes", "--share", "--triton"}  # of tests/soak.py and tests/compare_triton.py
    theirs |= {"--torchcompile", "--clip-mode"}  # of timm's train.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known <= theirs
    for name, flags in re.findall(r"^(?:    )?python -m deploy\.(\w+) ([^#\n]*)", text, re.M):
        commands[name].get_parser().parse_args(shlex.split(flags.replace("\\", "")))


@pytest.mark.trial
@pytest.mark.parametrize("name", ["loops/plain.py"])
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        ("benchmark_losses.py", "--shapes 8x10 --dtypes bfloat16 --seconds 0.01 --no-compile --no-linear", 8),
        pytest.param(
            "benchmark_step.py",
            "--models resnet18 --img-size 32 --batch-size 2 --rounds 2 --seconds 0.1 --device cpu --workers 0",
            6,
            marks=pytest.mark.trial,
        ),
    ],
)
def test_a_benchmark_prints_its_table(name, flags, rows):
    command = [sys.executable, ROOT / "examples" / name, *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert result.returncode == 0, result.stderr
    table = re.findall(r"^  \S.*?  +[\d.]+ +[\d.]+x? +[\d.]+u?$", result.stdout, re.M)
    assert len(table) == rows, result.stdout
