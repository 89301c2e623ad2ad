import contextlib
import doctest
import io
import os
import tempfile

from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

with contextlib.suppress(ImportError):
    # TensorFlow and then Triton, which PyTorch imports, crash a process. In this order they do not.
    import triton  # noqa: F401


def _enter_folder(namespace):
    namespace["_home"], namespace["_folder"] = os.getcwd(), tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace):
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


def _run(example):
    """Run a Python block, and keep what it prints for the block of output after it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        PythonEvaluator()(example)
    example.namespace["_printed"] = printed.getvalue()


def _compare(example):
    """Return what is wrong with a block of output; `...` stands for anything, and white space does not matter."""
    printed = example.namespace.pop("_printed")
    rules = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if doctest.OutputChecker().check_output(str(example.parsed), printed, rules):
        return None
    return f"The page has:\n{example.parsed}\nThe block before it printed:\n{printed}"


# The Python blocks of a page run in order, in one namespace and an empty folder. A block of output holds what the block
# before it prints.
pytest_collect_file = Sybil(
    parsers=[CodeBlockParser("python", _run), CodeBlockParser("output", _compare)],
    patterns=["*.md"],
    setup=_enter_folder,
    teardown=_leave_folder,
).pytest()


def pytest_terminal_summary(terminalreporter):
    """Write records of what was tested, if `RECORD` names a folder for them."""
    if os.environ.get("RECORD"):
        from tests import support

        support.record(terminalreporter.stats, os.environ["RECORD"])
