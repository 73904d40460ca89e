"""Processes whose imports are done: to a test they are as others."""

import os
import signal
import subprocess
import sys

import pytest

from helpers.warm import WARM_CHILDREN, kill, python

PROGRAM = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ["CHOSEN"], os.environ.get("OTHER"), input(), "transformers" in sys.modules)
print("a complaint", file=sys.stderr)
raise SystemExit(sys.argv[1] if sys.argv[1] == "text" else int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["-c", "file"])
@pytest.mark.parametrize(("given", "status"), [("0", 0), ("7", 7), ("text", 1)])
def test_arguments_variables_folder_files_and_status_are_the_commands(tmp_path, how, given, status):
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["-c", PROGRAM] if how == "-c" else ["program.py"]
    done = subprocess.run(
        [*python(), *words, given, "two words"],
        cwd=tmp_path, env={"CHOSEN": "x"}, input="a line\n", capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == status
    assert done.stdout == f"{[given, 'two words']} {tmp_path} x None a line True\n"
    assert done.stderr == "a complaint\n" + ("text\n" if given == "text" else "")


@pytest.mark.slow
def test_a_failure_is_told_as_python_tells_it(tmp_path):
    failed = [
        subprocess.run([*words, "-c", "1 / 0"], capture_output=True, text=True, check=False)
        for words in ([sys.executable], python())
    ]
    assert {done.returncode for done in failed} == {1}
    assert {done.stderr.splitlines()[-1] for done in failed} == {"ZeroDivisionError: division by zero"}


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_reach_the_command_and_its_end_is_the_relays(end):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen([*python(), "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    command = int(process.stdout.readline())
    assert command != process.pid
    if end == signal.SIGKILL:
        assert kill(process) == -end
    else:
        process.send_signal(end)
        assert process.wait() == (130 if end == signal.SIGINT else -end)
    assert process.stdout.read() == b""
    with pytest.raises(ProcessLookupError):
        os.kill(command, 0)


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, WARM_CHILDREN])
def test_children_are_such_where_that_is_asked_for(variables):
    child = "import sys; print('transformers' in sys.modules)"
    program = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {child!r}], text=True))"
    done = subprocess.run(
        [*python(), "-c", program], env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(bool(variables))
