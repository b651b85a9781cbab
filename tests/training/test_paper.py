"""Test examples/paper: each row of the paper's tables trains, and our own tables agree with their files."""

import csv
import functools
import importlib.util
import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from PIL import Image
from running import rows as metrics_of
from running import run, write_labels
from sklearn.datasets import load_sample_images
from torchvision.datasets import FakeData

import train
from deploy.cli import UserError, run_command
from deploy.flags import pick_recipe, read_flags, settle_flags
from deploy.student import build_model, find_architecture
from kdlite import Teacher, uskd_loss
from kdlite.training import teacher_labels
from kdlite.training.data import Data, hold_out, open_data
from kdlite.training.launch import of_labels
from kdlite.training.loading import Batch

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples/paper"


def load(name):
    spec = importlib.util.spec_from_file_location(name, PAPER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def rows():
    """Return the flags that rows.sh passes to train.py, by the name of the row."""
    command = ["bash", str(PAPER / "rows.sh")]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split()[0] for line in listed]
    lines = subprocess.run(
        [*command, "all"], capture_output=True, text=True, check=True, env=os.environ | {"LAUNCH": "echo"}
    ).stdout.splitlines()
    return dict(zip(names, (shlex.split(line)[1:] for line in lines), strict=True))


def settle(flags):
    return settle_flags(train.FLAGS, train.parse_flags(flags))[0]


# ---- the rows ----

# Networks of torchvision and of our own, a transformer, and both methods. `make test-all` runs the other rows.
OF_EACH_KIND = {
    "nkd-resnet18",
    "nkd-resnet56-resnet20",
    "nkd-vgg13-mobilenet_v2_half",
    "uskd-deit-tiny",
    "uskd-mobilenet-v2",
}

# the layer that each weak head reads in the official configs, and its channels
TAPS = {
    "uskd-mobilenet": ("blocks.3.5", 512),
    "uskd-mobilenet-v2": ("features.17", 320),
    "uskd-shufflenet-v2": ("stage4.3", 464),
    "uskd-resnet18": ("layer3.1", 256),
    "uskd-resnet50": ("layer3.5", 1024),
    "uskd-resnet101": ("layer3.22", 1024),
    "uskd-regnet": ("trunk_output.block3", 408),
    "uskd-swin-tiny": ("features.5.5", 384),
    "uskd-deit-tiny": ("blocks.5", 192),
    "uskd-cifar-resnet18": ("layer3.1", 256),
}


def test_every_row_of_the_paper_is_listed():
    names = list(rows())
    assert set(names) > OF_EACH_KIND
    assert len([n for n in names if n.startswith("nkd-")]) == 4 + 1 + 7 + 4
    assert {n for n in names if n.startswith("uskd-")} == set(TAPS)


def test_an_unknown_row_is_an_error():
    result = subprocess.run(["bash", str(PAPER / "rows.sh"), "nope"], capture_output=True, text=True)
    assert result.returncode == 2
    assert "no row named nope" in result.stderr


def test_the_list_has_the_epochs_the_expected_top1_and_the_hours_of_each_row():
    listed = subprocess.run(["bash", str(PAPER / "rows.sh")], capture_output=True, text=True, check=True).stdout
    line = r"^(\S+) +(\d+) epochs  ([\d.]+ -> [\d.]+|not given) +([\d.]+) A100 hours or more$"
    found = re.findall(line, listed, re.M)
    assert len(found) == len(listed.splitlines()) == len(rows())
    for name, epochs, _, hours in found:
        assert settle(rows()[name]).epochs == int(epochs), name
        assert float(hours) > 0
    by_name = {name: (top1, float(hours)) for name, _, top1, hours in found}
    assert by_name["nkd-resnet18"][0] == "69.90 -> 71.96"
    # 100 epochs of 1,281,167 images at 2,470 a second
    assert by_name["uskd-resnet50"][1] == pytest.approx(14.4, abs=0.05)
    assert by_name["uskd-cifar-resnet18"][1] == pytest.approx(0.3, abs=0.05)  # at most 10,000 images a second


