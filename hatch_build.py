"""Build step: a wheel carries the data and notebooks that a checkout has beside the library."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = ("data/neurons", "data/paper", "data/results", "data/zoo", "notebooks")


class Files(BuildHookInterface):
    """Puts the folders into vitregs/_files, where `vitregs.paths.ROOT` looks outside a checkout."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folders; an editable install reads the checkout itself."""
        if version != "editable":
            build_data["force_include"].update({name: f"vitregs/_files/{name}" for name in CARRIED})
