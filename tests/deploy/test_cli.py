"""Test deploy.cli: errors of one line with an exit status, files written whole, and escaped control characters."""

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import cli
from deploy.cli import UserError, printable, replacing, run_command, write_whole

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("error", "status", "line"), [
    (UserError("two\nlines"), 2, "p: error: two lines"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (OSError(28, "No space left on device"), 2, "p: error: cannot read or write: [Errno 28] No space left on device"),
    (OSError(36, "File name too long"), 2, "p: error: cannot read or write: [Errno 36] File name too long"),
    (MemoryError(), 2, "p: error: out of memory: use smaller batches; "),
    (UserError("\x1b[31mred\x07"), 2, "p: error: \\x1b[31mred\\x07"),
])  # fmt: skip
def test_an_exception_gives_one_line_and_a_status(error, status, line, capsys):
    def fail():
        raise error

    assert run_command("p", fail) == status
    assert capsys.readouterr().err.strip("\n") == line


def test_a_command_whose_reader_has_ended_exits_with_141_and_prints_nothing():
    code = "from deploy.cli import run_command, show; exit(run_command('p', lambda: show(*['x' * 9999] * 99)))"
    command = f'{sys.executable} -c "{code}" | head -c 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (141, "x", "")


def test_a_broken_pipe_between_processes_keeps_its_traceback():
    near, far = multiprocessing.Pipe()
    far.close()
    with pytest.raises(BrokenPipeError):
        run_command("p", lambda: near.send("x" * 9999))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_command_that_gets_a_signal_removes_its_unfinished_files(tmp_path, name):
    code = (
        "import os, signal, sys; from pathlib import Path; from deploy.cli import replacing, run_command\n"
        f"signal.signal(signal.{name}, signal.SIG_DFL)\n"  # under nohup a process inherits an ignored SIGHUP
        "def work():\n"
        "    with replacing(Path(sys.argv[1])) as partial:\n"
        "        partial.write_text('half')\n"
        f"        os.kill(os.getpid(), signal.{name})\n"
        "sys.exit(run_command('p', work))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "file"], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (128 + getattr(signal, name), "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_closed_stdout_or_stderr_is_the_null_device(closed):
    code = (
        "import os; from deploy.cli import ProgressBar, run_command, show; "
        "exit(run_command('p', lambda: list(ProgressBar([1], 'x')) and show('text') or 3))"
    )
    assert subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" {closed}'], cwd=ROOT).returncode == 3


def test_a_program_keeps_its_own_handler_of_sigterm():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        assert run_command("p", lambda: signal.getsignal(signal.SIGTERM) != signal.SIG_IGN) == 0
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        assert run_command("p", lambda: signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert run_command("p", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN) and None) == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "/dev/stdout"])
def test_a_device_or_a_pipe_is_not_replaced(kind, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match="it is not a regular file; name another file"):
        write_whole(tmp_path / kind, "text")  # an absolute path replaces tmp_path
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_name_without_a_slash_is_looked_for_in_the_student_folder_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("student/a.onnx", "a.onnx", "b.onnx"):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    student = Path("student")
    assert cli.file_of(student, "a.onnx") == Path("student/a.onnx")
    assert cli.file_of(student, "./a.onnx") == Path("a.onnx")
    assert cli.file_of(student, "b.onnx") == Path("b.onnx")


def test_files_in_follows_links_and_skips_hidden_files(tmp_path):
    for name in ("a/1.png", "more/2.png", ".git/3.png", "a/__MACOSX/4.png", "a/.5.png", "elsewhere/6.png"):
        file = tmp_path / "root" / name if "elsewhere" not in name else tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "root/linked").symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(file, tmp_path / "root") for file in cli.files_in(tmp_path / "root")]
    assert sorted(found) == ["a/1.png", "linked/6.png", "more/2.png"]


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_command("p", lambda: 1 // 0)


@pytest.mark.parametrize(("result", "status"), [(None, 0), (1, 1)])
def test_the_result_of_the_function_is_the_exit_status(result, status):
    assert run_command("p", lambda: result) == status


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "a\rb", "a\nb", "\x9b31m", "\u202egnp.exe", "\x7f", "\u2028"])
def test_control_characters_are_escaped(text):
    escaped = printable(text)
    assert escaped.isprintable()
    assert escaped.encode().decode("unicode_escape") == text


