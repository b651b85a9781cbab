"""python -m kdlite.check: is somebody's own NKD the paper's?"""

import subprocess
import sys
from pathlib import Path

import pytest
from torch.nn import functional as F

from kdlite import check, nkd_loss

HAND = '''
import torch
import torch.nn.functional as F

def nkd_loss(student_logits, teacher_logits, target, gamma=1.5, temperature=1.0):
    """A copy by hand: the classes but the target picked out by a mask."""
    teacher_logits = teacher_logits.detach()
    s, t = F.log_softmax(student_logits, 1), F.softmax(teacher_logits, 1)
    rows = torch.arange(len(target))
    target_term = -t[rows, target] * s[rows, target]
    others = torch.ones_like(s, dtype=torch.bool)
    others[rows, target] = False
    n = len(s), s.shape[1] - 1
    log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)
    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)
    return (target_term + gamma * temperature**2 * F.kl_div(log_n, n_t, reduction="none").sum(1)).mean()
'''
CHANGES = {  # what is written in its place, and the mistake that is named
    "view(n) / temperature, 1)\n    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)": (
        "view(n) / temperature, 1)\n    log_n = F.log_softmax(student_logits / temperature, 1)\n"
        "    n_t = F.softmax(teacher_logits / temperature, 1)",
        "the target is kept in the non-target part",
    ),
    "log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)\n"
    "    n_t = F.softmax(teacher_logits[others].view(n) / temperature, 1)": (
        "log_n = F.log_softmax(student_logits / temperature, 1)[others].view(n)\n"
        "    n_t = F.softmax(teacher_logits / temperature, 1)[others].view(n)",
        "the non-target part is not normalised",
    ),
    "log_n = F.log_softmax(student_logits[others].view(n) / temperature, 1)": (
        "log_n = F.softmax(student_logits[others].view(n) / temperature, 1).log()",
        "take log_softmax, not the log of a softmax",
    ),
    "gamma * temperature**2": ("gamma", "the non-target part lacks the temperature squared"),
    "temperature**2 *": ("temperature *", "has the temperature once, not squared"),
    "teacher_logits.detach()": ("teacher_logits", "gradient flows into the teacher"),
    ".mean()": (".sum()", "the sum over the batch is returned"),
    "-t[rows, target] * s[rows, target]": (
        "-t[rows, target] * s[rows, target].detach()",
        "the target term has no gradient",
    ),
    "s, t = F.log_softmax(student_logits, 1), F.softmax(teacher_logits, 1)": (
        "s, t = F.log_softmax(student_logits / temperature, 1), F.softmax(teacher_logits / temperature, 1)",
        "the target term is at the temperature",
    ),
    ".sum(1)).mean()\n": (".sum(1)).mean() / s.shape[1]\n", "the mean is over rows and classes"),
    "return (target_term": (
        "return F.cross_entropy(student_logits, target) + (target_term",
        "the cross-entropy is in it",
    ),
    "target_term + ": ("0.5 * target_term + ", "no mistake that is known here"),
}


def function(text):
    names = {}
    exec(text, names)
    return names["nkd_loss"]


@pytest.mark.parametrize("loss", [nkd_loss, function(HAND)])
def test_what_is_right_is_right_in_twenty_cases(loss):
    lines, mistake = check.check(loss)
    assert mistake is None
    assert len(lines) == 20
    assert all(line.endswith(": right") for line in lines)


@pytest.mark.parametrize("written", CHANGES)
def test_a_mistake_is_named(written):
    instead, named = CHANGES[written]
    assert HAND.count(written) == 1
    lines, mistake = check.check(function(HAND.replace(written, instead)))
    assert named in mistake
    assert len(lines) == 20


def test_every_mistake_that_has_a_name_is_tried():
    named = {words for words in check.MISTAKES if any(part in words for _, part in CHANGES.values())}
    assert check.MISTAKES.keys() - named == {"this is classic temperature KD, not NKD"}  # below


def test_classic_distillation_is_recognised():
    def kd(student, teacher, target, temperature=4.0):
        log_s, t = (student / temperature).log_softmax(1), (teacher.detach() / temperature).softmax(1)
        return temperature**2 * F.kl_div(log_s, t, reduction="batchmean")

    assert check.check(kd)[1] == "this is classic temperature KD, not NKD"


def test_weights_that_are_fixed_inside_are_told():
    def fixed(student, teacher, target):
        return nkd_loss(student, teacher, target, gamma=3.5, temperature=3.0)

    assert check.check(fixed, gamma=3.5, temperature=3.0)[1] is None
    assert check.check(fixed)[1] is not None


@pytest.mark.slow
def test_the_command_prints_a_line_a_case_and_ends_with_0_where_all_are_right(tmp_path):
    (tmp_path / "mine.py").write_text(HAND)
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": ""}
    command = [sys.executable, "-m", "kdlite.check", "mine.py:nkd_loss"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 21
    assert done.stdout.splitlines()[-1] == "right: the gradient is the paper's in all cases"


def test_a_mistake_is_status_1_and_what_cannot_be_called_2(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.py").write_text(HAND.replace("gamma * temperature**2", "gamma"))
    assert check.main(["wrong.py:nkd_loss"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "wrong: the non-target part lacks the temperature squared"
    assert check.main(["wrong.py:nothing"]) == 2
    said = capsys.readouterr().err
    assert said == "kdlite.check: error: wrong.py:nothing: AttributeError: wrong.py has no function 'nothing'\n"


def test_what_returns_no_mean_is_an_error(tmp_path, capsys):
    (tmp_path / "rows.py").write_text("import torch\ndef loss(s, t, y): return s.sum(1)\n")
    assert check.main([f"{tmp_path}/rows.py:loss"]) == 2
    assert "must return the mean over the batch, got a tensor of shape (8,)" in capsys.readouterr().err


def test_the_gradient_is_compared_at_every_size_of_it():
    """A loss that is right but for one case is wrong."""

    def almost(student, teacher, target, gamma, temperature):
        loss = nkd_loss(student, teacher, target, gamma=gamma, temperature=temperature)
        return loss * (1.01 if student.shape[1] == 100 and temperature == 3 else 1.0)

    lines, mistake = check.check(almost)
    assert [line for line in lines if "wrong: the gradient is off by 1.0%" in line]
    assert mistake is not None
