"""What every command does around its work: set up logging, turn a user's mistake into one line, and end."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import NoReturn

from ltd.config import ConfigError
from ltd.storage import StorageError, StorageWriteError


@contextlib.contextmanager
def command_line(*fatal: type[Exception]) -> Iterator[None]:
    """Configure logging and end the process with one line where the error says all there is to say.

    A ``ConfigError`` or ``StorageError`` exits with 2, an ``OSError`` that names a file (no space, no permission) or
    one of ``fatal`` with 1; anything else is a bug and keeps its traceback.

    Args:
        fatal: Further errors whose message is enough.

    Yields:
        Nothing.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    for noisy in ("transformers", "httpx", "DeepSpeed", "PIL", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    try:
        yield
    except (ConfigError, StorageError) as error:
        _end(error, 2)
    except OSError as error:
        # The file system said no to a path: that is the user's to mend, unless nothing names the path.
        if error.filename is None and not isinstance(error, StorageWriteError):
            raise
        _end(error, 1)
    except Exception as error:
        if not isinstance(error, (StorageWriteError, *fatal)):
            raise
        _end(error, 1)


@contextlib.contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Let mistakes name the options that were typed in place of the configuration's fields they were put in.

    Args:
        options: Option by field, such as ``--shards`` by ``data.shards``; an index behind the field goes with it.

    Yields:
        Nothing.

    Raises:
        ConfigError: The mistake, with the options' names.
    """
    try:
        yield
    except ConfigError as error:
        text = str(error)
        for field, option in options.items():
            text = re.sub(rf"(?<![\w./-]){re.escape(field)}(\[\d+\])?(?![\w/-]|\.\w)", option, text)
        raise ConfigError(text) from error


def leave(code: int) -> NoReturn:
    """End the process once its work is done: a native thread that is torn down must not make a failure of it.

    Python's threads that are no daemons are waited for, functions registered with ``atexit`` run, and what is buffered
    is written. The interpreter itself is not torn down: gloo's threads, and Python threads inside torch's code, may
    abort the process there (``terminate called without an active exception``), for which a launcher ends the others.

    Args:
        code: Exit code.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # ends the threads of pools, too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(code)


def _end(error: Exception, code: int) -> None:
    sys.stderr.write(f"error: {error}\n")
    sys.exit(code)
