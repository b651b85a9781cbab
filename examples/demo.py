"""Train a teacher and three students on the embedded digits, and deploy one student.

    make demo

Each step is a command that a user would type, of train.py or deploy/. This file starts them and reads the results.
"""

import csv
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUTPUT = Path("runs/demo")
STUDENT = ["--model", "mobilenet_v2", "--epochs", "8"]
RUNS = {
    "teacher": ["--model", "resnet18", "--epochs", "6"],
    "cross-entropy": STUDENT,
    "NKD": [*STUDENT, "--kd", "nkd", "--teacher", str(OUTPUT / "teacher/student")],
    "USKD": [*STUDENT, "--self-kd", "uskd"],
}
PAGE = str(OUTPUT / "student.html")
PACK = ["deploy.pack", "--file", "student-int8-cpu.onnx", "-o"]
# the NKD student becomes a quantised file, which is checked, timed and packed
DEPLOY = [
    ["deploy.export", "--format", "onnx"],
    ["deploy.quantize", "--target", "cpu"],
    ["deploy.check", "--device", "cpu"],
    ["deploy.benchmark", "--device", "cpu", "--threads", "1", "--seconds", "1"],
    [*PACK, str(OUTPUT / "student.pyz")],
    [*PACK, PAGE],
]


def main() -> int:
    table = []
    for name, flags in RUNS.items():
        output = OUTPUT / name.lower()
        if (output / "args.json").exists():  # a former demo
            shutil.rmtree(output)
        command = ["train.py", *flags, "--output", str(output)]
        print(f"\n$ python {' '.join(command)}", flush=True)
        started = time.time()
        status = subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:]]).returncode
        if status:
            return status
        with open(output / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        size = os.path.getsize(output / "student/model.safetensors") / 1e6
        table.append((name, flags[1], float(rows[-1]["val_top1"]), time.time() - started, size))

    print(f"\n{'':14} {'model':14} {'top-1 %':>8} {'seconds':>8} {'MB':>6}")
    for name, model, top1, seconds, size in table:
        print(f"{name:14} {model:14} {top1:8.2f} {seconds:8.0f} {size:6.1f}")
    print("\none seed, last epoch: a gap of under 2 points is noise")
    print(f"students: {OUTPUT}/*/student", flush=True)

    for module, *flags in DEPLOY:
        command = ["-m", module, str(OUTPUT / "nkd"), *flags]
        print(f"\n$ python {' '.join(command)}", flush=True)
        status = subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
        if status and PAGE in command:
            print(f"skipped {PAGE}: the line above has the reason")  # no npm here, or no network
        elif status:
            return status
    report = [str(ROOT / "examples/report.py"), "-o", str(OUTPUT / "report.html")]
    subprocess.run([sys.executable, *report, *(str(OUTPUT / name.lower()) for name in RUNS)], check=True)
    print(
        "\nnext: open that page, and student.html next to it; make serve-demo, then drop an image of a digit on "
        "http://127.0.0.1:8000"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
