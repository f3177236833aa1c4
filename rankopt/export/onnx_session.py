"""onnxruntime sessions on the CPU; the only module that imports onnxruntime, which is in the extra `export`."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankopt.core.errors import RankoptError

ERRORS_ONLY = 3
"""onnxruntime's severity level at which warnings are not printed."""


def onnxruntime_version() -> str:
    """The version of the installed onnxruntime.

    Raises:
        RankoptError: If it is not installed.
    """
    return str(_onnxruntime().__version__)


def check_exporter() -> None:
    """Check that models can be written as ONNX and run.

    Raises:
        RankoptError: If onnxruntime or onnxscript is not installed.
    """
    _onnxruntime()
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise _missing(error) from None


def open_session(model: Path | bytes, threads: int = 1) -> Any:
    """Open an inference session on the CPU.

    Args:
        model: An ONNX file or its content.
        threads: Threads that an operator may use; operators run one after the other.

    Returns:
        An onnxruntime.InferenceSession.

    Raises:
        RankoptError: If onnxruntime is not installed.
    """
    onnxruntime = _onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = ERRORS_ONLY
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@contextmanager
def quiet_exporter(category: type[Warning] = Warning) -> Iterator[None]:
    """Context: torch's exporters neither log below errors nor warn.

    They remark on packages that are not installed and on deprecated parts of torch itself.

    Args:
        category: Warnings to ignore.
    """
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore", category=category):
            yield
    finally:
        logger.setLevel(level)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(error) from None
    return onnxruntime


def _missing(error: ImportError) -> RankoptError:
    return RankoptError(f"ONNX needs packages that are not here ({error}): pip install 'rankopt[export]'")
