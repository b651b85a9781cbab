"""Test the Python code, the commands and the links of the pages."""

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from serving import NAMES, server
from students import write_student

import kdlite
import train
from deploy.flags import get_parser, read_flags, settle_flags
from kdlite.training import teacher_labels

COMMANDS = ["export", "quantize", "candidates", "build", "check", "benchmark", "serve", "triton", "pack", "predict"]
COMMANDS += ["selftest"]
ROOT = Path(__file__).resolve().parents[2]


PAGES = [
    page
    for page in ROOT.rglob("*.md")
    if not any(part[0] == "." or part in ("runs", "build", "data") for part in page.relative_to(ROOT).parts)
]


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def test_only_pages_with_a_test_contain_python():
    assert {str(page.relative_to(ROOT)) for page in PAGES if blocks(page)} == {
        "README.md", "examples/training.md", "deploy/serving.md",
    }  # fmt: skip


def test_the_readme_is_at_most_120_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("folder", ["kdlite", "kdlite/training", "deploy", "deploy/server"])
def test_contributing_lists_every_file(folder):
    house = (ROOT / "CONTRIBUTING.md").read_text().partition("## The modules")[2].partition("## Where")[0]
    missing = (
        {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"} - set(re.findall(r"\w+\.py", house))
    )
    assert not missing


@pytest.mark.slow
def test_the_python_in_the_readme_runs():
    names = {}
    for block in blocks("README.md"):
        exec(block, names)
    assert names["loss"].isfinite()
    assert type(names["plain"]).__name__ == "ResNet"


@pytest.mark.trial
def test_mypy_accepts_the_python_in_the_readme(tmp_path):
    (tmp_path / "pasted.py").write_text("\n".join(blocks("README.md")))
    mypy = [sys.executable, "-m", "mypy", "--config-file=", "--strict", "--ignore-missing-imports", "pasted.py"]
    done = subprocess.run(mypy, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_python_on_the_training_page_opens_a_student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_student(Path("RUN/student"), "mobilenet_v2", 32, arguments=["width_mult=0.25"])
    (block,) = blocks("examples/training.md")
    names = {}
    exec(block, names)
    assert type(names["model"]).__name__ == "MobileNetV2"


@pytest.mark.slow
def test_the_client_on_the_page_about_serving_gets_an_answer(artefact):
    (block,) = blocks("deploy/serving.md")
    with server(artefact) as (_, port):
        names = {}
        exec(block.replace("8000", str(port)).replace("32, 32", "16, 16"), names)
    assert names["logits"].shape == (1, len(NAMES))


def test_every_link_on_a_page_has_a_target():
    def anchors(page):
        titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
        return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}

    links = [(page, link) for page in PAGES for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text())]
    assert len(links) > 40
    for page, link in links:
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


@pytest.mark.trial
def test_the_api_pages_have_every_public_name(tmp_path):
    pytest.importorskip("pdoc")
    command = (ROOT / "Makefile").read_text().partition("$(BIN)/pdoc")[2].partition("\n")[0]
    made = shlex.split(command.replace("build/docs", str(tmp_path)))
    done = subprocess.run([sys.executable, "-m", "pdoc", *made], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "kdlite.html").read_text()
    for name in kdlite.__all__:
        assert f'id="{name}"' in page


@pytest.mark.parametrize("page", sorted(str(page.relative_to(ROOT)) for page in PAGES))
def test_every_flag_and_command_on_a_page_exists(page):
    text = (ROOT / page).read_text().replace("\\\n", " ")  # a command that continues on the next line
    commands = {name: importlib.import_module(f"deploy.{name}") for name in COMMANDS}
    parsers = [get_parser(table, "", "") for table in (train.FLAGS, teacher_labels.FLAGS)]
    parsers += [module.get_parser() for module in commands.values()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    theirs = {"--nproc-per-node", "--max-restarts", "--logdir"}  # flags of torchrun and TensorBoard
    theirs |= {"--data-binary", "--model-repository", "--gpus", "--rm"}  # of curl, Triton and Docker
    theirs |= {"--system-site-packages", "--no-deps", "--with"}  # of venv, pip and uv
    theirs |= {"--requirements", "--budget-ms"}  # of student.pyz and candidates.pyz
    theirs |= {"--jobs", "--seeds", "--fetch", "--fastai", "--timm", "--flags"}  # of examples/ and examples/paper/
    theirs |= {"--litserve", "--compare", "--pooled"}  # of examples/benchmark_serve.py and examples/paper/report.py
    theirs |= {"--minutes", "--share", "--triton", "--only", "--hostile"}  # of tests/*.py and examples/gpu.py
    theirs |= {"--torchcompile", "--clip-mode"}  # of timm's train.py
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - known <= theirs
    for name, flags in re.findall(r"^(?:    )?python -m deploy\.(\w+) ([^#\n]*)", text, re.M):
        commands[name].get_parser().parse_args(shlex.split(flags))
    for flags in re.findall(r"^ *(?:python|torchrun\b.*) train\.py ([^#\n]*)", text, re.M):
        train.parse_flags(shlex.split(flags.replace("...", "")))
    for flags in re.findall(r"^ *python -m kdlite\.training\.teacher_labels ([^#\n]*)", text, re.M):
        settle_flags(teacher_labels.FLAGS, read_flags(teacher_labels.FLAGS, shlex.split(flags)))


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


@pytest.mark.trial
@pytest.mark.parametrize(
    ("name", "flags", "rows"),
    [
        ("benchmark_losses.py", "--shapes 8x10 --dtypes bfloat16 --seconds 0.01 --no-compile --no-linear", 8),
        (
            "benchmark_step.py",
            "--models resnet18 --img-size 32 --batch-size 2 --rounds 2 --seconds 0.1 --device cpu --workers 0",
            6,
        ),
    ],
)
def test_a_benchmark_prints_its_table(name, flags, rows):
    command = [sys.executable, ROOT / "examples" / name, *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", "PATH": ""})
    assert result.returncode == 0, result.stderr
    table = re.findall(r"^  \S.*?  +[\d.]+ +[\d.]+x? +[\d.]+u?$", result.stdout, re.M)
    assert len(table) == rows, result.stdout
