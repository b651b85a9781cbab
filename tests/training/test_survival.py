"""Kill, stop and resume train.py, start it twice, and damage its checkpoints. No state may be lost or mixed up."""

import functools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import random_kills
import torch
from forks import run_script
from running import opened, refused, run

import train
from deploy import run_directory
from kdlite.training import checkpoint
from kdlite.training import distributed as ranks

pytestmark = pytest.mark.slow  # they train
ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(__file__).parents[1].joinpath("own_models.py")
OWN = ["--model", f"{MODELS}:tiny"]  # a resume requires the model file again
TINY = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--epochs", "1", "--img-size", "16", "--reference", "0"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    random_kills.kill_all(tmp_path / "out")


@pytest.fixture
def photos(tmp_path):
    return random_kills.make_photos(tmp_path / "photos")


def start(*flags, ranks=1, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | options
    command = [sys.executable, *launcher, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.Popen(command, text=True, env=random_kills.environment(Path("out")), **options)


def fork(forks, *flags, processes=1):
    """Start train.py in forks of a process that has its imports, which take 4 s of CPU."""
    forks.start(run_script, ROOT / "train.py", *flags, processes=processes)


def when(condition, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def stop_and_call(function, *args):
    os.kill(os.getpid(), signal.SIGTERM)
    return function(*args)


def same_weights(a, b):
    states = [torch.load(Path(name) / "last.pt", weights_only=True)["model"] for name in (a, b)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


# ---- signals ----


@pytest.mark.whole_runs
def test_a_run_saves_and_exits_with_0_after_a_signal_and_the_resumed_run_is_bitwise_equal(forks):
    flags = [*TINY, "--epochs", 4, "--mixup", 0.2, "--ema-decay", 0.9]
    run(*flags, "--output", "whole")
    fork(forks, *flags, "--save-every", 0.0001, "--output", "out")  # saves after each step
    when(Path("out/last.pt").exists)
    sent = time.time()
    os.kill(forks.children[0].pid, signal.SIGHUP)  # SIGTERM is tested below, SIGUSR1 in random_kills.py
    (status,), (text,) = forks.wait()
    assert status == 0, text
    assert time.time() - sent < 10
    assert re.search(r"stopped by SIGHUP at step \d+ of epoch \d+: out/last.pt is saved", text)
    run("--resume", "--output", "out", *OWN)
    assert same_weights("whole", "out")
    metrics = [(Path(out) / "metrics.csv").read_text().splitlines() for out in ("whole", "out")]
    assert [line.split(",")[:6] for line in metrics[0]] == [line.split(",")[:6] for line in metrics[1]]


def log(output):
    file = Path(output) / "log.txt"
    return file.read_text() if file.exists() else ""


def test_a_run_stopped_during_evaluation_evaluates_after_the_resume(monkeypatch, capsys):
    run(*TINY, "--epochs", 2, "--output", "whole")
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", functools.partial(stop_and_call, train.evaluate))
        run(*TINY, "--epochs", 2, "--output", "out")
    assert "stopped by SIGTERM at step 6 of epoch 1" in capsys.readouterr().out
    run("--output", "out", "--resume", *OWN)
    assert same_weights("whole", "out")


@pytest.mark.parametrize("batch_size", [8, 64])
def test_a_new_batch_size_is_refused_within_an_epoch(batch_size, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", functools.partial(stop_and_call, train.evaluate))
        run(*TINY, "--output", "out")
    before = Path("out/args.json").read_bytes()
    batches = json.loads(before)["flags"]["batch_size"]
    line = refused(capsys, "--output", "out", "--resume", *OWN, "--batch-size", batch_size)
    assert f"out/last.pt is at step 6 of epoch 1: until that epoch ends, use --batch-size {batches}" in line
    assert Path("out/args.json").read_bytes() == before  # a refused resume changes no flag of the next one
    run("--output", "out", "--resume", *OWN)


def test_a_checkpoint_that_another_process_saves_during_the_start_is_not_overwritten(monkeypatch, capsys):
    run(*TINY, "--epochs", 2, "--output", "out")
    build = train.build_optimizer

    def build_slowly(*args):
        newer = Path("out/previous.pt").read_bytes()  # meanwhile the previous job saves its last checkpoint
        Path("out/last.pt").write_bytes(newer)
        return build(*args)

    monkeypatch.setattr(train, "build_optimizer", build_slowly)
    assert "another process saved a checkpoint in out while this run started" in (
        refused(capsys, "--output", "out", "--resume", *OWN, "--epochs", 3)
    )


@pytest.mark.trial
@pytest.mark.parametrize("kind", ["signal", "save"])
def test_a_run_killed_at_random_ends_with_bitwise_equal_weights(kind, tmp_path):
    """Run one kill of tests/random_kills.py: a signal to one of two ranks, or kill -9 during a save."""
    photos = random_kills.make_photos(tmp_path / "photos")
    whole = random_kills.start(tmp_path / "whole", kind, photos)
    random_kills.finish(whole, tmp_path / "whole", 200)
    state = torch.load(tmp_path / "whole/last.pt", weights_only=True)
    assert random_kills.round_of(kind, tmp_path, photos, state, most=1) == 1


def test_after_a_kill_the_other_process_ends_soon_with_a_message(photos, forks):
    flags = [*TINY, "--data", photos, "--workers", 0, "--epochs", 500, "--output", "out"]
    fork(forks, *flags, processes=2)
    when(Path("out/last.pt").exists)
    forks.children[1].kill()
    statuses, outputs = forks.wait(30)
    assert "error: rank 0: another process has ended" in outputs[0]
    assert statuses[0] > 0


@pytest.mark.trial
def test_after_a_kill_of_the_launcher_the_processes_end_soon_with_a_message(photos):
    two = start(*TINY, "--data", photos, "--workers", 0, "--epochs", 500, "--output", "out", ranks=2)
    when(Path("out/last.pt").exists)
    assert len(random_kills.ranks(Path("out"))) == 2
    os.kill(two.pid, signal.SIGKILL)
    text = random_kills.finish(two, Path("out"), 30)
    assert "stopped by SIGTERM" in text
    assert two.returncode != 0


def test_a_run_saves_after_a_signal_to_every_process_even_if_the_data_loader_is_slow(photos, forks):
    """Signal the whole process group twice, as a scheduler does. The data loading processes must survive."""
    flags = [*TINY, "--epochs", 400, "--data", photos, "--batch-size", 8, "--workers", 2, "--save-every", 0]
    forks.start(script_in_a_session, *flags, "--output", "out")
    when(Path("out/last.pt").exists)
    for _ in range(2):
        os.killpg(forks.children[0].pid, signal.SIGTERM)
        time.sleep(0.02)
    (status,), (text,) = forks.wait(60)
    assert status == 0, text
    assert "stopped by SIGTERM" in text
    assert "out/last.pt is saved" in text


def script_in_a_session(*flags):
    os.setsid()
    run_script(ROOT / "train.py", *flags)


@pytest.mark.trial
def test_a_suspended_job_continues():
    """Send SIGSTOP and SIGCONT to both ranks, as Slurm does. A rank waits for the other without a timeout."""
    two = start(*TINY, "--epochs", 30, "--output", "out", ranks=2)
    when(Path("out/last.pt").exists)
    processes = random_kills.ranks(Path("out"))
    for number, seconds in ((signal.SIGSTOP, 20), (signal.SIGCONT, 0)):
        for process in processes:
            os.kill(process, number)
        time.sleep(seconds)
    text, _ = two.communicate(timeout=200)
    assert two.returncode == 0, text
    assert "last top-1" in text


def test_a_parameter_without_a_gradient_is_named_once_on_two_ranks(photos, forks):
    flags = [*TINY, "--data", photos, "--workers", 0, "--model", f"{MODELS}:unused", "--output", "out"]
    fork(forks, *flags, processes=2)
    statuses, outputs = forks.wait(60)
    text = "".join(outputs)
    assert text.count("the model does not use its parameter forgotten.weight, forgotten.bias") == 1  # not once per rank
    assert f'File "{ROOT}/train.py"' not in text
    assert all(status > 0 for status in statuses)


# ---- the launcher ----


@pytest.mark.parametrize(("environment", "message"), [
    ({"RANK": "x", "WORLD_SIZE": "2"}, "must be whole numbers, got x, 0, 2"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be below WORLD_SIZE, got 2 and 2"),
    ({"WORLD_SIZE": "0"}, "RANK must be below WORLD_SIZE, got 0 and 0"),
    ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS is 2, but torchrun did not start this process"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE is 4, but torchrun did not start this process"),
])  # fmt: skip
def test_an_invalid_launch_gets_an_error_message(environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert message in ranks.read_launch()[3]


def test_torchrun_within_a_slurm_job_is_a_valid_launch(monkeypatch):
    for name, value in {"SLURM_NTASKS": "2", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.read_launch() == (1, 1, 2, None)


@pytest.mark.parametrize("port", ["in use", "99999", "x"])
def test_processes_that_cannot_connect_print_one_line(port, forks):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = str(taken.getsockname()[1]) if port == "in use" else port
        launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
        forks.start(run_script, ROOT / "train.py", *TINY, environment=launch)
        (status,), (text,) = forks.wait(100)
    assert status == 2
    lines = [line for line in text.strip().splitlines() if "train.py: error" in line]
    assert len(lines) == 1
    assert "the 2 processes could not connect at 127.0.0.1" in lines[0]
    assert "Traceback" not in text


# ---- one run per directory ----


def test_a_second_run_in_a_directory_is_refused_and_changes_nothing(capsys):
    run(*TINY, "--output", "out")
    before = {file.name: file.read_bytes() for file in Path("out").iterdir() if file.is_file() and file.name != ".lock"}
    with run_directory.locked(Path("out")):
        line = refused(capsys, *TINY, "--output", "out", "--resume")
        assert f"out is in use by process {os.getpid()} on {socket.gethostname()}: wait" in line
    assert {name: (Path("out") / name).read_bytes() for name in before} == before
    run("--output", "out", "--resume", *OWN, "--epochs", 2)  # the lock is free again


def test_the_lock_of_a_killed_run_is_released():
    code = "import sys, os, signal; from pathlib import Path; from deploy import run_directory as r\n"
    code += "with r.locked(Path('.')): os.kill(os.getpid(), signal.SIGKILL)"
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert killed.returncode == -signal.SIGKILL
    with run_directory.locked(Path()):
        pass


# ---- a run directory from elsewhere ----


def test_a_resume_never_runs_code_that_only_the_run_directory_names(tmp_path, capsys):
    run(*TINY, "--output", "out")
    Path("evil.py").write_text("open('ran', 'w')\n\ndef loss(student, teacher, target):\n    return student.sum()\n")
    about = json.loads(Path("out/args.json").read_text())
    for name, value in (("kd", "evil.py:loss"), ("teacher", "evil.py:loss"), ("model_file", ["evil.py:loss"])):
        given = about["given"] | {name: f"{tmp_path}/{value}" if isinstance(value, str) else value}
        Path("out/args.json").write_text(json.dumps(about | {"given": given}))
        line = refused(capsys, "--output", "out", "--resume", *OWN, "--epochs", 2)
        assert f"the run was started with code, --{name.replace('_', '-')}" in line
    Path("out/args.json").write_text(json.dumps(about))
    assert "started with code, --model" in refused(capsys, "--output", "out", "--resume", "--epochs", 2)
    assert not Path("ran").exists()


@pytest.mark.parametrize("name", [".lock", "log.txt"])
def test_a_link_in_a_run_directory_is_not_followed(name, capsys):
    run(*TINY, "--output", "out")
    Path("precious").write_text("mine")
    Path("out", name).unlink()
    Path("out", name).symlink_to(Path("precious").absolute())
    line = refused(capsys, "--output", "out", "--resume", *OWN, "--epochs", 2)
    assert f"cannot open out/{name}: it is a link; remove it" in line
    assert Path("precious").read_text() == "mine"


@pytest.mark.parametrize("name", ["args.json", "metrics.csv", "last.pt"])
def test_a_link_at_the_path_of_a_written_file_is_replaced(name):
    run(*TINY, "--output", "out")
    Path("precious").write_bytes(Path("out", name).read_bytes())
    before = Path("precious").read_bytes()
    Path("out", name).unlink()
    Path("out", name).symlink_to(Path("precious").absolute())
    run("--output", "out", "--resume", *OWN, "--epochs", 2)
    assert Path("precious").read_bytes() == before
    assert not Path("out", name).is_symlink()


# ---- changes at a resume ----


def test_other_validation_images_reset_the_best_epoch(tmp_path, capsys):
    photos = random_kills.make_photos(tmp_path / "photos")
    flags = [*TINY, "--data", photos, "--batch-size", 64, "--workers", 0]
    run(*flags, "--output", "out")
    state = torch.load("out/last.pt", weights_only=True)
    for file in (photos / "val/china").iterdir():
        if file.stem not in ("0", "1"):
            file.unlink()
    capsys.readouterr()
    run("--output", "out", "--resume", *OWN, "--epochs", 2)
    assert f"the best top-1 of those epochs, {state['progress']['best']:.2f} %, is ignored" in capsys.readouterr().out
    progress = torch.load("out/last.pt", weights_only=True)["progress"]
    assert progress["best"] == progress["rows"][1]["val_top1"]
    assert progress["answers"].shape == (2, 18)


def test_a_resume_prints_each_changed_flag_and_keeps_the_flags_of_a_finished_run(capsys):
    run(*TINY, "--output", "out")
    flags = Path("out/args.json").read_bytes()
    run("--output", "out", "--resume", *OWN, "--lr", 0.03)
    assert Path("out/args.json").read_bytes() == flags
    capsys.readouterr()
    run("--output", "out", "--resume", *OWN, "--epochs", 2, "--lr", 0.03, "--weight-decay", 0.25)
    printed = capsys.readouterr().out
    assert re.search(r"^changed by this resume: --lr [\d.]+ -> 0.03, --weight-decay [\d.e-]+ -> 0.25$", printed, re.M)
    assert json.loads(Path("out/args.json").read_text())["flags"]["lr"] == 0.03
    assert json.loads(Path("out/student/config.json").read_text())["training"]["epochs"] == 2
    log = Path("out/log.txt").read_text()
    assert printed.splitlines()[0] in log


def test_ctrl_c_names_the_checkpoint_that_a_resume_uses(monkeypatch, capsys):
    run(*TINY, "--output", "out")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", interrupt)
    run("--output", "out", "--resume", *OWN, "--epochs", 2, check=130)
    assert "out/last.pt is kept; --resume continues from it" in capsys.readouterr().out


def test_a_resume_without_a_checkpoint_never_replaces_finished_epochs(capsys):
    run(*TINY, "--epochs", 2, "--output", "out")
    for name in ("last.pt", "previous.pt"):
        Path("out", name).unlink()
    line = refused(capsys, *TINY, "--output", "out", "--resume")
    assert "out has finished epochs (metrics.csv), but neither last.pt nor previous.pt" in line
    Path("out/last.pt").write_bytes(Path("out/best.pt").read_bytes())
    Path("out/args.json").unlink()
    assert "args.json is missing, so the flags of the run are unknown" in (
        refused(capsys, *TINY, "--output", "out", "--resume")
    )


@pytest.mark.parametrize(("flags", "message"), [
    (["--seed", 5], "until that epoch ends, use --seed 0"),
    (["--kd", f"{MODELS.parents[1]}/examples/losses.py:tf_kd"], "until that epoch ends, use no --kd"),
    (["--fold", 0, 5], "--fold was None when this run began"), (["--pretrained", "x.pth"], "--pretrained was False"),
    (["--val-split", 0.5], "--val-split was None when this run began"), (["--small-stem"], "--small-stem was False"),
])  # fmt: skip
def test_a_flag_that_a_resume_cannot_change_is_refused(flags, message, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate", functools.partial(stop_and_call, train.evaluate))
        run(*TINY, "--output", "out")
    assert message in refused(capsys, "--output", "out", "--resume", *OWN, *flags)


def test_a_run_killed_while_it_saved_its_first_epoch_starts_again(capsys):
    run(*TINY, "--output", "out")
    for name in ("last.pt", "best.pt", "curves.png"):
        Path("out", name).unlink()
    capsys.readouterr()
    run("--output", "out", "--resume", *OWN)
    assert "no checkpoint in out yet: a new run starts" in capsys.readouterr().out
    assert Path("out/last.pt").exists()


def test_a_pipe_in_place_of_a_file_of_the_run_is_refused(capsys):
    run(*TINY, "--output", "out")
    for name in ("args.json", "last.pt", "split.csv"):
        file = Path("out", name)
        kept = file.read_bytes() if file.exists() else b""
        file.unlink(missing_ok=True)
        os.mkfifo(file)
        assert f"out/{name} is not a regular file" in refused(capsys, "--output", "out", "--resume", *OWN)
        file.unlink()
        if kept:
            file.write_bytes(kept)


def test_a_finished_run_prints_how_to_continue_it(capsys):
    run(*TINY, "--output", "out")
    run("--output", "out", "--resume", *OWN)
    assert "the run has finished its 1 epochs; a larger --epochs continues it" in capsys.readouterr().out


# ---- checkpoints ----


def test_the_last_two_checkpoints_are_kept_and_any_flipped_bit_is_detected(capsys):
    run(*TINY, "--epochs", 3, "--output", "out")
    last, previous = Path("out/last.pt"), Path("out/previous.pt")
    epochs = [torch.load(file, weights_only=True)["progress"]["epoch"] for file in (last, previous)]
    assert epochs == [3, 2]
    whole = last.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for bit in torch.randint(8 * len(whole), (300,), generator=generator).tolist():
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        assert not checkpoint.is_whole(bytes(damaged))
    last.write_bytes(damaged)
    run("--output", "out", "--resume", *OWN)
    printed = capsys.readouterr().out
    assert "out/last.pt is damaged or not a checkpoint of train.py: out/previous.pt is used" in printed
    assert "resuming from out/previous.pt, after epoch 2" in printed
    assert torch.load(last, weights_only=True)["progress"]["epoch"] == 3
    previous.write_bytes(b"")
    last.write_bytes(whole[:-1])
    assert "last.pt and out/previous.pt: damaged" in refused(capsys, "--output", "out", "--resume", *OWN)


def test_a_run_killed_between_two_renames_resumes_from_the_previous_checkpoint(capsys):
    run(*TINY, "--epochs", 2, "--output", "out")
    Path("out/last.pt").unlink()  # as between the two renames: previous.pt exists, last.pt does not
    run("--output", "out", "--resume", *OWN)
    assert "resuming from out/previous.pt, after epoch 1" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"weight": torch.zeros(2)}, torch.zeros(2), [1], {}, None, "bytes"])
def test_a_file_that_is_not_a_checkpoint_is_refused_and_kept(content, capsys):
    run(*TINY, "--output", "out")
    Path("out/previous.pt").unlink(missing_ok=True)
    torch.save(content, "out/last.pt")
    before = Path("out/last.pt").read_bytes()
    assert "out/last.pt: damaged, or not a checkpoint of train.py" in refused(
        capsys, *OWN, "--output", "out", "--resume"
    )
    assert Path("out/last.pt").read_bytes() == before


def test_resume_starts_a_new_run_in_an_empty_folder_and_continues_an_old_run(capsys):
    for epochs, line in (
        (1, "no checkpoint in out yet: a new run starts"),
        (2, "resuming from out/last.pt, after epoch 1"),
    ):
        run(*TINY, "--epochs", epochs, "--output", "out", "--resume")
        assert line in capsys.readouterr().out


def test_a_resume_from_another_folder_finds_the_data(tmp_path, monkeypatch, capsys):
    photos = random_kills.make_photos(tmp_path / "photos")
    flags = [*TINY, "--batch-size", 64, "--workers", 0]
    run(*flags, "--data", "photos", "--output", "out", "--kd", "kd", "--teacher", os.path.relpath(MODELS) + ":plain")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run("--output", tmp_path / "out", "--resume", *OWN, "--teacher", f"{MODELS}:plain", "--epochs", 2)
    given = json.loads((tmp_path / "out/args.json").read_text())["given"]
    assert given["data"] == str(photos)


def test_a_resume_with_a_renamed_class_is_refused(tmp_path, capsys):
    photos = random_kills.make_photos(tmp_path / "photos")
    flags = [*TINY, "--data", photos, "--batch-size", 64, "--workers", 0]
    run(*flags, "--output", "out")
    for part in ("train", "val"):
        (photos / part / "china").rename(photos / part / "zebra")
    line = refused(capsys, "--output", "out", "--resume", *OWN, "--epochs", 2)
    assert "the classes of out/last.pt differ from those of --data: china there, flower here" in line


def test_distillation_may_be_added_at_a_resume():
    run(*TINY, "--output", "out")
    run("--output", "out", "--resume", *OWN, "--epochs", 2, "--kd", "nkd", "--teacher", f"{MODELS}:plain")
    header, first, second = Path("out/metrics.csv").read_text().splitlines()
    assert "loss_nkd" in header
    assert first.count(",") == second.count(",") == header.count(",")


# ---- values that are not finite ----


@pytest.mark.whole_runs
def test_an_epoch_with_nan_in_its_evaluation_is_never_the_best(capsys):
    run(*TINY, "--model", f"{MODELS}:nan_after", "--epochs", 3, "--output", "out")
    config = json.loads(Path("out/student/config.json").read_text())
    assert config["metrics"]["epoch"] == 1
    assert f"next: python -m deploy.export out --model-file {MODELS}:nan_after" in capsys.readouterr().out
    assert torch.load("out/best.pt", weights_only=True)["progress"]["epoch"] == 1
    assert torch.load("out/last.pt", weights_only=True)["progress"]["epoch"] == 3


def test_weights_that_are_not_finite_are_not_saved(capsys):
    line = refused(capsys, *TINY, "--model", f"{MODELS}:infinite_gradient", "--batch-size", 128, "--output", "out")
    assert "the weights are not finite after epoch 1" in line
    assert not Path("out/last.pt").exists()
    assert not Path("out/student").exists()


# ---- a closed terminal ----


@pytest.mark.trial
def test_a_closed_stdout_does_not_end_the_run():
    read, write = os.pipe()
    process = start(*TINY, "--epochs", 4, "--output", "out", stdout=write, stderr=write)
    os.close(write)
    with os.fdopen(read) as stream:
        stream.readline()
    assert process.wait(120) == 0
    assert log("out").count("\nepoch ") == 4
    assert "last top-1" in log("out")


# ---- one process or several ----


def weights_after_three_steps(photos, grad_accum, method):
    """Return the weights of a model without batch norm after train.py's first three optimizer steps."""
    flags = [*TINY, "--data", photos, "--workers", 0, "--model", f"{MODELS}:plain", "--batch-size", 64,
             "--grad-accum", grad_accum, "--opt", "momentum", "--lr", 0.5, "--warmup-epochs", 0,
             "--label-smoothing", 0.1, "--crop", "none", *method]  # fmt: skip
    args, _, data = opened(*flags)
    cpu = torch.device("cpu")
    _, net, config = train.build_student(args, data)
    teacher = train.build_teacher(args, data, config)
    batches, _ = train.build_loaders(args, data, config, None, cpu)
    optimizer = train.build_optimizer(net, args)
    schedule = train.build_schedule(net, optimizer, args, len(batches) // grad_accum)
    method, scaler = train.build_method(args, data, cpu), torch.amp.GradScaler("cpu", enabled=False)
    to_device, parallel = train.ToDevice(config.mean, config.std, cpu), ranks.exchange_gradients(net, cpu)
    for i, batch in zip(range(1, 3 * grad_accum + 1), batches):
        last_pass = i % grad_accum == 0
        with ranks.gradient_sync(parallel, last_pass):
            train.train_step(parallel, teacher, to_device(batch), method, None, scaler, grad_accum)
        if last_pass:
            schedule.step_update(i // grad_accum - 1)
            train.optimizer_step(net, optimizer, scaler, None)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


METHODS = {
    "ce": [], "uskd": ["--self-kd", "uskd", "--tap", "1", "--alpha", "1", "--mu", "0.1"],
    "nkd": ["--kd", "nkd", "--teacher", f"{MODELS}:plain"], "kd": ["--kd", "kd", "--teacher", f"{MODELS}:plain"],
}  # fmt: skip


def save_weights_after_three_steps(photos):
    with ranks.process_group():
        found = {name: weights_after_three_steps(photos, 1, flags) for name, flags in METHODS.items()}
        torch.save(found, f"{ranks.RANK}.pt")


def test_one_process_two_processes_and_two_passes_take_the_same_step(photos, forks):
    forks.run(save_weights_after_three_steps, photos, processes=2)
    first, second = (torch.load(f"{rank}.pt") for rank in range(2))
    for name, flags in METHODS.items():
        whole = weights_after_three_steps(photos, 1, flags)
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], whole, rtol=1e-4, atol=1e-5)
        if name != "uskd":  # because a pass of --grad-accum uses only its own logits: see Method.group
            torch.testing.assert_close(weights_after_three_steps(photos, 2, flags), whole, rtol=1e-4, atol=1e-5)


# ---- too little memory ----


@pytest.mark.trial
@pytest.mark.skipif(subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
                    reason="needs the right to mount a /dev/shm of its own")  # fmt: skip
def test_a_small_dev_shm_is_refused_before_the_first_batch():
    """Mount 64 MiB, the usual size in a container, where the workers would hang without the check."""
    flags = [*TINY, "--workers", 2, "--batch-size", 128, "--img-size", 224, "--output", "out"]
    mount = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "sh", "-c", mount, "-", sys.executable, ROOT / "train.py", *flags]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("train.py: error: /dev/shm has 64 MiB free, but the workers need up to 147 MiB")
    assert "--shm-size" in line
    assert "--workers 0" in line
    assert not Path("out").exists()


@pytest.mark.whole_runs
def test_a_cache_larger_than_memory_is_refused(capsys):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20), before[1]))
    try:
        line = refused(capsys, *TINY, "--cache", "device", "--img-size", 512, "--output", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert line.startswith("train.py: error: out of memory: use smaller batches")