def test_letters_of_any_script_are_not_escaped():
    text = "chêne 橘 Ω 'a\\b' \U0001f98a"
    assert printable(text) == text


def test_results_and_log_lines_are_escaped(capsys):
    cli.show("one\x1b[2J", "two\nthree\r")
    cli.log("four\x08")
    assert capsys.readouterr().out == "one\\x1b[2J\ntwo\nthree\\r\nfour\\x08\n"


@pytest.mark.parametrize("name", ["__main__", "deploy.export"])
def test_a_missing_package_ends_a_command_but_raises_an_error_in_an_imported_module(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/deploy/export.py"])
    with pytest.raises(SystemExit if name == "__main__" else UserError) as raised, cli.needs("pip install x", name):
        import a_missing_package  # noqa: F401
    if name == "__main__":
        assert raised.value.code == 2
        line = capsys.readouterr().err
        assert line == "python -m deploy.export: error: No module named 'a_missing_package': pip install x\n"


# ---- files ---------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_whole_and_the_old_one_is_kept(tmp_path):
    write_whole(tmp_path / "new/a.txt", "1")
    write_whole(tmp_path / "new/a.txt", b"2", keep=tmp_path / "new/b.txt")
    assert (tmp_path / "new/a.txt").read_text() == "2"
    assert (tmp_path / "new/b.txt").read_text() == "1"
    assert names(tmp_path / "new") == ["a.txt", "b.txt"]


def test_a_folder_is_written_in_one_step(tmp_path):
    with replacing(tmp_path / "model") as partial:
        partial.mkdir()
        (partial / "weights").write_text("1")
        assert not (tmp_path / "model").exists()
    assert names(tmp_path / "model") == ["weights"]
    assert names(tmp_path) == ["model"]


def write_and_fail(path, error):
    with replacing(path) as partial:
        partial.write_text("2")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_after_an_error_only_the_old_file_exists(tmp_path, error):
    write_whole(tmp_path / "a.txt", "1")
    with pytest.raises(error):
        write_and_fail(tmp_path / "a.txt", error("no"))
    assert (tmp_path / "a.txt").read_text() == "1"
    assert names(tmp_path) == ["a.txt"]


def test_a_disk_error_gives_one_line(tmp_path):
    write_whole(tmp_path / "a.txt", "1")
    with pytest.raises(UserError, match=r"could not save .*a\.txt: No space left on device; the old file is kept"):
        write_and_fail(tmp_path / "a.txt", OSError(28, "No space left on device"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not save"):
        write_whole(tmp_path / "file/below.txt", "1")
    assert names(tmp_path) == ["a.txt", "file"]


def test_nothing_is_written_through_a_link(tmp_path):
    """Put links in place of the files, and of temporary files with predictable names."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("a.txt", "a.txt.partial", ".a.txt.partial", "b.txt"):
        (folder / name).symlink_to(victim)
    write_whole(folder / "a.txt", "1", keep=folder / "b.txt")
    write_whole(folder / "a.txt", "2")
    assert victim.read_text() == "precious"
    assert (folder / "a.txt").read_text() == "2"
    assert not (folder / "a.txt").is_symlink()


def test_two_partial_files_have_different_names(tmp_path):
    with replacing(tmp_path / "a") as first, replacing(tmp_path / "a") as second:
        assert first != second
        assert first.parent.stat().st_mode & 0o077 == 0
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1"  # the first context ends last


@pytest.mark.parametrize("how", ["pipe", "folder", "missing", "large"])
def test_only_a_regular_file_of_a_bounded_size_is_read(tmp_path, how):
    path = tmp_path / "config.json"
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "large":
        path.write_bytes(b"0" * 11)
    message = {"large": "has 11 bytes, more than 10", "missing": "cannot be read: No such file"}
    with pytest.raises(UserError, match=message.get(how, "is not a regular file")):
        cli.read_file(path, 10)
