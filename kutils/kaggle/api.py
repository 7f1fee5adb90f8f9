"""Signs in to Kaggle, and turns errors that its Python client raises or only prints into errors without secrets."""

import contextlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from kutils.kaggle.metadata import KaggleError

CALL_SECONDS = 300  # time limit of a call; the client itself would wait for ever
LAST_LINES = 12  # of the client's output, repeated in an error
SECRET_VARIABLES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "KAGGLE_TOKEN", "KAGGLE_API_V1_TOKEN", "KAGGLE_IAP_TOKEN")
SECRET_FILES = ("kaggle.json", "access_token", "access_token.txt", "credentials.json")
SIGNED = re.compile(r"(?i)((?:signature|sig|token|key|credential)=)[^&\s'\"]+|(://[^/\s:@]+:)[^/\s@]+(?=@)")


class NoAnswer(KaggleError):
    """Kaggle or the network is down; the same call may succeed later."""


@contextlib.contextmanager
def signed_in(step: str) -> Iterator[tuple["kaggle.KaggleApi", io.StringIO]]:  # noqa: F821 (imported where it is used)
    """Yield Kaggle's client, signed in, and a buffer with the output that it prints inside the block.

    Args:
        step: begins the message of an error.
    Raises: KaggleError, without secrets, for any error of the block; NoAnswer if the same call may succeed later.
    """
    for name in ("VERBOSE", "VERBOSE_OUTPUT"):  # with either, the client prints its requests, keys included
        os.environ.pop(name, None)
    secrets, output = known_secrets(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output), time_limit(CALL_SECONDS):
            from kaggle import KaggleApi  # here, since it signs in when it is imported

            KaggleApi.already_printed_version_warning = True  # the warning would be taken for an error
            api = KaggleApi()
            api.authenticate()
            output.seek(0)
            output.truncate()
            yield api, output
    except (Exception, SystemExit) as error:  # any: a traceback could show secrets. SystemExit: there is no account
        secrets |= known_secrets()  # the client may have renewed some
        kind, message = explain(step, error, output.getvalue())
        raise kind(masked(message, secrets)) from None


def explain(step: str, error: BaseException, output: str) -> tuple[type[KaggleError], str]:
    """The class and the message of the KaggleError for an error of Kaggle's client."""
    if isinstance(error, KaggleError):
        return KaggleError, str(error)
    if isinstance(error, ImportError):
        return (
            KaggleError,
            f"the Kaggle client does not start, {error.name} is not installed: pip install -U kaggle six",
        )
    from kaggle.api.kaggle_api_extended import format_http_error
    from requests.exceptions import ChunkedEncodingError, ConnectionError, HTTPError, Timeout

    status = error.response.status_code if isinstance(error, HTTPError) and error.response is not None else 0
    if isinstance(error, SystemExit) or status == 401:
        return KaggleError, (
            "Kaggle knows no account of yours: make a token at https://www.kaggle.com/settings and put it into the "
            "variable KAGGLE_API_TOKEN or the file ~/.kaggle/access_token (or kaggle.json into ~/.kaggle); one that "
            "is there may have expired"
        )
    if isinstance(error, Timeout):
        return NoAnswer, f"{step}: no answer within {CALL_SECONDS:g} s"
    lines = [format_http_error(error) if isinstance(error, HTTPError) else str(error) or repr(error)]
    lines += [line for line in output.splitlines() if line.strip() and "%|" not in line][-LAST_LINES:]  # no bars
    transient = status == 429 or status >= 500 or isinstance(error, (ConnectionError, ChunkedEncodingError))
    return NoAnswer if transient else KaggleError, f"{step}: " + "\n".join(lines)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Let requests in the block fail after `seconds` without an answer; file uploads have no time limit.

    The client passes no time limit, and `requests` has no setting for one. Uploads pass None, which is kept.
    """
    from requests import Session

    send = Session.send
    Session.send = lambda self, request, **options: send(self, request, **{"timeout": seconds, **options})
    try:
        yield
    finally:
        Session.send = send


def known_secrets() -> set[str]:
    """Keys and tokens that the client may read from variables and files."""
    secrets = {os.environ.get(name, "") for name in SECRET_VARIABLES}
    folders = [os.environ.get("KAGGLE_CONFIG_DIR"), "~/.kaggle", "~/.config/kaggle"]
    folders.append(os.environ.get("XDG_CONFIG_HOME", "~/.config") + "/kaggle")
    files = [Path(folder).expanduser() / name for folder in folders if folder for name in SECRET_FILES]
    for path in files + [Path(value) for value in secrets if value]:  # a variable may name a file
        with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or no JSON
            content = path.read_text(encoding="utf-8").strip()
            secrets.add(content)
            secrets.update(
                str(value) for name, value in dict(json.loads(content)).items() if name.endswith(("key", "token"))
            )
    return {secret for secret in secrets if len(secret) > 3}


def masked(text: str, secrets: set[str]) -> str:
    """Text without secrets, signatures of addresses and passwords of proxies."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return SIGNED.sub(r"\1\2***", text)


def poll(what: str, ask: Callable[[], str], wait_seconds: float, poll_seconds: float) -> Iterator[str]:
    """Yield the states that `ask` returns until the time is over; prints a line when the state changes.

    It continues if there is no answer for a while (no network, Kaggle's servers down).
    """
    deadline, previous = time.monotonic() + wait_seconds, None
    while True:
        try:
            state = ask()
        except NoAnswer:
            state = "no answer, asking again"
        if state != previous:
            print(f"{what}: {state}", flush=True)
        previous = state
        yield state
        left = deadline - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(poll_seconds, left))
