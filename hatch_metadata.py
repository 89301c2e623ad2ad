"""Metadata of the package that depends on the public address of the repository, for the build by Hatchling.

The address is in `pyproject.toml`, at `tool.lookahead-optim.address`. The project's URLs are made of it. So are the
links in the README: in the repository they are relative, and on the page of a package index they would lead nowhere. As
long as there is no address, there are no such links.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; Hatchling brings it.
    import tomli as tomllib

LINK = re.compile(r"(!?)\[([^]]*)]\((?!https?://|#)([^)]+)\)")


def with_absolute_links(text, address):
    """Return Markdown whose links lead to the files at an address. Without one a link becomes its text."""

    def absolute(link):
        is_image, label, path = link.groups()
        if not address:
            return "" if is_image else label
        return f"{is_image}[{label}]({address}/{'raw' if is_image else 'blob'}/main/{path})"

    return LINK.sub(absolute, text)


def urls(address):
    """Return the project's URLs."""
    if not address:
        return {}
    pages = {"Documentation": "docs/index.md", "Changelog": "CHANGELOG.md"}
    return {
        "Repository": address,
        "Issues": f"{address}/issues",
        **{name: f"{address}/blob/main/{path}" for name, path in pages.items()},
    }


class Metadata(MetadataHookInterface):
    """Adds `readme` and `urls`."""

    def update(self, metadata):
        """Add them to the metadata."""
        root = Path(self.root)
        address = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["lookahead-optim"]["address"]
        text = with_absolute_links((root / "README.md").read_text(), address)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = urls(address)
