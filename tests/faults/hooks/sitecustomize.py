"""Faults inside a process of ours. Python itself loads this where its folder is on PYTHONPATH.

Which fault strikes is said by files in the folder that FAULTS names, while the process runs:

    kill_after_rename   a rename into blobs/ is the last thing that the process does
    wait_in_staging     making a folder in staging waits until the file is gone
    kill_after_staging  removing a folder of staging is the last thing that the process does
    clock               seconds to add to the time of day

Knows nothing of the code that it strikes but the names of the folders.
"""

import datetime
import os
import shutil
import signal
import time
from pathlib import Path

_FAULTS = Path(os.environ["FAULTS"])
_rename, _mkdir, _rmtree, _time = os.rename, os.mkdir, shutil.rmtree, time.time


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def rename(source, target, **options):
    _rename(source, target, **options)
    if Path(target).parent.name == "blobs" and (_FAULTS / "kill_after_rename").exists():
        _die()


def mkdir(path, *arguments, **options):
    if Path(path).parent.name == "staging":
        waiting = _FAULTS / "wait_in_staging"
        while waiting.exists():
            (_FAULTS / "waits").touch()
            time.sleep(0.01)
    _mkdir(path, *arguments, **options)


def rmtree(path, *arguments, **options):
    _rmtree(path, *arguments, **options)
    if Path(path).parent.name == "staging" and (_FAULTS / "kill_after_staging").exists():
        _die()


def _offset():
    try:
        return float((_FAULTS / "clock").read_text())
    except (OSError, ValueError):
        return 0.0


class Shifted(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(_time() + _offset(), tz)


os.rename, os.mkdir, shutil.rmtree = rename, mkdir, rmtree
time.time = lambda: _time() + _offset()
datetime.datetime = Shifted
