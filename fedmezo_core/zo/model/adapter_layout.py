"""The files of an adapter in peft's layout."""

from __future__ import annotations

from typing import Final

CONFIG_FILE: Final = "adapter_config.json"
WEIGHTS_FILE: Final = "adapter_model.safetensors"
ADAPTER_FILES: Final = (CONFIG_FILE, WEIGHTS_FILE)
"""All of them; no other is ever read, sent, or taken from a coordinator."""