def run_rows(*asked):
    command, environment = ["bash", str(PAPER / "rows.sh"), *asked], os.environ | {"LAUNCH": "echo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_flags_after_the_names_go_to_train_py():
    lines = run_rows("uskd-cifar-resnet18", "nkd-resnet18", "--epochs", "1", "--batch-size", "8").stdout.splitlines()
    assert len(lines) == 2
    for line in lines:
        args = settle(shlex.split(line)[1:])
        assert (args.epochs, args.batch_size) == (1, 8)


def test_flags_without_a_row_are_an_error():
    result = run_rows("--epochs", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "rows.sh: error: --epochs without a row: give names before the flags\n"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OF_EACH_KIND else pytest.mark.trial) for name in rows()]
)
def test_a_row_builds_its_networks_and_schedule_and_takes_a_step(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    flags = rows()[name]
    assert flags[-2:] == ["--output", f"runs/paper/{name}"]
    classes, size = (100, 32) if "cifar100" in flags else (1000, 32 if "deit" in name else 64)
    small = ["--batch-size", "2", "--img-size", str(size), "--device", "cpu", "--workers", "0"]
    args = settle([*flags, *small])
    images = FakeData(8, (3, size, size), classes)
    data = Data(images, images, [str(i) for i in range(classes)], (0.5,) * 3, (0.5,) * 3)
    teacher = None
    if args.teacher:
        name_of_teacher, theirs = args.teacher, settle([])
        if args.teacher.startswith("runs/paper/"):  # the student of another row
            theirs = settle(rows()[Path(args.teacher).parts[2]])
            name_of_teacher = theirs.model
        architecture = find_architecture(name_of_teacher, theirs.model_args, theirs.small_stem)
        teacher = Teacher(build_model(architecture, classes, size, [name_of_teacher]))
    _, net, _ = train.build_student(args, data)
    if args.self_kd:
        assert (net.tap, net.head.in_features) == TAPS[name]
    updates = 4
    optimizer = train.build_optimizer(net, args)
    schedule = train.build_schedule(net, optimizer, args, updates)
    lr = []
    for step in range(0, args.epochs * updates, updates):
        schedule.step_update(step + updates // 2)
        lr.append(optimizer.param_groups[0]["lr"])
    assert max(lr) == pytest.approx(args.lr, rel=0.01)
    if args.schedule == "step":
        assert len({round(math.log(rate), 6) for rate in lr}) == len(args.step_epochs) + 1
        changes = [epoch for epoch in range(1, args.epochs) if not math.isclose(lr[epoch], lr[epoch - 1])]
        assert changes == args.step_epochs
    else:
        assert lr[-1] < 0.01 * args.lr

    before = [p.detach().clone() for p in net.parameters()]
    batch = Batch(torch.randn(2, 3, size, size), torch.tensor([3, 7]), [])
    method, scaler = train.build_method(args, data, torch.device("cpu")), torch.amp.GradScaler("cpu", enabled=False)
    losses = train.train_step(net.train(), teacher, batch, method, None, scaler)
    assert set(losses) == {"ce"} | ({args.kd} if args.kd else set()) | ({"uskd"} if args.self_kd else set())
    assert all(loss.isfinite() for loss in losses.values())
    train.optimizer_step(net, optimizer, scaler, args.clip_grad)
    assert not all(torch.equal(a, b) for a, b in zip(before, net.parameters()))


# the schedules of the official configs and of the CRD protocol
SCHEDULES = {
    "nkd-resnet18": (100, 256, 0.1, 1e-4, [30, 60, 90], 0.1),
    "uskd-mobilenet-v2": (300, 256, 0.045, 4e-5, list(range(1, 300)), 0.98),
    "uskd-cifar-resnet18": (200, 128, 0.1, 5e-4, [60, 120, 160], 0.2),
    "nkd-resnet56-resnet20": (240, 64, 0.05, 5e-4, [150, 180, 210], 0.1),
    "nkd-vgg13-mobilenet_v2_half": (240, 64, 0.01, 5e-4, [150, 180, 210], 0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_row_has_the_schedule_of_its_protocol(name):
    args = settle(rows()[name])
    names = ("epochs", "batch_size", "lr", "weight_decay", "step_epochs", "step_factor")
    assert tuple(getattr(args, flag) for flag in names) == SCHEDULES[name]
    assert args.small_stem == (name == "uskd-cifar-resnet18")


# ---- the networks ----

PARAMETERS = {  # numbers of parameters with 100 classes, as in the papers of the protocol
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenet_v2_half": 812_836,
    "shufflenet_v1": 949_258,
    "shufflenet_v2": 1_355_528,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_cifar_network_has_the_parameters_of_the_literature(name):
    model = getattr(load("cifar_models"), name)(num_classes=100)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_an_impossible_depth_is_refused():
    with pytest.raises(ValueError, match=r"6n \+ 2"):
        load("cifar_models").resnet(10, depth=18)


# ---- the ablations ----


def test_the_variants_of_the_ablations_equal_their_formulas():
    ablation = load("ablation")
    generator = torch.Generator().manual_seed(0)
    student, teacher, weak = (3 * torch.randn(16, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    target = torch.randint(9, (16,), generator=generator)
    rows_of = [x.tolist() for x in (student, teacher, weak)]

    both = [oracle.nkd_row(s, t, k, 2.0, 3.0) for s, t, k in zip(*rows_of[:2], target.tolist())]
    first = [oracle.nkd_row(s, t, k, 0.0, 3.0) for s, t, k in zip(*rows_of[:2], target.tolist())]
    each = {"reduction": "none"}
    ours = ablation.nkd_without_target(student, teacher, target, gamma=2.0, temperature=3.0, **each)
    assert ours.mean().item() == pytest.approx(sum(both) / 16 - sum(first) / 16, rel=1e-5)

    one_hot = torch.nn.functional.one_hot(target, 9).tolist()
    rest = sum(oracle.uskd_rows(rows_of[0], rows_of[2], one_hot, 0.7, 0.0, 0.3, 0.1)) / 16
    non_target = 0.0
    for s, w, t in zip(rows_of[0], rows_of[2], target.tolist()):
        log_s, probs = oracle.log_softmax(s), oracle.softmax(w)
        score = [probs[i] / (1 - probs[t] + 1e-6) + log_s[i] / (1 - log_s[t]) for i in range(9)]
        order = sorted(range(9), key=lambda i: -score[i])
        z = {i: 1 / (order.index(i) + 1) for i in range(9) if i != t}
        log_n = oracle.log_softmax(s, leave_out=t)
        non_target -= sum(z[i] * log_n[i] for i in z) / sum(z.values()) / 16
    ours = ablation.uskd_ranked_by_log(student, weak, target, alpha=0.7, beta=0.5, mu=0.3, **each)
    assert ours.mean().item() == pytest.approx(rest + 0.5 * non_target, rel=1e-5)


def test_the_zipf_labels_of_another_network_equal_their_formula():
    zipf = load("zipf")
    generator = torch.Generator().manual_seed(0)
    student, other = (3 * torch.randn(16, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(9, (16,), generator=generator)
    expected = []
    for s, scores, t in zip(student.tolist(), other.tolist(), target.tolist()):
        order = sorted(range(9), key=lambda i: -scores[i])
        z = {i: 1 / (order.index(i) + 1) for i in range(9) if i != t}
        log_n = oracle.log_softmax(s, leave_out=t)
        expected.append(-sum(z[i] * log_n[i] for i in z) / sum(z.values()))
    assert zipf.teacher_1(student, other, target).tolist() == pytest.approx(expected, rel=1e-6)
    assert zipf.teacher_01(student, other, target).tolist() == pytest.approx([x / 10 for x in expected], rel=1e-6)
    # if the weak head gives all classes the same probability, USKD ranks by the student
    uskd = uskd_loss(student, torch.zeros_like(student), target, alpha=0.0, beta=1.0, mu=0.0, reduction="none")
    assert zipf.student_1(student, None, target).tolist() == pytest.approx(uskd.tolist(), rel=1e-5)
    by_weak = load("ablation").uskd_ranked_by_weak(
        student, other, target, alpha=0.0, beta=1.0, mu=0.0, reduction="none"
    )
    assert by_weak.tolist() == pytest.approx(expected, rel=1e-5)


def test_each_rule_for_gamma_equals_its_formula():
    rules = load("gamma_rules")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(16, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.arange(16) % 8

    def expected(gamma, others=None):
        """Return the NKD loss of each row.

        gamma: function of T_t and N(T) of a row
        others: function of the teacher's logits and the label; it returns the weights of the non-target classes, which
            replace N(T)
        """
        found = []
        for s, t, label in zip(student.tolist(), teacher.tolist(), target.tolist()):
            n_t = oracle.softmax(t, leave_out=label)
            n = others(t, label) if others else n_t
            log_n = oracle.log_softmax(s, leave_out=label)
            non_target = -sum(n[i] * log_n[i] for i in range(9) if i != label)
            t_t = oracle.softmax(t)[label]
            found.append(-t_t * oracle.log_softmax(s)[label] + gamma(t_t, n_t, label) * non_target)
        return pytest.approx(found, rel=1e-6)

    def entropy(n, label):
        return -sum(n[i] * math.log(n[i]) for i in range(9) if i != label)

    def mean_with_twin(t, label):
        """Return the average of N(T) of a row and the mean of N(T) over the two rows of its class."""
        rows = [oracle.softmax(row, leave_out=label) for row in (teacher[label].tolist(), teacher[label + 8].tolist())]
        return [n / 2 + (a + b) / 4 for n, a, b in zip(oracle.softmax(t, leave_out=label), *rows)]

    found = {name: rule(student, teacher, target).tolist() for name, rule in rules.RULES.items()}
    for name, gamma in rules.CONSTANTS.items():
        assert found[name] == expected(lambda *_, gamma=gamma: gamma)
    assert found["unsure"] == expected(lambda t_t, *_: 4 * (1 - t_t))
    assert found["entropy"] == expected(lambda _, n, label: 6 * (1 - entropy(n, label) / math.log(8)))
    assert found["sharp"] == expected(lambda *_: 1, lambda t, label: oracle.softmax(t, 0.5, leave_out=label))
    assert found["class_mean"] == expected(lambda *_: 1, mean_with_twin)
    assert found["falling"] == expected(lambda *_: 3.5 * 0.999)
    assert rules.falling(student, teacher, target).tolist() == expected(lambda *_: 3.5 * 0.998)


@pytest.mark.parametrize(
    ("variant", "replaced"),
    [("nkd_without_target", "nkd_loss"), ("uskd_ranked_by_log", "uskd_loss"), ("uskd_ranked_by_weak", "uskd_loss")],
)
def test_train_py_calls_the_variant_instead_of_the_loss(monkeypatch, variant, replaced):
    name, function = load("ablation").VARIANTS[variant]
    assert name == replaced
    logits, other = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    weak, teacher = (None, other) if replaced == "nkd_loss" else (other, None)
    target = torch.arange(8) % 5
    term = replaced.removesuffix("_loss")
    method = train.Method("nkd" if teacher is not None else None)
    before = train.loss_terms(method, logits, weak, teacher, target)
    monkeypatch.setattr(train, name, function)
    after = train.loss_terms(method, logits, weak, teacher, target)
    assert after.keys() == before.keys() == {"ce", term}
    assert after["ce"] == before["ce"]
    assert after[term].shape == ()
    assert after[term] != before[term]


def test_an_unknown_variant_is_an_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ablation.py", "nope"])
    with pytest.raises(SystemExit, match=r"ablation.py: error: .*nkd_without_target"):
        runpy.run_path(str(PAPER / "ablation.py"), run_name="__main__")


# ---- our tables ----


def test_the_tables_on_the_pages_agree_with_the_files():
    done = subprocess.run([sys.executable, PAPER / "report.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "print_tables"), [("practitioner", "print_tables"), ("uskd", "print_table")])
def test_the_page_has_each_difference_that_an_experiment_prints(name, print_tables, monkeypatch, capsys):
    monkeypatch.syspath_prepend(PAPER)
    experiment = load(name)
    getattr(experiment, print_tables)(rows_of(name))
    printed = re.sub(r"^\| the domain teacher .*", "", capsys.readouterr().out, flags=re.M)  # not in the page's table
    found = re.findall(r"[+-][\d.]+ \([+-][\d.]+ to [+-][\d.]+\)", printed)
    assert len(found) >= 15
    page = (PAPER / "README.md").read_text()
    assert [text for text in found if text not in page] == []


def test_the_table_of_the_rules_for_gamma_agrees_with_its_file():
    section = (PAPER / "README.md").read_text().partition("### Rules for gamma")[2].partition("\n### ")[0]
    table = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    rows, settings = rows_of("gamma"), table[0][1:]
    for rule, *cells in table[1:]:
        name = f"constant_{rule.replace('.', '_')}" if rule[0].isdigit() else rule.replace(" ", "_")
        for setting, cell in zip(settings, cells, strict=True):
            means = dict.fromkeys((row["rule"] for row in rows), 0.0)
            for row in rows:
                means[row["rule"]] += float(row["top1"]) / 3 if row["setting"] == setting else 0
            best = max(mean for rule, mean in means.items() if rule.startswith("constant"))
            top1, _, behind = cell.replace("**", "").partition(" ")
            assert float(top1) == pytest.approx(means[name], abs=0.0501)
            assert float(behind.strip("()") or 0) == pytest.approx(means[name] - best, abs=0.0501)


def rows_of(name):
    with open(PAPER / f"results/{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def compare(monkeypatch, *names):
    """Run report.py --compare in this process."""
    monkeypatch.syspath_prepend(PAPER)
    monkeypatch.setattr(sys, "argv", ["report.py", "--compare", *names])
    return load("report").main()


def test_the_t_test_of_two_rows_pairs_their_seeds(monkeypatch, capsys):
    with open(PAPER / "results/few-images.csv") as file:
        top1 = {(row["method"], row["seed"]): float(row["val_top1"]) for row in csv.DictReader(file)}
    gains = [top1["KD", seed] - top1["NKD", seed] for method, seed in top1 if method == "KD"]
    mean = math.fsum(gains) / len(gains)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in gains) / (len(gains) - 1))
    p = 2 * scipy.stats.t.sf(abs(mean) / (deviation / math.sqrt(len(gains))), len(gains) - 1)
    half = scipy.stats.t.ppf(0.975, len(gains) - 1) * deviation / math.sqrt(len(gains))
    assert compare(monkeypatch, "few-images", "KD", "NKD") == 0
    assert capsys.readouterr().out == f"{mean:+.2f} ({mean - half:+.2f} to {mean + half:+.2f}), p = {p:.2g}\n"


def test_p_values_are_corrected_by_holm():
    """Compare with an example by hand: 0.01 to 0.04 times 4, 3, 2, 1; a smaller product becomes the previous one."""
    assert load("paired").holm([0.02, 0.01, 0.04, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert load("paired").holm([0.5, 0.9]) == [1.0, 1.0]
    assert load("paired").holm([]) == []


@pytest.mark.parametrize(
    "names", [["nope", "KD", "NKD"], ["lite", "KD", "NKD"], ["lite-sweep", *2 * ["cross-entropy"]]]
)
def test_rows_that_cannot_be_compared_are_an_error(monkeypatch, capsys, names):
    with pytest.raises(SystemExit) as end:
        compare(monkeypatch, *names)
    assert end.value.code == 2
    assert "report.py: error: " in capsys.readouterr().err


def test_only_training_images_are_repeated(tmp_path):
    tiny_imagenet = load("tiny_imagenet")
    for part, count in (("train", 5), ("val", 2)):
        folder = tmp_path / "source" / part / "n0"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{part}{i}.JPEG")
    setting = tiny_imagenet.SETTINGS["lite-fits"]._replace(classes=1, train=3, held_out=1)
    tiny_imagenet.make_images(tmp_path / "source", tmp_path / "images", setting)
    train = sorted(path.name for path in (tmp_path / "images/train/n0").iterdir())
    assert train == [f"train{i}_{copy}.JPEG" for i in range(3) for copy in range(4)]
    assert sorted(path.name for path in (tmp_path / "images/val/n0").iterdir()) == [
        "train4.JPEG",
        "val0.JPEG",
        "val1.JPEG",
    ]


def test_train_accepts_the_flags_of_every_table():
    tiny_imagenet = load("tiny_imagenet")
    for table in tiny_imagenet.TABLES.values():
        setting = tiny_imagenet.SETTINGS[table.setting]
        rows_of_flags = [[*setting.student, *(flag.format(teacher="T") for flag in row)] for row in table.runs.values()]
        for flags in [*rows_of_flags, *[setting.teacher] * bool(setting.teacher)]:
            settle(["--data", "images", *setting.common, *(flag for flag in flags if not flag.startswith("variant="))])


def test_the_labels_command_accepts_the_flags_of_a_table(tmp_path, monkeypatch):
    tiny_imagenet = load("tiny_imagenet")
    commands = []
    monkeypatch.setattr(tiny_imagenet, "fetch", lambda name: tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(tiny_imagenet.subprocess, "run", lambda command, **_: commands.append(command))
    tiny_imagenet.write_labels(tmp_path / "labels", tmp_path / "images", tiny_imagenet.SETTINGS["lite-50"])
    args, _ = settle_flags(teacher_labels.FLAGS, read_flags(teacher_labels.FLAGS, commands[0][3:]))
    assert (args.views, args.top_k, args.img_size, args.crop) == (2, 49, [64, 64], "none")


class Experiment:
    """Call run_draw of an experiment without images; store the flags of each process instead of starting it."""

    def __init__(self, name, folder, monkeypatch):
        monkeypatch.syspath_prepend(PAPER)
        monkeypatch.chdir(folder)
        module, self.trained, self.stored = load(name), {}, []
        replacements = {
            "draw_folder": lambda source, root, *_: root,
            "fetch": lambda model: Path(model),
            "join_folds": lambda *_: None,
            "measure": lambda *_: {"test": 0.0} if name == "practitioner" else 0.0,
            "pseudo_label": lambda root, _: root / "pseudo",
            "store_labels": lambda flags, _: self.stored.append(of_labels(flags)),
            "test": lambda *_: 0.0,
            "train_once": self.train,
        }
        for function in replacements.keys() & vars(module).keys():
            monkeypatch.setattr(module, function, replacements[function])
        self.rows = module.run_draw(folder, 0)

    def train(self, flags, output, script="train.py"):
        variant, flags = ([flags[0]], flags[1:]) if Path(script).name == "ablation.py" else ([], flags)
        typed = train.parse_flags(list(map(str, flags)))
        fitted = pick_recipe(500, 20, (64, 64), "--pretrained" in flags, [64])[0]
        recipe = None if "recipe" in typed else fitted
        self.trained[output] = [variant, vars(settle_flags(train.FLAGS, typed, None, recipe)[0])]


@pytest.mark.parametrize(("name", "rows"), [("practitioner", 23), ("uskd", 17), ("gamma", 30), ("unlabelled", 10)])
def test_no_two_runs_of_an_experiment_with_draws_have_the_same_flags(name, rows, tmp_path, monkeypatch):
    experiment = Experiment(name, tmp_path, monkeypatch)
    assert len(experiment.rows) == rows
    runs = list(experiment.trained.values())
    assert len(runs) >= rows - 1
    assert [runs[i] for i in range(len(runs)) if runs[i] in runs[:i]] == []
    for flags in experiment.stored:
        settle_flags(teacher_labels.FLAGS, read_flags(teacher_labels.FLAGS, [*flags, "--output", "L"]))


def test_the_answer_about_a_photograph_comes_from_the_teacher_that_held_it_out(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(PAPER)
    for c in "ab":
        for part, count in (("train", 7), ("val", 1)):
            (tmp_path / "data" / part / c).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (30 * i, 0, 0)).save(tmp_path / "data" / part / c / f"{i}.png")
    folders = [tmp_path / f"labels-{fold}" for fold in range(3)]
    header = {"images": 14, "files": "", "classes": 2, "view": {}, "draws": "", "seed": 0, "views": 2, "k": 1}
    for fold, folder in enumerate(folders):
        folder.mkdir()
        teacher = {"name": "t", "digest": str(fold)}
        (folder / "labels.json").write_text(json.dumps(header | {"teacher": teacher}))
        for view in range(2):
            answers = np.zeros(14, teacher_labels.row_type(1, 2))
            answers["target"], answers["logprobs"] = -1.0 - 10 * fold - view, -np.inf
            teacher_labels.write_part(folder / f"{view:03}-00000000.npy", answers)
    load("draws").join_folds(folders, tmp_path / "data", tmp_path / "joined")
    whole = open_data(str(tmp_path / "data"))
    files = [file for file, _ in whole.train.samples]
    for fold in range(3):
        held_out = {whole.train.samples[i][0] for i in hold_out(whole, fold, 3).val.indices}
        for view in range(2):
            joined = np.load(tmp_path / f"joined/{view:03}-00000000.npy")["target"]
            of_fold = {file for file, answer in zip(files, joined) if answer == -1.0 - 10 * fold - view}
            assert of_fold == held_out
    joined = teacher_labels.read_header(tmp_path / "joined")
    assert teacher_labels.find_faults(tmp_path / "joined", joined) == []
    assert joined["teacher"]["digest"] not in {"0", "1", "2"}


def test_every_measured_run_has_its_command_versions_hardware_and_seed():
    files = [file for file in PAPER.glob("results/*.csv") if "command" in file.read_text().partition("\n")[0]]
    assert len(files) >= 16  # the other files store draws (draws.run_draws), without a command
    for file in files:
        with open(file) as open_file:
            for row in csv.DictReader(open_file):
                assert row["command"].split()[0].endswith(("train.py", "ablation.py"))
                assert row["method"] == "teacher" or f"--seed {row['seed']}" in row["command"]
                assert "torch " in row["versions"]
                assert row["hardware"]


def test_describe_prints_four_measures_of_a_network():
    logits, labels = [[2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, 1.0]], [0, 0]
    measured = {"label": [], "squared": [], "entropy": []}
    for row, label in zip(logits, labels):
        weights = [math.exp(x) for x in row]
        others = [w / (sum(weights) - weights[label]) for i, w in enumerate(weights) if i != label]
        measured["label"].append(weights[label] / sum(weights))
        measured["squared"].append(measured["label"][-1] ** 2)
        measured["entropy"].append(-sum(p * math.log(p) for p in others))
    label, entropy = (sum(measured[key]) / 2 for key in ("label", "entropy"))
    spread = abs(measured["squared"][0] - measured["squared"][1]) / math.sqrt(2)
    line = load("answers").describe(torch.tensor(logits), torch.tensor(labels))
    assert line == (
        f"top-1 50.00 %  label {label:.3f}  spread {spread:.3f}  entropy {entropy:.2f} of {math.log(3):.2f}"
    )


def test_own_ranks_is_the_overlap_of_the_top_5_of_uskd_and_of_the_student_alone():
    generator = torch.Generator().manual_seed(0)
    student, weak = (2 * torch.randn(8, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    shared = 0
    for s, w, t in zip(student.tolist(), weak.tolist(), range(8)):
        s, w = oracle.softmax(s), oracle.softmax(w)
        others = [i for i in range(12) if i != t]
        r = {i: w[i] / (1 - w[t]) + s[i] / (1 - s[t]) for i in others}
        shared += len(set(sorted(others, key=lambda i: -s[i])[:5]) & set(sorted(others, key=lambda i: -r[i])[:5]))
    assert shared < 40
    assert load("answers").own_ranks(student, weak, torch.arange(8)) == pytest.approx(100 * shared / 40)


@pytest.mark.trial
@pytest.mark.whole_runs
def test_answers_py_measures_student_weak_head_teacher_and_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--device", "cpu", "--model", f"{ROOT}/tests/own_models.py:tiny", "--epochs", "1", "--img-size", "16"]
    tiny += ["--crop", "none"]  # so that the stored view equals the measured view
    teacher = ["--teacher", "teacher/student", "--model-file", f"{ROOT}/tests/own_models.py:tiny"]
    run(*tiny, "--output", "teacher")
    labels = ["--device", "cpu", "--img-size", "16", "--crop", "none", "--views", "1", *teacher]
    write_labels(*labels, "--output", "L", "--top-k", "9")
    run(*tiny, "--kd", "nkd", "--teacher-labels", "L", "--self-kd", "uskd", "--output", "stored")
    run(*tiny, "--kd", "nkd", *teacher, "--output", "online")
    command = [sys.executable, PAPER / "answers.py", "stored", "online", *tiny[2:4], *teacher[2:]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, folder = {}, ""
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            part, network, *numbers = re.split(" {2,}", line.strip())
            measured[folder, part, network] = [float(x) for x in re.findall(r"\d+\.\d+", " ".join(numbers))]
        else:
            folder = line.partition(",")[0]
    both = {(part, network) for part in ("training", "validation") for network in ("student", "weak head", "own ranks")}
    assert {key[1:] for key in measured if key[0] == "stored"} == both | {("training", "labels")}
    for folder in ("stored", "online"):
        top1 = float(metrics_of(folder)[-1]["val_top1"])
        assert measured[folder, "validation", "student"][0] == pytest.approx(top1, abs=0.006)
    # the stored answers equal the teacher's own, except for the rounding of float16
    (top1, *rest), (stored_top1, *stored) = (
        measured["online", "training", "teacher"],
        measured["stored", "training", "labels"],
    )
    assert stored_top1 == pytest.approx(top1, abs=0.5)
    assert stored == pytest.approx(rest, abs=0.011)

    # the entropy of nine classes is unknown if the labels have three
    write_labels(*labels, "--output", "top3", "--top-k", "3")
    run(*tiny, "--kd", "nkd", "--temperature", "1", "--teacher-labels", "top3", "--output", "some")
    with pytest.raises(UserError, match="top3 stores 3 of the 9 non-target classes: write labels with --top-k 9"):
        list(load("answers").report(Path("some"), tiny[2:4]))


@pytest.mark.parametrize("name", ["", "not there"])
def test_a_folder_without_a_run_is_an_error(tmp_path, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["answers.py", str(tmp_path / name)])
    assert run_command("answers.py", load("answers").main) == 2
    assert capsys.readouterr().err.startswith("answers.py: error: ")


@pytest.mark.trial
def test_a_small_table_is_trained_once(tmp_path):
    for c, photo in enumerate(load_sample_images().images):
        for part, count in (("train", 100), ("val", 10)):
            folder = tmp_path / "source" / part / f"n{c}" / "images"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(photo[3 * i : 3 * i + 64, 5 * i : 5 * i + 64]).save(folder / f"{i}.JPEG")
    command = [
        sys.executable, str(PAPER / "tiny_imagenet.py"), str(tmp_path / "source"), "few-images", "--seeds", "1",
        "--flags", "--epochs 1 --warmup-epochs 0 --batch-size 32 --workers 0 --device cpu",
        "--results", str(tmp_path / "results"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "results/few-images.csv") as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == ["teacher", "cross-entropy", "label smoothing", "KD", "NKD", "USKD"]
    for row in table:
        assert 0 <= float(row["val_top1"]) <= 100
        assert row["command"].startswith("train.py ")
        assert f"torch {torch.__version__.partition('+')[0]}" in row["versions"]
    written = (tmp_path / "runs/tiny_imagenet/few-images/NKD-0/last.pt").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "runs/tiny_imagenet/few-images/NKD-0/last.pt").stat().st_mtime_ns == written  # not run again
