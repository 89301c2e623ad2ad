import os
import tempfile

from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser


def _enter_folder(namespace):
    namespace["_home"], namespace["_folder"] = os.getcwd(), tempfile.TemporaryDirectory()
    os.chdir(namespace["_folder"].name)


def _leave_folder(namespace):
    os.chdir(namespace["_home"])
    namespace["_folder"].cleanup()


# The Python blocks of a page run in order, in one namespace and an empty folder.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser()], patterns=["*.md"], setup=_enter_folder, teardown=_leave_folder
).pytest()
