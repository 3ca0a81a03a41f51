"""The reading of one input among many: whatever it raises is that input's reject, and never the end of the run.

What is no input's fault passes: trouble of the store, which was retried already, and of this machine.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path

from apacs_ray.errors import ApacsError, BadInput, RefusedError
from apacs_ray.redact import redact

# OSErrors of this machine or of a file system that does not answer: another input would meet them as well
MACHINE_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS,
    errno.ESTALE, errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH,
}  # fmt: skip
MAX_LENGTH = 300  # characters of an error in a reject
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def one_unit(name: str, *, again: bool = False) -> Iterator[None]:
    """Read the input `name` inside; whatever goes wrong with it becomes BadInput.

    Codes beside the input's own: no_permission, missing_file, unreadable, and internal for a defect of our own code,
    whose traceback goes to the log.

    Args:
        name: of the input, for sentences.
        again: it was read before in this run: that the store refuses it now is no defect of it, and passes.

    Yields:
        Nothing.

    Raises:
        BadInput: the input is defective.
        ApacsError: the store is in trouble.
        RefusedError: with `again`, the store refuses the input.
        OSError: this machine is in trouble.
    """
    try:
        yield
    except BadInput:
        raise
    except RefusedError as error:
        if again:
            raise
        raise BadInput("no_permission", f"{error}; give the run the right to read it, or restore it") from error
    except ApacsError:
        raise
    except PermissionError as error:
        raise BadInput("no_permission", f"{name}: this user may not read it ({error.strerror or error})") from error
    except FileNotFoundError as error:
        raise BadInput("missing_file", f"{name}: it is gone, or a file that it needs ({_words(error)})") from error
    except OSError as error:
        if error.errno in MACHINE_ERRORS:
            raise
        raise BadInput("unreadable", f"{name}: {_words(error)}") from error
    except Exception as error:  # the rule of this module: no input ends a run
        _log.exception("%s: a defect of apacs_ray", name)
        raise BadInput("internal", f"{name}: {_words(error)} ({_place(error)}); please report it") from error


def _words(error: BaseException) -> str:
    return redact(f"{type(error).__name__}: {error}"[:MAX_LENGTH])


def _place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}, line {frame.lineno}"
