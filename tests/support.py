"""Which versions were tested: records of test runs, and the page and the classifiers drawn from them.

`make test RECORD=docs/support` writes records, and `python tests/support.py` draws them.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "support"
PAGE = ROOT / "docs" / "support.md"
PROJECT = ROOT / "pyproject.toml"

# For each front end: the folder of its tests, its class in the conformance suite, the backend, and the packages whose
# versions matter. TensorFlow 2.15 has a Keras 2 of its own, and later releases have it in `tf_keras`.
FRONT_ENDS = {
    "Keras 3 on TensorFlow": ("test_keras", "Keras", "tensorflow", ("keras", "tensorflow")),
    "Keras 3 on JAX": ("test_keras", "Keras", "jax", ("keras", "jax")),
    "Keras 3 on PyTorch": ("test_keras", "Keras", "torch", ("keras", "torch")),
    "PyTorch": ("test_torch", "Torch", None, ("torch",)),
    "Optax": ("test_optax", "Optax", None, ("optax", "jax")),
    "Keras 2": ("test_tf_keras", "TfKeras", None, ("tf_keras", "tensorflow")),
}
NAMES = {"keras": "Keras", "tensorflow": "TensorFlow", "jax": "JAX", "torch": "PyTorch", "optax": "Optax"}


# --- A record


def version(package):
    """Return the installed version of a package, without the name of a build, or None."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def counted(stats, folder, adapter):
    """Return how many tests of a front end passed, failed and were skipped, as pytest's statistics have them."""
    of_suite = re.compile(rf"tests/test_conformance\.py::.*[\[-]{adapter}")
    found = {"passed": 0, "failed": 0, "skipped": 0}
    for outcome, kinds in (("passed", ["passed"]), ("failed", ["failed", "error"]), ("skipped", ["skipped"])):
        for kind in kinds:
            nodes = (getattr(report, "nodeid", "") for report in stats.get(kind, []))
            found[outcome] += sum(node.startswith(f"tests/{folder}/") or bool(of_suite.match(node)) for node in nodes)
    return found


def record(stats, folder):
    """Write a record of a test run: one file for each front end, Python and set of versions."""
    backend = os.environ.get("KERAS_BACKEND")
    for front_end, (tests, adapter, needed, packages) in FRONT_ENDS.items():
        found = counted(stats, tests, adapter)
        if needed != backend or not found["passed"] + found["failed"]:
            continue
        content = {
            "front_end": front_end,
            "python": platform.python_version(),
            "system": platform.system(),
            "machine": platform.machine(),
            "date": datetime.date.today().isoformat(),
            "versions": {package: version(package) for package in packages},
            **found,
        }
        versions = "-".join(str(one) for one in content["versions"].values())
        name = f"{front_end}-{content['python']}-{versions}".lower().replace(" ", "_")
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n")


# --- The page and the classifiers


def number(text):
    """Return a version as a tuple of numbers, for comparisons."""
    return tuple(int(part) for part in re.findall(r"\d+", text or ""))


def in_words(versions):
    """Return names and versions of packages."""
    named = ((NAMES.get(package, package), one) for package, one in versions.items())
    return ", ".join(f"{name} {one}" for name, one in named if one)


def order(one):
    """Return what records are sorted by: front end, then the newest versions first."""
    texts = [one["python"], *one["versions"].values()]
    return list(FRONT_ENDS).index(one["front_end"]), [[-part for part in number(text)] for text in texts]


def page(records):
    """Return the page on what was tested."""
    summary, rows = [], []
    records = sorted(records, key=order)
    for front_end, (*_, packages) in FRONT_ENDS.items():
        passed = [one for one in records if one["front_end"] == front_end and not one["failed"]]
        if not passed:
            continue
        cells = []
        for package in packages:
            found = sorted({one["versions"][package] for one in passed if one["versions"][package]}, key=number)
            if found:
                cells.append(f"{NAMES.get(package, package)} {' to '.join(dict.fromkeys((found[0], found[-1])))}")
        pythons = sorted({".".join(one["python"].split(".")[:2]) for one in passed}, key=number)
        systems = sorted({f"{one['system']} {one['machine']}" for one in passed})
        summary.append([front_end, ", ".join(cells), ", ".join(pythons), ", ".join(systems)])
    for one in records:
        counts = f"{one['passed']:,}", f"{one['failed']:,}", f"{one['skipped']:,}"
        rows.append([one["front_end"], one["python"], in_words(one["versions"]), *counts, one["date"]])
    head = "| front end | lowest to newest versions tested | Python | system |\n|---|---|---|---|\n"
    details = "| front end | Python | versions | passed | failed | skipped | date |\n|---|---|---|---:|---:|---:|---|\n"
    return (
        "# Tested versions\n\n"
        "The first table counts the test runs in which no test failed. A version that is not here may work, but no\n"
        "test shows it. `tests/support.py` draws this page from records, which test runs write.\n\n"
        f"{head}{lines(summary)}\n"
        "Each run. The tests counted are the tests of the front end and the conformance suite. Runs with the oldest\n"
        "versions leave out some tests, and so do some runs on other Pythons than 3.11.\n\n"
        f"{details}{lines(rows)}"
    )


def lines(rows):
    """Return the rows of a table in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def classifiers(records):
    """Return the classifiers of the Pythons on which the tests of some front end ran, and none failed."""
    pythons = {number(one["python"])[:2] for one in records}
    failed = {number(one["python"])[:2] for one in records if one["failed"]}
    return [f"Programming Language :: Python :: {major}.{minor}" for major, minor in sorted(pythons - failed)]


def read(folder=RECORDS):
    """Return all records."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def main():
    """Draw the page, and write the classifiers into `pyproject.toml`."""
    records = read()
    PAGE.write_text(page(records))
    old = r'(    "Programming Language :: Python :: \d+\.\d+",\n)+'
    new = "".join(f'    "{one}",\n' for one in classifiers(records))
    PROJECT.write_text(re.sub(old, new, PROJECT.read_text()))
    print(f"Wrote {PAGE} and the classifiers in {PROJECT}.")


if __name__ == "__main__":
    sys.exit(main())
