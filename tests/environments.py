"""Make virtual environments that have only some of the installed packages: those that a device needs, or torch."""

import importlib.metadata
import re
import venv

from packaging.requirements import Requirement


def with_requirements(name, seen=None):
    """Return the names of a distribution and of all installed distributions that it requires."""
    seen = set() if seen is None else seen
    try:
        requires = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return seen
    seen.add(name)
    for line in requires:
        need = Requirement(line)
        if need.name not in seen and (need.marker is None or need.marker.evaluate({"extra": ""})):
            with_requirements(need.name, seen)
    return seen


def make_environment(folder, *names):
    """Make a virtual environment with links to these distributions and their requirements; return its Python."""
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in set().union(*map(with_requirements, names)):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {".."}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return folder / "bin/python"


def installed(pattern):
    """Return the name of the first installed distribution that matches, such as onnxruntime or onnxruntime-gpu."""
    names = {d.metadata["Name"] for d in importlib.metadata.distributions() if d.metadata["Name"]}
    return next(name for name in sorted(names) if re.fullmatch(pattern, name))
