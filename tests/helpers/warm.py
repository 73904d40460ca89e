"""Python processes that begin with the heavy imports done: forked from one that has made them.

Lightning, transformers and lm-eval take some ten seconds of a processor to import, again in every process that a test
starts. `python()` is to be taken in place of `[sys.executable]` where such a process matters and its start does not:

    subprocess.run([*python(), "-m", "maiht_lightning.cli", "fit", ...])

With the variables `WARM_CHILDREN` the processes that such a one starts by its `sys.executable` are such as well.

It is a relay, a process of its own like any other: it hands its arguments, variables, folder and open files to the
server, which forks the command, and it ends as the command ends. SIGTERM and SIGINT go on to the command, and `kill`
kills it. What is decided while libraries are imported is that of the server.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

SOURCES = [str(Path(__file__).parents[2] / name) for name in ("src", "tests")]
HEAVY = (
    "datasets",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
    "maiht_lightning.command_line.runs",
    "maiht_lightning.commands",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
)
# Elsewhere than on Linux, processes begin as all do.
WARM = hasattr(os, "pidfd_open")
# In the environment of a process, for those that it starts.
WARM_CHILDREN = {"MAIHT_TEST_WARM_CHILDREN": "yes"}
# What a relay is sent, and what the command then is.
FORWARDED = {signal.SIGTERM: signal.SIGTERM, signal.SIGINT: signal.SIGINT, signal.SIGQUIT: signal.SIGKILL}


@functools.cache
def python():
    """The words of a command that runs Python with the imports done; takes `-m`, `-c` or a file."""
    if not WARM:
        return [sys.executable]
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    path = os.path.join(folder.name, "socket")
    # tqdm reads it while it is imported.
    kept = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    server = subprocess.Popen(
        [sys.executable, __file__, "serve", path],
        env={**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(SOURCES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert server.stdout.readline() == b"ready\n", "the server of processes could not be started"

    def stop():
        server.communicate()
        folder.cleanup()

    # It ends where its input does, also when this process is killed.
    atexit.register(stop)
    words = [sys.executable, "-S", "-E", __file__, "relay", path]
    script = Path(folder.name, "python")
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    script.chmod(0o700)
    return words


def executable():
    """The same as one word, for what takes `sys.executable`."""
    return os.path.join(os.path.dirname(python()[-1]), "python") if WARM else sys.executable


def kill(process):
    """Kill the command of a relay with SIGKILL, and wait until both have ended: a killed relay ends before it does."""
    process.send_signal(signal.SIGQUIT if WARM else signal.SIGKILL)
    return process.wait()


def relay(path, arguments):
    """Have a command run by the server at `path`; ends this process as the command has ended."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    request = {"arguments": arguments, "cwd": os.getcwd(), "env": dict(os.environ)}
    message = json.dumps(request).encode()
    socket.send_fds(connection, [struct.pack("!q", len(message))], [0, 1, 2])
    for number, forwarded in FORWARDED.items():
        signal.signal(number, lambda *_, forwarded=forwarded: connection.send(bytes([forwarded])))
    connection.sendall(message)
    status = struct.unpack("!i", received(connection, 4))[0]
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def received(connection, size):
    """So many bytes."""
    found = b""
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError("the server of processes has ended")
        found += part
    return found


def serve(path):
    """Fork a process for each request until the standard input ends; returns the request in such a process."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            return keep(connection)
        connection.close()


def keep(connection):
    """Fork the command and watch it, and the relay, to the end; returns in the command's process."""
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    request = json.loads(received(connection, struct.unpack("!q", size)[0]))
    process = os.fork()
    if not process:
        connection.close()
        for number, file in enumerate(files):
            os.dup2(file, number)
            os.close(file)
        return request
    for number, file in enumerate(files):
        os.close(file)
        # The command's reader waits for the last who could write.
        os.close(number)
    ended = os.pidfd_open(process)
    while True:
        ready, _, _ = select.select([ended, connection], [], [])
        if ended in ready:
            status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("!i", status))
            os._exit(0)
        numbers = connection.recv(16)
        for number in numbers or [signal.SIGKILL]:
            signal.pidfd_send_signal(ended, number)
        if not numbers:
            os._exit(0)


def run(program):
    """Run a program and end as Python would, but for taking apart what the libraries hold, which takes seconds."""
    status = 0
    try:
        program()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def begin(request, path):
    """Be the process that was asked for at `path`: its variables, folder, arguments; returns its program."""
    # It is ignored where the tests are, as by shells in what they start in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if WARM_CHILDREN.items() <= request["env"].items():
        sys.executable = os.path.join(os.path.dirname(path), "python")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream.isatty())
    kind, *arguments = request["arguments"]
    # Those of the server's own variables come from the request, if at all.
    known = [place for place in sys.path if place not in SOURCES]
    known[:0] = [place for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    if kind == "-m":
        sys.path[:] = [os.getcwd(), *known]
        sys.argv = arguments
        return lambda: runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    if kind == "-c":
        sys.path[:] = ["", *known]
        sys.argv = ["-c", *arguments[1:]]
        return lambda: exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    sys.path[:] = [os.path.dirname(os.path.abspath(kind)), *known]
    sys.argv = [kind, *arguments]
    return lambda: runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        relay(sys.argv[2], sys.argv[3:])
    # The folder of this file holds modules that are asked for with the folder's name.
    sys.path.pop(0)
    for name in HEAVY:
        importlib.import_module(name)
    # So is this machine's speed, with which runs are predicted.
    devices = importlib.import_module("maiht_lightning.estimate.devices")
    machine = devices.measure(64, 128)
    devices.measure = lambda *_: machine
    # Pages that the collector of a forked process does not touch are not copied.
    gc.collect()
    gc.freeze()
    path = sys.argv[2]
    run(begin(serve(path), path))
