"""Run a command while no other such command works in the same place: python lock.py FILE COMMAND...

The lock is held on an open file, which the command and all that it starts inherit: it goes with the last of them, however
they end, so that no lock is ever left behind. The file itself stays and means nothing.
"""

import fcntl
import os
import sys
from pathlib import Path


def main(file: str, *command: str) -> None:
    """Wait for the lock, then become the command: path of the lock, words of the command."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another make is at work here: waiting", file=sys.stderr, flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
