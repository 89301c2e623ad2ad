"""The package as it is installed: its imports, its version, its wheel."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import hatchling.build
import pytest

import hatch_metadata
import lookahead_optim

ROOT = Path(__file__).parent.parent
FRAMEWORKS = {"keras", "tensorflow", "jax", "torch", "optax", "tf_keras"}


def imported(*statements, **environment):
    """Return which frameworks a fresh process has imported after each statement: a set for each."""
    report = f"print(*[name for name in {sorted(FRAMEWORKS)} if name in sys.modules])"
    code = "; ".join(["import sys", *(f"{statement}; {report}" for statement in statements)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    return [set(line.split()) for line in done.stdout.splitlines()]


def test_the_package_imports_no_framework():
    assert imported("import lookahead_optim, lookahead_optim._checks") == [set()]


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_keras_front_end_imports_what_keras_does_and_nothing_more(backend):
    environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    alone, with_front_end = imported("import keras", "import lookahead_optim.keras", **environment)
    assert with_front_end == alone
    assert {"keras", backend} <= with_front_end


def test_the_pytorch_front_end_imports_pytorch_alone():
    assert imported("import lookahead_optim.torch") == [{"torch"}]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_what_is_for_a_trainer_of_pytorch_imports_what_that_does_and_nothing_more(name):
    # Both packages of Lightning are installed, and the callback belongs to both.
    theirs = {
        "lightning": "import lightning.pytorch, pytorch_lightning",
        "transformers": "from transformers import Trainer",
    }
    alone, with_module = imported(theirs[name], f"import lookahead_optim.{name}")
    assert with_module == alone
    assert "torch" in with_module


def test_the_optax_front_end_imports_optax_and_jax_alone():
    assert imported("import lookahead_optim.optax") == [{"jax", "optax"}]


def test_the_keras_2_front_end_imports_what_tf_keras_does_and_nothing_more():
    alone, with_front_end = imported("import tf_keras", "import lookahead_optim.tf_keras", TF_CPP_MIN_LOG_LEVEL="3")
    assert with_front_end == alone
    assert {"tensorflow", "tf_keras"} <= with_front_end


def test_other_backends_are_refused_by_name():
    code = "import lookahead_optim.keras"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={"KERAS_BACKEND": "numpy"}
    )
    assert done.returncode == 1
    assert "trains on the tensorflow, jax and torch backends of Keras. Received: KERAS_BACKEND=numpy" in done.stderr


def error_of(code, **environment):
    """Return the output of a fresh process that ends with an error."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize(
    ("module", "package", "extra"),
    [
        ("torch", "torch", "torch"),
        ("optax", "optax", "optax"),
        ("optax", "jax", "optax"),
        ("keras", "keras", "keras"),
        ("migrate", "keras", "keras"),
        ("tf_keras", "tensorflow", "tf-keras"),
        ("tf_keras", "tf_keras", "tf-keras"),
        ("lightning", "torch", "lightning"),
        ("transformers", "transformers", "transformers"),
    ],
)
def test_a_framework_that_is_missing_is_named_with_its_extra(module, package, extra):
    code = f"import sys; sys.modules['{package}'] = None; import lookahead_optim.{module}"
    assert re.search(
        rf"ModuleNotFoundError: `lookahead_optim\.\w+` needs the package `{package}`, which is not installed: "
        rf"pip install 'lookahead-optim\[{extra}\]'",
        error_of(code, TF_CPP_MIN_LOG_LEVEL="3"),
    )


def test_lightning_may_come_from_either_package():
    code = "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None"
    assert "pip install 'lookahead-optim[lightning]'" in error_of(f"{code}; import lookahead_optim.lightning")


def test_a_backend_of_keras_that_is_missing_is_named():
    code = "import sys; sys.modules['jax'] = None; import lookahead_optim.keras"
    assert "Keras looks for its backend `jax`, which is not installed. Install it, or set the environment " in error_of(
        code, KERAS_BACKEND="jax"
    )


def test_the_package_itself_says_where_lookahead_is():
    for name in ("Lookahead", "lookahead"):
        found = error_of(f"from lookahead_optim import {name}")
        assert "ImportError: `lookahead_optim` has a Lookahead for each framework" in found
    assert not hasattr(lookahead_optim, "Other")


def test_version_is_that_of_the_distribution():
    assert lookahead_optim.__version__ == importlib.metadata.version("lookahead-optim")


def test_changelog_has_the_version():
    assert f"## {lookahead_optim.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [one for one in links if not (ROOT / one).exists()] == []


def test_no_runtime_dependency_beyond_the_extras():
    requires = importlib.metadata.requires("lookahead-optim")
    assert all("extra ==" in requirement for requirement in requires)
    extras = importlib.metadata.metadata("lookahead-optim").get_all("Provides-Extra")
    assert set(extras) == {"keras", "tf-keras", "torch", "optax", "lightning", "transformers"}


def test_wheel_holds_every_module_the_type_marker_and_the_license(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT]
    subprocess.run(build, check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    modules = {str(path.relative_to(source)) for path in [*source.rglob("*.py"), *source.rglob("py.typed")]}
    assert modules <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith("tests") for name in names)


def test_the_source_distribution_has_sources_tests_and_text_and_no_results_or_pictures(tmp_path):
    with tarfile.open(tmp_path / hatchling.build.build_sdist(str(tmp_path))) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in ("src", "tests", "docs", "experiments", "benchmarks", "examples"):
        sources = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py") if path.stem != "conf"}
        assert sources - {one for one in sources if "_build" in one} <= names
    assert {"README.md", "CHANGELOG.md", "LICENSE", "Makefile", "constraints.txt", "docs/torch.md"} <= names
    assert not [
        name for name in names if name.endswith((".svg", ".png")) or "results/" in name or name.startswith(".ci")
    ]


def test_links_in_the_readme_are_absolute_or_none_where_it_is_shown_elsewhere():
    text = "[a](docs/a.md#b), ![p](p.svg), [c](https://c.d/e) and [f](#f)"
    to_file, to_picture = "https://host/one/blob/main/docs/a.md#b", "https://host/one/raw/main/p.svg"
    expected = f"[a]({to_file}), ![p]({to_picture}), [c](https://c.d/e) and [f](#f)"
    assert hatch_metadata.with_absolute_links(text, "https://host/one") == expected
    assert hatch_metadata.with_absolute_links(text, "") == "a, , [c](https://c.d/e) and [f](#f)"
    assert hatch_metadata.urls("") == {}
    assert hatch_metadata.urls("https://host/one")["Changelog"] == "https://host/one/blob/main/CHANGELOG.md"


def test_the_citation_has_the_version_and_the_address_if_there_is_one():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {lookahead_optim.__version__}\n" in citation
    (address,) = re.findall(r'^address = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert re.findall(r"^repository-code: (.*)$", citation, re.MULTILINE) == ([address] if address else [])


def test_help_lists_every_target_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    # Another `make` runs these tests, and the inner `make` would report its folder.
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=60).stdout
    assert {line.split(":")[0] for line in shown.splitlines()} == targets
