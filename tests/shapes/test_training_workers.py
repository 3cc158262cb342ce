"""Workers end with the command that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from shapes import workers

TOOLS = Path(workers.__file__).parents[1]

# Run as a script that a shell script has put into the background: such jobs, and what they start, ignore SIGINT.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from shapes import workers

def work(rank, folder):
    (folder / f"{rank}.writing").write_text(str(os.getpid()))
    (folder / f"{rank}.writing").rename(folder / f"{rank}.pid")
    time.sleep(600)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    workers.run(work, 2, Path(sys.argv[1]), Path(sys.argv[1]))
"""


def _until(true: Callable[[], bool], seconds: float = 120) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.1)
    return False


def _gone(pid: int) -> bool:
    """Ended, or ended and not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(TOOLS)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=environment)
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    pids: list[int] = []
    try:
        assert _until(lambda: all(file.exists() for file in files))
        pids = [int(file.read_text()) for file in files]
        assert not any(map(_gone, pids))
        parent.kill()
        assert _until(lambda: all(map(_gone, pids)), 30)
    finally:
        parent.kill()
        parent.wait()
        for pid in pids:
            if not _gone(pid):
                os.kill(pid, signal.SIGKILL)
