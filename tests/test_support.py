"""Records of test runs, and what is drawn from them."""

import re
from types import SimpleNamespace

from tests import support


def test_the_page_and_the_classifiers_are_made_of_the_records():
    records = support.read()
    assert support.PAGE.read_text() == support.page(records)
    found = re.findall(r'"(Programming Language :: Python :: \d+\.\d+)"', support.PROJECT.read_text())
    assert found == support.classifiers(records)


def test_a_run_counts_the_tests_of_its_front_end(tmp_path, monkeypatch):
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    ids = {
        "passed": [
            "tests/test_torch/test_steps.py::test_one",
            "tests/test_conformance.py::test_two[Torch]",
            "tests/test_conformance.py::test_two[adam-TorchFused-3]",
            "tests/test_conformance.py::test_two[TfKeras]",
            "tests/test_package.py::test_three",
        ],
        "failed": ["tests/test_torch/test_steps.py::test_four"],
    }
    stats = {kind: [SimpleNamespace(nodeid=one) for one in nodes] for kind, nodes in ids.items()}
    support.record(stats, tmp_path)
    records = support.read(tmp_path)
    counts = {one["front_end"]: (one["passed"], one["failed"], one["skipped"]) for one in records}
    assert counts == {"PyTorch": (3, 1, 0), "Keras 2": (1, 0, 0)}


def test_only_pythons_without_a_failure_are_classified_and_versions_are_compared_as_numbers():
    def run(python, jax, failed=0):
        versions = {"optax": "0.2.8", "jax": jax}
        return {
            "front_end": "Optax",
            "python": python,
            "system": "Linux",
            "machine": "x86_64",
            "date": "2026-01-01",
        } | {
            "versions": versions,
            "passed": 5,
            "failed": failed,
            "skipped": 0,
        }

    records = [run("3.12.1", "0.10.2"), run("3.11.7", "0.4.34"), run("3.13.0", "0.12.0", failed=1)]
    assert [one[-4:] for one in support.classifiers(records)] == ["3.11", "3.12"]
    first_table = support.page(records).split("Each run")[0]
    assert "| Optax | Optax 0.2.8, JAX 0.4.34 to 0.10.2 | 3.11, 3.12 | Linux x86_64 |" in first_table
