"""Run functions in forks of a process that has imported the libraries, because the imports take longer than the tests.

If a test starts several processes, each gets the environment of torchrun. The tests that use the fixture `forks` run in
one test process, so that the libraries are imported once.
"""

import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["accelerate", "lightning", "sklearn.datasets", "timm", "torchvision", "transformers"]


class Forks:
    """Start forks; their output goes to log0.txt, log1.txt, ... in this folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LIBRARIES)
        self.children = []

    def start(self, function, *args, processes=1, environment=None):
        """Start this number of processes that call function(*args)."""
        environments = [environment or {}]
        if processes > 1:
            shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                      "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "test", "GLOO_SOCKET_IFNAME": "lo",
                      "GROUP_RANK": "0"}  # fmt: skip
            environments = [shared | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
        self.children = [
            self.context.Process(target=call, args=(each, self.folder / f"log{i}.txt", pickle.dumps((function, args))))
            for i, each in enumerate(environments)
        ]
        for child in self.children:
            child.start()

    def wait(self, seconds=120):
        """Wait for the processes, kill those that still run, and return the exit statuses and the outputs."""
        for child in self.children:
            child.join(seconds)
        self.kill()
        logs = [self.folder / f"log{i}.txt" for i in range(len(self.children))]
        return [child.exitcode for child in self.children], [log.read_text() for log in logs]

    def kill(self):
        for child in self.children:
            child.kill()
            child.join()

    def run(self, function, *args, processes=1):
        """Call function(*args) in this number of processes; return the output of the first one."""
        self.start(function, *args, processes=processes)
        statuses, outputs = self.wait()
        assert statuses == [0] * processes, "\n".join(outputs)
        return outputs[0]


def call(environment, log, pickled):
    os.environ.update(environment)
    function, args = pickle.loads(pickled)  # only now, because kdlite.training.distributed reads the environment
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # because nohup ignores it
    function(*args)


def run_script(path, *flags):
    """Run a script, as from the command line."""
    sys.argv = [str(path), *map(str, flags)]
    runpy.run_path(str(path), run_name="__main__")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
