"""The server of :mod:`.contract_process`: it imports PyTorch once, and forks for each run of `python -m nckernels`."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import sys
import traceback
from typing import Any

IMPORTED = (
    *("torch._dynamo", "torch.distributed", "torch.nn.parallel", "sklearn.datasets", "sklearn.model_selection"),
    *("nckernels.train.engine", "nckernels.train.cli", "nckernels.train.evaluate_cli", "nckernels.metrics"),
)


def serve() -> None:
    """Fork a child for each request on the standard input; the children end in here, too."""
    for name in IMPORTED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a child that collects garbage need not copy all of this
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                _become(**request)
        print(json.dumps(answer), flush=True)
    os._exit(0)


def _become(arguments: list[str], folder: str, output: str, file_size: int) -> None:
    os.setsid()
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    faulthandler.enable()
    if file_size:
        _limit(file_size)
    sys.path[0] = ""  # as `python -m` has it
    sys.argv = ["nckernels", *arguments]
    status: Any = 0
    try:
        runpy.run_module("nckernels", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)  # to tear all modules down takes longer than many a run


def _limit(file_size: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))


if __name__ == "__main__":
    serve()
