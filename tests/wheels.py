"""The wheel with each of its extras, installed in an environment of its own, runs the example of that extra's page.

`make wheels` runs it. It takes some minutes, most of them for the installation of frameworks.
"""

import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Annotated

import typer

ROOT = Path(__file__).parent.parent

# For each extra: its page, what the blocks that run contain (the first block that contains each), and packages that the
# extra leaves to the user.
EXTRAS = {
    "keras": ("keras", ["import keras"], ["jax"]),
    "torch": ("torch", ["import torch"], []),
    "optax": ("optax", ["import optax"], []),
    "tf-keras": ("tf_keras", ["lookahead_optim.tf_keras"], ["tensorflow"]),
    "lightning": ("torch", ["import torch", "def start", "lookahead_optim.lightning"], []),
    "transformers": ("torch", ["import torch", "def start", "lookahead_optim.transformers"], []),
}


def example(page, needles):
    """Return the code of the first blocks of a page that contain some texts."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.DOTALL | re.MULTILINE)
    return "\n\n".join(next(block for block in blocks if needle in block) for needle in needles)


def check(extra, wheel, constraints, folder):
    """Install the wheel with an extra in a new environment, and run its example there."""
    page, needles, besides = EXTRAS[extra]
    venv.create(folder / extra, with_pip=True)
    python = folder / extra / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *(["--constraint", constraints] if constraints else [])]
    subprocess.run([*install, f"{wheel}[{extra}]", *besides], check=True)
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "KERAS_BACKEND": "jax", "TF_CPP_MIN_LOG_LEVEL": "3"}
    # In an empty folder, so that no file of the repository is found.
    empty = folder / f"empty-{extra}"
    empty.mkdir()
    subprocess.run([python, "-c", example(page, needles)], check=True, cwd=empty, env=environment, timeout=300)


def main(
    extras: Annotated[list[str] | None, typer.Argument(help="Extras to check. Defaults to all.")] = None,
    constraints: Annotated[Path | None, typer.Option(help="Versions to install, a file of pip's.")] = None,
) -> None:
    """Build the wheel, and check each extra."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
        subprocess.run(build, check=True)
        (wheel,) = folder.glob("*.whl")
        for extra in extras or EXTRAS:
            check(extra, wheel, constraints and constraints.resolve(), folder)
            typer.echo(f"{extra}: its example runs.")


if __name__ == "__main__":
    typer.run(main)
