"""Test the wheel in a new environment for each Python, with the oldest and with the newest tested torch.

    make test-matrix                          # or: python tests/matrix.py 3.10 3.13
    python tests/matrix.py 3.12 --torch 2.11  # one combination

Build wheel and sdist, and check them with twine. For each python3.X in the path and each torch, make an environment,
install the wheel and run the examples in kdlite's docstrings. Each environment needs some GB of downloads, and is
removed before the next one. The exit status is 1 if a step fails or a Python is missing.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCTESTS = """
import doctest, importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import torch, kdlite
modules = [importlib.import_module(f"kdlite.{module.name}") for module in pkgutil.iter_modules(kdlite.__path__)]
results = [doctest.testmod(module) for module in modules]
failed, tried = (sum(counts) for counts in zip(*((r.failed, r.attempted) for r in results)))
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {tried} examples, {failed} wrong")
sys.exit(failed > 0 or tried == 0)
"""


def torches() -> list[str]:
    """Return the lower bound in pyproject.toml and the version in constraints.txt."""
    oldest = re.search(r'^dependencies = \["torch>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text(), re.M)
    newest = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert oldest
    assert newest
    return [oldest[1], newest[1]]


def done(*command: str | Path) -> bool:
    return subprocess.run(command).returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", default=["3.10", "3.11", "3.12", "3.13"])
    parser.add_argument("--torch", nargs="+", default=torches(), help="versions (default: %(default)s)")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        dist, environment = Path(temporary, "dist"), Path(temporary, "env")
        if not done(sys.executable, "-m", "build", "-o", dist, ROOT):
            return 1
        wrong += not done(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir())
        (wheel,) = dist.glob("*.whl")
        for version in args.pythons:
            python = shutil.which(f"python{version}")
            if not python or not done(python, "--version"):  # pyenv's commands also exist for a missing Python
                print(f"Python {version}: not in the path", flush=True)
                wrong += 1
                continue
            for torch in args.torch:
                own, pip = environment / "bin/python", ["-m", "pip", "install", "-q", "--disable-pip-version-check"]
                steps = [
                    (python, "-m", "venv", environment),
                    (own, *pip, f"torch=={torch}", wheel),
                    (own, "-I", "-c", DOCTESTS),
                ]
                if not all(done(*step) for step in steps):
                    print(f"Python {version}, torch {torch}: failed", flush=True)
                    wrong += 1
                shutil.rmtree(environment, ignore_errors=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
