"""Test examples/demo.py: its digits, its commands, its conclusions, and the packages that `make demo` installs."""

import ast
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest

import train

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import demo  # noqa: E402

# Replaces train.py. Its top-1 is 10 times the length of the run's name, plus the seed.
STAND_IN = """
import pathlib, sys
output = pathlib.Path(sys.argv[-1])
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if output.name == "uskd-1":
    sys.exit("no such tap")
output.mkdir(parents=True)
top1 = 10 * len(output.name.removesuffix(f"-{seed}")) + seed
(output / "metrics.csv").write_text(f"epoch,val_top1\\n1,0.5\\n2,{top1}\\n")
"""


@pytest.fixture
def digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SEEDS", 2)
    demo.write_digits(demo.DIGITS)
    return demo.DIGITS


def images(folder):
    """Return two sets: the indices of the digits in a folder, and their numbers of copies."""
    numbers, counts = np.unique([int(file.name[:4]) for file in Path(folder).rglob("*.png")], return_counts=True)
    return set(numbers.tolist()), set(counts.tolist())


@pytest.mark.slow
def test_no_student_trains_on_a_validation_digit(digits):
    trained, _ = images(digits / "teacher/train")
    val, _ = images(digits / "teacher/val")
    assert trained | val == set(range(1797))
    assert not trained & val
    assert len(trained) == 900
    for seed in range(2):
        labelled, copies = images(digits / f"labelled-{seed}/train")
        once, single = images(digits / f"once-{seed}/train")
        others, _ = images(digits / f"unlabelled-{seed}")
        assert (len(labelled), copies, single) == (100, {9}, {1})
        assert once == labelled
        assert labelled | others == trained
        assert not labelled & others
        assert images(f"{digits}/labelled-{seed}/val/") == images(f"{digits}/once-{seed}/val/") == (val, {1})
        assert len(list((digits / f"once-{seed}/train").iterdir())) == 10
    assert images(digits / "once-0/train") != images(digits / "once-1/train")


def test_train_py_accepts_the_commands_and_each_has_its_own_output_folder():
    commands = [demo.train_command(name, seed) for name in demo.RUNS for seed in (0, 1)]
    for command in commands:
        train.parse_flags(command[1:])
    assert len({command[-1] for command in commands}) == len(commands)
    unlabelled = [command[-1] for command in commands if "--unlabelled" in command]
    assert unlabelled == ["runs/demo/nkd", "runs/demo/seeds/nkd-1"]


def test_results_keep_the_order_of_the_seeds_and_come_from_the_last_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(STAND_IN)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "RUNS", {"teacher": [], "NKD": [], "cross-entropy": []})
    monkeypatch.setattr(demo, "SEEDS", 3)
    top1 = demo.train_students(tmp_path / "log.txt")
    assert top1 == {"NKD": [30, 31, 32], "cross-entropy": [130, 131, 132]}
    assert "seed 1, NKD: top-1 31.0 %" in capsys.readouterr().out
    shutil.rmtree("runs")
    monkeypatch.setattr(demo, "RUNS", {"teacher": [], "USKD": []})
    with pytest.raises(SystemExit, match=r"failed: see .*log\.txt"):
        demo.train_students(tmp_path / "log.txt")
    assert "no such tap" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("gains", "words"),
    [
        ([4.0, 5.0, 6.0], "NKD is ahead of cross-entropy by 5.0 +- 2.5 points"),
        ([-4.0, -5.0, -6.0], "NKD is behind cross-entropy by 5.0 +- 2.5 points"),
        ([1.0, 2.0, 3.0], "NKD: no effect is shown, +2.0 +- 2.5 points includes 0"),
    ],
)
def test_a_gain_whose_interval_includes_0_is_not_called_an_effect(gains, words):
    assert demo.conclude("NKD", np.array(gains)) == words


@pytest.mark.trial
def test_the_demo_ends_with_a_packed_student(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "SEEDS", 2)
    monkeypatch.setattr(demo, "RUNS", {name: [*flags, "--epochs", "5"] for name, flags in demo.RUNS.items()})
    assert demo.main() == 0
    printed = capfd.readouterr().out
    for name in ("cross-entropy", "NKD", "USKD"):
        assert re.search(rf"^{name} +100 +\d+ +[\d.]+ \+- [\d.]+", printed, re.M)
    image = min(Path("runs/demo/digits/teacher/val/3").iterdir())
    done = subprocess.run([sys.executable, "runs/demo/student.pyz", image], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Path("runs/demo/report.html").exists()


# ---- the packages ----


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Return a function that lists a Makefile target's commands in a new checkout."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)

    def dry_run(target):
        return subprocess.run(["make", "-n", target], cwd=folder, capture_output=True, text=True, check=True).stdout

    return dry_run


def test_make_demo_announces_its_download_and_installs_no_extra_except_serve(commands):
    demo_runs = commands("demo")
    assert re.findall(r"pip install .* -e (\S+)", demo_runs) == ['".[serve]"']
    assert demo_runs.index("GB") < demo_runs.index("pip install")
    assert "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo" in demo_runs


@pytest.mark.parametrize("target", ["test", "lint", "docs"])
def test_the_other_targets_install_the_extras_serve_and_dev(commands, target):
    assert re.findall(r"pip install .* -e (\S+)", commands(target)) == ['".[serve]"', '".[dev]"']


def test_the_extra_serve_has_every_package_that_the_demo_imports():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras, waiting, needs = project["optional-dependencies"], ["serve"], set()
    for line in project["dependencies"]:
        needs.add(re.match(r"[\w-]+", line)[0])
    while waiting:
        for line in extras[waiting.pop()]:
            if own := re.fullmatch(r"kdlite\[(.*)\]", line):
                waiting += own[1].split(",")
            else:
                needs.add(re.match(r"[\w-]+", line)[0])
    assert not needs & {"transformers", "lightning", "accelerate", "playwright", "pytest", "mypy"}
    distributions = packages_distributions()
    for file in [ROOT / "examples/demo.py", ROOT / "examples/report.py", *ROOT.glob("kdlite/training/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"kdlite", "deploy"}:
                assert needs & set(distributions[name]), f"{file.name} imports {name}"
