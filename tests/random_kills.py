"""Kill a training run at random moments, resume it, and compare its weights with those of an undisturbed run.

    python tests/random_kills.py --rounds 20                 # prints kills, runs and bitwise equal runs of each kind
    python tests/random_kills.py --rounds 2 --kinds rank

Each run saves a checkpoint at nearly every step. For the kinds rank, launcher, signal and suspend, a run has two
processes under torchrun; for the others, one process with two data loading processes. The script kills a run up to
three times and then waits for its end. Each start has --resume, as in a job script.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parents[1]
# A data loading process of torch prints this error if its parent is killed at the wrong moment.
AFTER = "Received final signal but neither done_event nor iteration_end is set"
KINDS = ("rank", "launcher", "worker", "save", "signal", "job", "suspend")
TWO_RANKS = ("rank", "launcher", "signal", "suspend")
FLAGS = [
    "--device", "cpu", "--model", f"{ROOT}/tests/own_models.py:dropout", "--img-size", "16", "--self-kd", "uskd",
    "--tap", "1", "--epochs", "4", "--ema-decay", "0.9", "--mixup", "0.2", "--save-every", "0.0001", "--reference", "0",
]  # fmt: skip


def make_photos(folder: Path) -> Path:
    for name, photo in zip(("china", "flower"), load_sample_images().images):
        for part, count in (("train", 256), ("val", 16)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                top, left = random.Random(i).randrange(360), random.Random(-i).randrange(560)
                Image.fromarray(photo[top : top + 64, left : left + 80]).save(folder / part / name / f"{i}.jpg")
    return folder


def start(output: Path, kind: str, photos: Path) -> subprocess.Popen:
    two = kind in TWO_RANKS
    data = ["--batch-size", "32"] if two else ["--data", str(photos), "--batch-size", "8", "--workers", "2"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if two else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train.py"), *FLAGS, *data, "--output", str(output), "--resume"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(output), start_new_session=True,
    )  # fmt: skip


def environment(output: Path) -> dict[str, str]:
    """Return an environment with a variable that marks every process of a run, in any session and under any parent."""
    return os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "RANDOM_KILLS": str(output.absolute())}


def processes(output: Path) -> dict[int, str]:
    """Return process id -> command line of all processes of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            if f"RANDOM_KILLS={output.absolute()}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
    return {pid: line for pid, line in found.items() if line}  # a zombie has no command line


def ranks(output: Path) -> list[int]:
    lines = processes(output).items()
    return sorted(pid for pid, line in lines if "train.py" in line and "distributed.run" not in line)


def kill(run: subprocess.Popen, kind: str, output: Path) -> None:
    """Wait for a random moment of the training, and kill, signal or suspend the processes that `kind` names."""
    deadline = time.time() + 60
    while run.poll() is None and not (output / "last.pt").exists() and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.0 if kind in TWO_RANKS else 3.0))
    if kind == "save":
        while run.poll() is None and not list(output.glob(".*.partial")):
            time.sleep(0.0002)
    if run.poll() is not None or not processes(output):
        return
    if kind == "job":  # a scheduler signals every process of a job
        os.killpg(run.pid, random.choice([signal.SIGTERM, signal.SIGHUP]))
        return
    if kind == "suspend":
        for number, seconds in ((signal.SIGSTOP, 15), (signal.SIGCONT, 0)):
            for process in ranks(output):
                os.kill(process, number)
            time.sleep(seconds)
        return
    victims = [run.pid] if kind == "launcher" else ranks(output)
    if kind == "worker":
        victims = [pid for pid, line in processes(output).items() if "forkserver" in line]
    if not victims:
        return
    victim = random.choice(victims)
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim, signal.SIGUSR1 if kind == "signal" else signal.SIGKILL)


def finish(run: subprocess.Popen, output: Path, seconds: float) -> str:
    """Wait until all processes of the run have ended; return its output. Raise AssertionError after these seconds."""
    began, text = time.time(), ""
    try:
        text, _ = run.communicate(timeout=seconds)
    except subprocess.TimeoutExpired as error:
        left = kill_all(output)
        raise AssertionError(f"still running after {seconds} s: {left}") from error
    while processes(output):
        if time.time() - began > seconds:
            raise AssertionError(f"the run left processes: {kill_all(output)}")
        time.sleep(0.1)
    return text


def kill_all(output: Path) -> dict[int, str]:
    left = processes(output)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def round_of(kind: str, folder: Path, photos: Path, whole: dict, most: int = 3) -> int:
    """Kill one run at most `most` times and compare its last weights with `whole`; return the number of kills."""
    output, kills = folder / f"{kind}-{time.time()}", 0
    for _ in range(most):
        run = start(output, kind, photos)
        kill(run, kind, output)
        text = finish(run, output, 300)
        if "last top-1" in text:
            kills += kind == "suspend"
            break
        kills += 1  # the run ended before its last epoch
        # only torchrun and data loading processes may print a traceback, and only if another process was killed
        assert f'File "{ROOT}/train.py"' not in text, text
        may_print = kind in ("rank", "launcher", "save") or AFTER in text
        assert may_print or 'Traceback (most recent call last):\n  File "/' not in text, text
    else:
        run = start(output, kind, photos)
        text = finish(run, output, 300)
    assert run.returncode == 0, text
    state = torch.load(output / "last.pt", weights_only=True)
    for part in ("model", "ema"):
        for name in state[part]:
            assert torch.equal(state[part][name], whole[part][name]), f"{kind}: {name} differs"
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="least number of kills of each kind (default: 20)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random.seed(args.seed)
    with TemporaryDirectory() as name:
        photos, wholes = make_photos(Path(name) / "photos"), {}
        print("| killed | kills | runs | equal to the bit |\n|---|---|---|---|")
        for kind in args.kinds:
            one = kind not in TWO_RANKS
            if one not in wholes:
                output = Path(name) / f"whole-{one}"
                finish(start(output, kind, photos), output, 300)
                wholes[one] = torch.load(output / "last.pt", weights_only=True)
            kills = runs = 0
            while kills < args.rounds:
                kills += round_of(kind, Path(name), photos, wholes[one])
                runs += 1
                print(f"{kind}: {kills} kills in {runs} runs", file=sys.stderr, flush=True)
            print(f"| {kind} | {kills} | {runs} | {runs} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
