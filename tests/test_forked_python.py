"""The Python that tests start in place of the real one does as that does."""

import json
import os
import signal
import subprocess
import time

import pytest
from fixtures.forked_python import PYTHON, REAL_PYTHON, kill

SHOW = """
import json, os, sys
print(json.dumps([__name__, sys.argv, sys.path[:3], os.getcwd(), os.environ.get("SOME"), sys.stdin.read()]))
"""
SPAWN = """
import multiprocessing
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        print(pool.map(abs, [-1, 2]))
"""


def ended(python, arguments, folder, **variables):
    """Exit code, output, and the last line of the errors."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder / "libraries"), "SOME": "thing"} | variables
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "input": "typed"}
    done = subprocess.run([python, *arguments], **options)
    return done.returncode, done.stdout, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c", SHOW, "-m", "x"],
        ["-u", "-c", SHOW],
        ["-m", "shown", "a b"],
        ["-P", "-m", "shown"],
        ["script.py", "--option"],
        ["-c", SPAWN],
        ["-c", "import sys; sys.exit('a message')"],
        ["-c", "raise SystemExit(258)"],
        ["-c", "1 / 0"],
        ["-c", "import atexit; atexit.register(print, 'end'); print('begin')"],
        ["-c", "import threading, time; threading.Thread(target=lambda: time.sleep(0.2) or print('late')).start()"],
        ["-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"],
        ["-c", "raise KeyboardInterrupt"],
        ["-c", "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', 'exit(7)']).returncode)"],
        ["-S", "-c", "import sys; print(sys.flags.no_site)"],
        ["-m", "absent"],
    ],
)
def test_it_does_as_python_does(tmp_path, arguments):
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "sitecustomize.py").write_text("import sys\nsys.modules['pandas'] = None\n")
    (tmp_path / "libraries" / "shown.py").write_text(SHOW)
    (tmp_path / "script.py").write_text(f"{SHOW}\ntry:\n    import pandas\nexcept ImportError:\n    print('none')\n")
    code, output, errors = ended(PYTHON, arguments, tmp_path)
    expected_code, expected_output, expected_errors = ended(REAL_PYTHON, arguments, tmp_path)
    assert (code, output) == (expected_code, expected_output)
    if arguments[-1] != "absent":  # whose line begins with the path of the interpreter
        assert errors == expected_errors


@pytest.mark.parametrize("blocked", [set(), {signal.SIGINT, signal.SIGTERM}])
def test_blocked_signals_are_those_of_the_process_that_starts_it(tmp_path, blocked):
    """Multiprocessing blocks them while it starts its tracker, which may be the first that asks the server."""
    arguments = ["-c", "import signal; print(sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])))"]
    before = signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        shown = [ended(python, arguments, tmp_path) for python in (PYTHON, REAL_PYTHON)]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert shown[0] == shown[1] and shown[0][1].count("SIGTERM") == len(blocked) // 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_process(tmp_path, number):
    code = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\nprint('begun', flush=True)\ntime.sleep(600)"
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    process = subprocess.Popen([PYTHON, "-c", code], **options)
    assert process.stdout.readline() == "begun\n"
    if number == signal.SIGUSR1:
        kill(process)
    else:
        process.send_signal(number)
    assert process.wait() == -(signal.SIGKILL if number == signal.SIGUSR1 else number)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_who_kills_what_stands_in_kills_the_process(tmp_path):
    code = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = json.loads(process.stdout.readline())
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
