"""Run the commands of deploy/ in this process."""

from pathlib import Path

from students import model_files

from deploy.cli import command as run_command


def deploy(command, *flags, check=0):
    """Run a command of deploy in this process and check its exit status; check=None allows 0 and 1.

    If the student comes from a model file, this function adds --model-file.
    """
    parser = command.get_parser()
    if "--model-file" in parser.format_help():
        flags += tuple(x for flag in flags[:1] for file in model_files(Path(flag)) for x in ("--model-file", file))
    status = run_command(parser, command.run, [str(flag) for flag in flags])
    assert status == check if check is not None else status in (0, 1)


def refused(capfd, command, *flags):
    """Run a command, check that it ends with status 2 and one line on stderr, and return the line."""
    capfd.readouterr()
    deploy(command, *flags, check=2)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def files_of(folder):
    return sorted(path.name for path in folder.iterdir())
