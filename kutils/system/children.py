"""Runs commands as child processes, shows their output, stops them cleanly on Ctrl-C, and reports failures.

Children and ranks are started as `python -m kutils.system.children MODULE [ARGUMENT ...]`, so that they end when their
parent does. This module imports no torch: a notebook that launches ranks must not hold a GPU itself.
"""

import collections
import contextlib
import ctypes
import logging
import math
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

LAST_LINES = 40  # of the output, repeated in the exception
KEPT_LINES = 400  # torchrun's summary holds tracebacks; the failed rank is named above the last one
STOPPED = "stopped by a signal"  # beginning of the error with which a rank ends after it has saved its state
SAVING_SECONDS = 600  # allowed after SIGTERM: the state of the largest network is 13 GB, perhaps on a network disk


class CommandFailed(RuntimeError):
    """A child process ended with an error; the message ends with its last output.

    Attributes:
        last_lines: the last lines of its output.
    """

    def __init__(self, message: str, last_lines: tuple[str, ...] = ()):
        super().__init__(message)
        self.last_lines = last_lines


def run_module(
    module: str,
    *arguments: str,
    environment: dict[str, str | None] | None = None,
    hide: str | None = None,
    seconds: float | None = None,
) -> bool:
    """Run `python -m <module> <arguments>` as a child process, and print its output line by line.

    The child ends when this process ends, even by a kill. After an interrupt it has SAVING_SECONDS to save and end; its
    last lines are shown, then KeyboardInterrupt is raised again.

    Args:
        module, arguments: what to run.
        environment: variables to set for the child; the value None removes one.
        hide: regular expression of whole lines that are not shown.
        seconds: time limit, after which the child is asked to save and end, as by an interrupt.
    Returns: True if it finished; False if it was stopped by the time limit and printed no error but STOPPED.
    Raises: CommandFailed with the command's last lines.
    """
    settings = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    from kutils.system import paths  # brings NumPy: a command handles signals before that is loaded

    settings["PYTHONSAFEPATH"] = "1"  # the current folder may be another clone: its kutils must not come first
    search_path = os.pathsep.join(filter(None, [str(paths.code_root()), os.environ.get("PYTHONPATH")]))
    environment = os.environ | settings | (environment or {}) | {"PYTHONPATH": search_path}
    last, error = collections.deque(maxlen=KEPT_LINES), []
    child = subprocess.Popen(
        [sys.executable, "-m", "kutils.system.children", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env={name: value for name, value in environment.items() if value is not None},
        start_new_session=True,  # an interrupt goes to this process, which ends the child in order
    )
    # a thread of its own, so that an interrupt of this one does not lose the child's last output
    reader = threading.Thread(target=follow, args=(child.stdout, last, error, hide), daemon=True)
    try:
        reader.start()
        code = child.wait(seconds)
    except subprocess.TimeoutExpired:
        end(child)
        code = None
    except BaseException:
        end(child)
        raise
    finally:
        if reader.ident:
            reader.join(timeout=5)  # not for ever: a grandchild may hold the pipe open
    saved = not error or error[0].startswith(f"error: {STOPPED}")
    if code or (code is None and not saved):
        message = "\n".join(error[:LAST_LINES] or list(last)[-LAST_LINES:])
        raise CommandFailed(f"{module} {shlex.join(arguments)} ended with exit code {code}:\n{message}", tuple(last))
    return code is not None


def follow(output, last: collections.deque, error: list[str], hide: str | None) -> None:
    """Show lines as they come; keep the last ones, and those of the last `error: ` message."""
    error_rank = None
    for line in output:
        rank, line = re.fullmatch(r"(\[[a-z]+\d+\]:)?(.*)", line.rstrip("\n")).groups()
        last.append(line)
        if line.startswith("error: "):
            error[:], error_rank = [line], rank
        elif error and rank == error_rank:  # of the same message; torchrun's own traceback has no rank's prefix
            error.append(line)
        if hide is None or not re.fullmatch(hide, line):
            with contextlib.suppress(OSError, ValueError):  # stdout may be closed, or lack a character
                print(line, flush=True)


def end(child: subprocess.Popen) -> None:
    """Send SIGTERM once to the child's process group; send SIGKILL a minute after SAVING_SECONDS, later than torchrun
    does.

    Further interrupts do not shorten the wait: they would cut a file that is being saved.
    """
    for number, seconds in ((signal.SIGTERM, SAVING_SECONDS + 60), (signal.SIGKILL, 30)):
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return
        if ended_within(child, seconds):
            return


def ended_within(child: subprocess.Popen, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            child.wait(left)
            return True
        except KeyboardInterrupt:
            continue
        except subprocess.TimeoutExpired:
            break
    return False


class Interrupted(KeyboardInterrupt):
    """Raised by the handler of SIGINT and SIGTERM; `number` is the signal's."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


def interrupt_once(message: str = "", again_seconds: float = math.inf) -> None:
    """Let the first SIGINT or SIGTERM raise Interrupted; ignore further ones, which would interrupt the saving.

    A forked process, such as a loader's worker, ends at SIGTERM and ignores SIGINT, which a terminal sends to all.

    Args:
        message: printed to stderr when it happens.
        again_seconds: after this time another signal raises again.
    """
    last, own = -math.inf, os.getpid()

    def interrupt(number: int, frame) -> None:
        nonlocal last
        if os.getpid() != own:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if time.monotonic() - last < again_seconds:
            return
        last = time.monotonic()
        os.write(2, message.encode())  # print() may have been interrupted itself
        raise Interrupted(number)

    def send_again(unraisable) -> None:
        """Send the signal again if Python has dropped its exception, as it does in `__del__` and callbacks."""
        nonlocal last
        if isinstance(unraisable.exc_value, Interrupted):
            last = -math.inf
            threading.Timer(0.1, os.kill, (os.getpid(), unraisable.exc_value.number)).start()
        else:
            sys.__unraisablehook__(unraisable)

    handle_signals(interrupt)
    sys.unraisablehook = send_again


def exit_at_once(number: int, frame) -> None:
    """Handle SIGINT and SIGTERM during imports, where a library could catch an exception: exit without one."""
    os.write(2, f"error: {STOPPED}\n".encode())
    os._exit(128 + number)


def handle_signals(handler: Callable) -> None:
    """Set the handler of SIGINT and SIGTERM, unless the signal is ignored, as in background jobs of a shell script."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, even by a kill."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 = PR_SET_PDEATHSIG


def exit_without(parent: int, ended: threading.Event) -> None:
    """Exit once the parent is gone and the module has ended.

    Linux may then send two signals. The second interrupts torchrun's handling of the first, which can leave a thread of
    torchrun for which Python would wait for ever before it exits.
    """
    while os.getppid() == parent or not ended.is_set():
        time.sleep(0.2)
    os._exit(1)


def count_ranks_by_node() -> None:
    """On several nodes, number this rank by NODE_RANK, since torchrun numbers nodes in the order of their names.

    Rank 0 prints the progress, so it has to be on the node with the notebook.
    """
    nodes, local = int(os.environ.get("GROUP_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if nodes == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # else rank 0 must be torchrun's own
        return
    if nodes * local != int(os.environ["WORLD_SIZE"]):
        sys.exit(
            f"error: {local} ranks here of {os.environ['WORLD_SIZE']} on {nodes} nodes: start as many on each node"
        )
    os.environ["RANK"] = str(int(os.environ["NODE_RANK"]) * local + int(os.environ["LOCAL_RANK"]))


def torchrun_failure(error: Exception) -> str:
    """One line that says why torchrun ended: the rank that failed first, a signal, or nodes that did not connect."""
    if not hasattr(error, "get_first_failure"):
        return f"{type(error).__name__}: {error}"
    rank, failure = error.get_first_failure()
    return f"rank {rank} failed first: local rank {failure.local_rank}, exit code {failure.exitcode}"


if __name__ == "__main__":
    module_ended = threading.Event()
    threading.Thread(target=exit_without, args=(os.getppid(), module_ended), daemon=True).start()
    end_with_parent()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a rank
        count_ranks_by_node()
    sys.argv = sys.argv[1:]
    # else torchrun prints a traceback if a second signal arrives while it ends
    logging.getLogger("torch.distributed.launcher.api").disabled = True
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except Exception as error:
        if not type(error).__module__.startswith("torch.distributed.elastic"):
            raise
        sys.exit(torchrun_failure(error))  # a traceback of torchrun's own code says nothing more
    finally:
        module_ended.set()
