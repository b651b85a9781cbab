"""Measure the cost of running and serving an ONNX file on a device: python examples/benchmark_device.py STUDENT.onnx

One process imports deploy.serve. Another process loads the file and runs it once. The table shows CPU seconds, the peak
of resident memory, the number of modules, and the size on disk of the imported packages and their requirements.
--python is the interpreter of the environment. --tree is another checkout of this repository, to compare with.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from deploy.cli import UserError, command, make_parser

PROGRAMS = {
    "import deploy.serve": "import deploy.serve",
    "load and run": "import numpy as np, pathlib; from deploy.runtimes import RunOn, load\n"
    "runtime = load(pathlib.Path({file!r}), RunOn('cpu'))\n"
    "runtime.run(np.zeros((1, *runtime.image_shape), np.uint8))",
}
MEASURE = """
import time, resource, sys, json
{program}
spent = resource.getrusage(resource.RUSAGE_SELF)
import importlib.metadata, os, re
owners = importlib.metadata.packages_distributions()
wanted = {{name for module in list(sys.modules) for name in owners.get(module.partition(".")[0], ())}}
queue, seen, size = list(wanted), set(), 0
while queue:
    name = queue.pop().lower().replace("_", "-")
    if name in seen or name == "kdlite":
        continue
    seen.add(name)
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    files = [distribution.locate_file(file) for file in distribution.files or ()]
    size += sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    queue += [re.match(r"[\\w.-]+", need)[0] for need in distribution.requires or () if "extra ==" not in need]
print(json.dumps(dict(cpu_s=spent.ru_utime + spent.ru_stime, mib=spent.ru_maxrss / 1024, modules=len(sys.modules),
                      disk_mb=size / 1e6, packages=len(seen))))
"""


def run(args: argparse.Namespace) -> None:
    if not args.artefact.is_file():
        raise UserError(f"{args.artefact}: no such file")
    print(f"{args.python}, {args.tree}, median of {args.rounds}")
    for label, program in PROGRAMS.items():
        program = MEASURE.format(program=program.format(file=str(args.artefact.resolve())))
        rows = []
        for _ in range(args.rounds):
            result = subprocess.run([args.python, "-c", program], cwd=args.tree, capture_output=True, text=True)
            if result.returncode:
                raise UserError(f"{label}: {result.stderr.strip().splitlines()[-1]}")
            rows.append(json.loads(result.stdout))
        median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        print(f"{label}: {median['cpu_s']:.2f} CPU s, {median['mib']:.0f} MiB, {median['modules']:.0f} modules, "
              f"{median['packages']:.0f} packages of {median['disk_mb']:.0f} MB on disk")  # fmt: skip


parser = make_parser(__doc__, "benchmark_device.py")
parser.add_argument("artefact", type=Path, help="an .onnx file of deploy.export")
parser.add_argument("--python", default=sys.executable, help="interpreter to measure (default: this one)")
parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="(default: this checkout)")
parser.add_argument("--rounds", type=int, default=5, help="processes for each row (default: 5)")

if __name__ == "__main__":
    sys.exit(command(parser, run))
