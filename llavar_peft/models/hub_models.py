"""The folders that settings name, for modules of this package: see ``weights.io.hub_folders``."""

from __future__ import annotations

from llavar_peft.weights.io.hub_folders import cached_folder, download, is_hub_name, resolve_folder

__all__ = ["cached_folder", "download", "is_hub_name", "resolve_folder"]
