"""Test --fold, and python -m kdlite.training.tune, which chooses a loss and its weights on the training images."""

import functools
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import opened, refused, run, write_labels

import train
from deploy.cli import UserError
from kdlite.training import launch, loading, teacher_labels, tune
from kdlite.training.data import class_counts
from kdlite.training.launch import gain, of_labels
from kdlite.training.tune import ARMS, Plan

MODELS = Path(__file__).parents[1].joinpath("own_models.py")
TINY = ["--device", "cpu", "--model", f"{MODELS}:tiny", "--img-size", "16", "--workers", "0"]
RECIPE = ["--recipe", "digits", "--batch-size", "8", "--crop", "none"]
TEACHER = ["--teacher", "t/student", "--model-file", f"{MODELS}:tiny"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Write photos/ with three classes."""
    monkeypatch.chdir(tmp_path)
    for name, low in (("dark", 0), ("grey", 70), ("bright", 140)):
        for part, count in (("train", 11), ("val", 4)):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([i, low]).integers(low, low + 110, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{part}{i:02}.png")


@pytest.fixture
def teacher(photos):
    """Train t/ on photos/, then damage every validation image, so that a run that reads one fails."""
    run(*TINY, *RECIPE, "--data", "photos", "--epochs", 3, "--reference", 0, "--output", "t")
    for file in Path("photos/val").rglob("*.png"):
        file.write_bytes(b"not an image")


def call(*flags, check=0):
    assert tune.main([str(flag) for flag in flags]) == check


def run_here(commands, command, _output):
    """Run a command in this process, and append it to the commands."""
    commands.append(command)
    main = train.main if command[1].endswith("train.py") else teacher_labels.main
    assert main(command[2:] if main is train.main else command[3:]) == 0


# ---- --fold --------------------------------------------------------------------------------------------------------


def test_the_parts_share_no_image_and_contain_every_training_image(photos):
    whole = opened(*TINY, *RECIPE, "--data", "photos")[2]
    seen = []
    for part in range(5):
        data = opened(*TINY, *RECIPE, "--data", "photos", "--fold", part, 5)[2]
        assert sorted(data.train.files() + data.val.files()) == sorted(whole.train.files())
        assert set(class_counts(data.val)) <= {2, 3}
        assert [data.val[i][1] for i in range(len(data.val))] == data.val.targets
        seen += data.val.files()
    assert sorted(seen) == sorted(whole.train.files())


def test_digits_have_parts_too():
    whole, data = opened()[2], opened("--fold", 1, 4)[2]
    assert len(data.train) + len(data.val) == len(whole.train)
    assert [(count + 2) // 4 for count in class_counts(whole.train)] == class_counts(data.val)


@pytest.mark.parametrize("fold", [(5, 5), (0, 1), (0, 0)])
def test_a_part_that_does_not_exist_is_refused(photos, fold):
    with pytest.raises(UserError, match="expected I N with I < N"):
        opened(*TINY, *RECIPE, "--data", "photos", "--fold", *fold)


def test_a_class_without_an_image_to_train_on_is_refused(photos):
    for file in sorted(Path("photos/train/grey").iterdir())[1:]:
        file.unlink()
    with pytest.raises(UserError, match="no image of grey is left to train on"):
        opened(*TINY, *RECIPE, "--data", "photos", "--fold", 0, 5)


def test_a_part_without_an_image_is_refused(photos):
    for folder in Path("photos/train").iterdir():
        for file in sorted(folder.iterdir())[4:]:
            file.unlink()
    with pytest.raises(UserError, match="no image is left to validate on: use a smaller N"):
        opened(*TINY, *RECIPE, "--data", "photos", "--fold", 4, 5)


class Numbers:
    """Imitate stored labels: return the view and the number of an image."""

    seed, views = 3, 2

    def __call__(self, view, index):
        return (torch.tensor([view, index]),)


def test_an_image_has_the_same_crop_and_stored_answer_in_a_part_and_in_the_whole_data_set(photos):
    whole = opened(*TINY, *RECIPE, "--data", "photos")[2].train
    part = opened(*TINY, *RECIPE, "--data", "photos", "--fold", 2, 5)[2].train
    transform = loading.View((3, 16, 16), "pad", 0.5, "bilinear").transform()
    of_whole, of_part = (loading.Samples(source, transform, stored=Numbers()) for source in (whole, part))
    for index in (0, 7, len(part) - 1):
        number = whole.files().index(part.files()[index])
        assert torch.equal(of_part[1, index].images, of_whole[1, number].images)
        assert of_part[1, index].teacher[0].tolist() == [1, number]
    assert number != index


def test_labels_of_all_training_images_are_valid_for_a_part(photos):
    view = loading.View((3, 16, 16), "none", 0.0, "bilinear")
    whole, part = (opened(*TINY, *RECIPE, "--data", "photos", *fold)[2] for fold in ((), ("--fold", 2, 5)))
    assert teacher_labels.describe_images(whole, view) == teacher_labels.describe_images(part, view)


# ---- a plan for the time -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "full", "plan"),
    [
        (1e9, 8, Plan([9, 4, 2], [2, 4, 8], 5)),
        (1250, 8, Plan([9, 4, 2], [2, 4, 8], 2)),  # a part takes 575 s: 50 epochs of 10 s, 15 starts of 5 s
        (574, 8, Plan([9, 4, 2], [1, 2, 4], 1)),
        (324, 8, Plan([9, 4], [1, 2], 1)),  # three rounds take 325 s
        (234, 8, Plan([9], [2], 1)),  # two rounds take 235 s
        (400, 1, Plan([9, 4, 2], [1, 1, 1], 1)),  # the whole training has one epoch
    ],
)
def test_a_plan_fills_the_time(seconds, full, plan):
    assert tune.make_plan(seconds, 10, 5, 9, full) == plan


def test_four_arms_have_two_rounds():
    assert tune.make_plan(100, 1, 0, 4, 8) == Plan([4, 2], [4, 8], 3)


def test_a_time_without_room_for_one_round_is_refused():
    with pytest.raises(UserError, match=r"2\.23 minutes are left, but .* of 9 arms takes 2\.25 minutes"):
        tune.make_plan(134, 10, 5, 9, 8)


# ---- rounds --------------------------------------------------------------------------------------------------------


class Fake:
    """Replace the trainer; the answers of an arm depend on its name, and some arms fail."""

    def __init__(self, tops):
        self.tops, self.calls = tops, []

    def run(self, name, epochs, part):
        self.calls.append((name, epochs, part))
        if self.tops[name] is None:
            raise UserError("the loss is not finite")
        return (np.arange(100) < self.tops[name]).astype(float), 1.0


def test_the_better_half_gets_more_epochs_on_other_parts():
    fake = Fake({"a": 10, "b": 40, "c": 30, "d": 20})
    rounds = tune.search(fake, list("abcd"), Plan([4, 2], [3, 6], 2), np.inf)
    assert fake.calls == [(name, 3, part) for name in "abcd" for part in (0, 1)] + [
        (name, 6, part) for name in "bc" for part in (2, 3)
    ]
    assert [list(found) for found in rounds] == [list("abcd"), list("bc")]
    assert len(rounds[1]["b"]) == 200


def test_a_failed_arm_is_dropped_and_the_others_continue(capsys):
    rounds = tune.search(Fake({"a": 10, "b": None, "c": 30}), list("abc"), Plan([3, 2], [1, 2], 1), np.inf)
    assert [sorted(found) for found in rounds] == [["a", "c"], ["a", "c"]]
    assert "b failed: the loss is not finite" in capsys.readouterr().out


def test_a_search_whose_runs_all_fail_is_refused():
    with pytest.raises(UserError, match="every run of round 1 failed"):
        tune.search(Fake({"a": None, "b": None}), list("ab"), Plan([2], [1], 1), np.inf)


def test_a_round_that_does_not_end_in_time_does_not_count(monkeypatch, capsys):
    clock = iter(range(100))
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    fake = Fake({"a": 10, "b": 40, "c": 30, "d": 20})
    rounds = tune.search(fake, list("abcd"), Plan([4, 2], [1, 2], 1), 4)
    assert len(rounds) == 1
    assert len(fake.calls) == 5  # one run of the second round begins in time
    assert "the time ended in round 2" in capsys.readouterr().out


# ---- the result ----------------------------------------------------------------------------------------------------


def test_the_standard_error_of_a_gain_is_that_of_the_differences_of_images():
    right, base = np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 0, 0])
    assert gain(right, base) == (50.0, pytest.approx(100 * np.std([0, 1, 0, 1]) / 2))


def test_an_arm_within_two_standard_errors_is_not_significantly_behind_the_best(capsys):
    rng = np.random.default_rng(0)
    best = (rng.random(1000) < 0.7).astype(float)
    near, early = best.copy(), best.copy()
    near[:10], early[:3] = 1 - near[:10], 0
    first = {"far": np.zeros(1000), "early": early, "best": best, "near": 0.5 * best}
    rounds = [first, {"near": near, "best": best + (best == 0) * (rng.random(1000) < 0.02)}]
    assert tune.report(rounds, [1, 2]) == "best"
    printed = capsys.readouterr().out
    assert re.search(r"^not significantly behind best .*: early$", printed, re.M)
    lines = [line.split(" | ")[:3] for line in printed.splitlines()[2:6]]
    assert [line[0][2:] for line in lines] == ["best", "near", "early", "far"]
    assert [line[1] for line in lines] == ["2", "2", "1", "1"]
    assert re.search(r"^\| far \| 1 \| 1000 \| 0\.0 \| \d+\.\d \+- 1\.\d \|$", printed, re.M)


# ---- the command ---------------------------------------------------------------------------------------------------


def test_the_command_for_labels_gets_only_its_own_flags():
    flags = ["--data", "d", "--lr", "0.1", "--img-size", "32", "64", "--ema-decay=0.9", "--hflip=0", "--model", "m"]
    assert of_labels(flags) == ["--data", "d", "--img-size", "32", "64", "--hflip=0", "--model", "m"]


@pytest.mark.slow
def test_tune_reads_no_validation_image_and_prints_a_command_that_trains(teacher, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(launch, "run", functools.partial(run_here, commands))
    monkeypatch.setattr(tune, "make_plan", lambda *_: Plan([2, 1], [1, 2], 1))
    monkeypatch.setattr(tune, "ARMS", {name: ARMS[name] for name in ("cross-entropy", tune.FIRST)})
    flags = ["--data", "photos", *TINY, *RECIPE, "--epochs", 4, "--warmup-epochs", 2]
    call(*flags, *TEACHER, "--views", 1, "--output", "out")
    printed = capsys.readouterr().out
    assert "plan: 2 arms of 1 epochs, 1 arms of 2 epochs; runs of an arm in a round: 1" in printed
    assert len(commands) == 4  # one for the labels and three runs; the run that measures the time is one of them
    warmups = [command[command.index("--warmup-epochs", command.index("--fold") - 4) + 1] for command in commands[1:]]
    assert warmups == ["0.5", "0.5", "1.0"]
    (line,) = re.findall(r"^next: torchrun train\.py (.*)$", printed, re.M)
    train.parse_flags(line.split())
    assert ("--teacher-labels" in line) == (" --kd " in line)

    commands.clear()  # the same command, even with more time, reuses the measurement and the runs
    monkeypatch.delattr(tune, "measure")
    call(*flags, *TEACHER, "--views", 1, "--output", "out", "--minutes", 40)
    assert [command[1] for command in commands] == ["-m"]
    assert f"next: torchrun train.py {line}" in capsys.readouterr().out

    line = refused(capsys, *flags, *TEACHER, "--views", 2, "--output", "out", command=call, program="tune")
    assert "has the runs of another command" in line


@pytest.mark.trial
def test_arms_that_need_all_classes_are_skipped_if_the_labels_have_only_the_top_k(teacher, monkeypatch, capsys):
    flags = ["--data", "photos", *TINY, *RECIPE]
    names = []
    label_flags = ["--data", "photos", *TINY[2:], *TEACHER, "--recipe", "digits", "--crop", "none"]
    write_labels(*label_flags, "--views", 1, "--top-k", 1, "--output", "L")
    monkeypatch.setattr(tune, "measure", lambda _: (1.0, 1.0))
    monkeypatch.setattr(tune, "search", lambda _, found, *__: names.extend(found) or [{found[0]: np.ones(4)}])
    call(*flags, "--teacher-labels", "L", "--output", "out")
    assert names == ["cross-entropy", "NKD gamma 0.5 T 1", "NKD gamma 1.5 T 1", "NKD gamma 3.5 T 1"]
    printed = capsys.readouterr().out
    assert "KD is skipped, and NKD at temperatures other than 1" in printed
    assert "--teacher-labels" not in printed.rpartition("next:")[2]  # cross-entropy is the best


def test_a_signal_that_stops_a_run_stops_the_search(photos, monkeypatch):
    monkeypatch.setattr(launch, "run", lambda *_: None)  # as if train.py has saved its state and ended with status 0
    trainer = tune.Trainer([], Path("L"), Namespace(epochs=4, warmup_epochs=0, seed=0), Path("out"))
    with pytest.raises(KeyboardInterrupt):
        trainer.run("cross-entropy", 2, 0)


def test_a_search_that_stopped_before_it_measured_refuses_another_command(tmp_path):
    assert tune.begin(tmp_path / "out/tune.json", ["--lr", "1"]) is None
    assert tune.begin(tmp_path / "out/tune.json", ["--lr", "1"]) is None
    with pytest.raises(UserError, match="another command"):
        tune.begin(tmp_path / "out/tune.json", ["--lr", "2"])


@pytest.mark.parametrize("flag", ["--kd=nkd", "--gamma=1", "--fold 1 5", "--unlabelled=more", "--self-kd=uskd"])
def test_a_flag_that_tune_chooses_or_lacks_is_refused(photos, capsys, flag):
    given = ["--data", "photos", "--teacher", "t", *flag.split()]
    line = refused(capsys, *given, command=call, program="tune")
    assert f"{flag.split()[0].partition('=')[0]}: tune chooses or does not support" in line


def test_mixed_images_are_refused_before_the_teacher_answers(photos, capsys):
    given = ["--data", "photos", *TINY, *RECIPE, "--teacher", "t", "--mixup", 0.5]
    assert "give --mixup 0" in refused(capsys, *given, command=call, program="tune")


def test_a_start_by_torchrun_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(tune, "WORLD_SIZE", 2)
    assert "without torchrun" in refused(capsys, "--teacher", "t", command=call, program="tune")
