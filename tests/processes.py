"""Processes of their own for tests, without the five seconds of imports that a fresh interpreter takes.

They are forked from a server that has imported the libraries and done nothing else. `run_python` takes the words and
the environment of the command `python`.
"""

import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["accelerate", "datasets", "diffusers.guiders", "editar_hf.pipelines", "peft", "torch.distributed.fsdp"]
)


class PythonProcess:
    """A process that `python *words` would be, and what it has written so far."""

    def __init__(self, *words, environment: dict[str, str] | None = None, cwd: Path | None = None):
        self.words = [str(word) for word in words]
        self.folder = tempfile.TemporaryDirectory()
        arguments = (self.words, dict(environment or os.environ), str(cwd or Path.cwd()), self.folder.name)
        self.process = CONTEXT.Process(target=_become_python, args=arguments)
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self):
        self.process.kill()

    def read(self, stream: str) -> str:
        return (Path(self.folder.name) / stream).read_text()

    def wait(self) -> subprocess.CompletedProcess:
        self.process.join()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, self.read("stdout"), self.read("stderr"))


def run_python(*words, environment: dict[str, str] | None = None, cwd: Path | None = None):
    """Run `python *words` and return what `subprocess.run` would."""
    return PythonProcess(*words, environment=environment, cwd=cwd).wait()


def read_launch_environment(config: Path, environment: dict[str, str], folder: Path) -> dict[str, str]:
    """Read the environment that `accelerate launch` gives the first of two processes."""
    script, found = folder / "write_environment.py", folder / "environment.json"
    script.write_text(
        "import json, os, sys\n"
        "if os.environ['RANK'] == '0':\n"
        "    open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))"
    )
    words = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", 2]
    words += ["--main_process_port", find_free_port(), script, found]
    finished = run_python(*words, environment=environment)
    assert finished.returncode == 0, finished.stderr
    return json.loads(found.read_text())


def start_ranks(num_processes: int, *words, environment: dict[str, str] | None = None) -> list[PythonProcess]:
    """Start the processes that `torchrun` would start on this machine."""
    launch = {"MASTER_ADDR": "localhost", "MASTER_PORT": find_free_port(), "WORLD_SIZE": num_processes}
    launch |= {"LOCAL_WORLD_SIZE": num_processes, "TORCHELASTIC_USE_AGENT_STORE": False}
    return [
        PythonProcess(
            *words,
            environment={
                **(environment or os.environ),
                **{name: str(value) for name, value in {**launch, "RANK": rank, "LOCAL_RANK": rank}.items()},
            },
        )
        for rank in range(num_processes)
    ]


def run_ranks(num_processes: int, *words, environment: dict[str, str] | None = None) -> str:
    """Run them to their end, and return what the first one printed."""
    finished = [process.wait() for process in start_ranks(num_processes, *words, environment=environment)]
    assert not any(one.returncode for one in finished), finished[0].stderr + finished[-1].stderr
    return finished[0].stdout


def find_free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def _become_python(words: list[str], environment: dict[str, str], cwd: str, folder: str):
    """Take on the environment and run what the words say, as the interpreter does."""
    for number, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    # Ctrl-C works as in a terminal, also where the tests run in the background and ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Its own processes start as those of any interpreter.
    multiprocessing.set_start_method(None, force=True)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    _read_environment_again()
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = words, [str(Path(words[0]).parent)]
        runpy.run_path(words[0], run_name="__main__")


def _read_environment_again():
    """Let the Hub's libraries see an environment that they read when they were imported."""
    import datasets
    import huggingface_hub

    importlib.reload(huggingface_hub.constants)
    importlib.reload(datasets.config)
    huggingface_hub.hf_api.api.endpoint = huggingface_hub.constants.ENDPOINT
