"""Kernels that start warm: forked from a process that has imported what chapters need, and has computed nothing."""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Without pyplot: a kernel chooses its drawing before that is imported
IMPORTS = [
    "ipykernel.kernelapp",
    "scipy.stats",
    "sklearn.linear_model",
    "vitregs.models.registry",
    "vitregs.models.capture",
]


def _serve(ready: Any, command: list[str], environment: dict[str, str], folder: str) -> None:
    from ipykernel.kernelapp import IPKernelApp

    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.setsid()
    ready.send(True)
    IPKernelApp.launch_instance(command[command.index("-f") :])


class Warm:
    """A forked kernel, with what jupyter_client asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def __init__(self, command: list[str], environment: dict[str, str], folder: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(IMPORTS)
        here, there = context.Pipe(duplex=False)
        self.child = context.Process(target=_serve, args=(there, command, environment, folder), daemon=True)
        self.child.start()
        here.recv()  # it is stopped by its process group, which must be its own by then
        self.pid, self.returncode = self.child.pid, None

    def poll(self) -> int | None:
        self.returncode = self.child.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int | None:
        self.child.join(timeout)
        return self.poll()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.child.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@contextmanager
def warm() -> Iterator[None]:
    """Let the kernels that start meanwhile start warm."""
    from jupyter_client.provisioning import local_provisioner

    def launch(command: list[str], *, env: dict[str, str] | None = None, cwd: str | None = None, **_: Any) -> Warm:
        return Warm(command, dict(env or os.environ), str(cwd or os.getcwd()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_provisioner, "launch_kernel", launch)
        yield
