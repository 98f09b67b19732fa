"""FedMeZO as a job of NVIDIA FLARE: `FedMezoRecipe` builds one; the rest is what it is made of.

Importing anything of this package needs NVFlare in a tested version. What computes with a model
runs at the sites alone, so that neither the server nor this import needs torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedmezo_core.program import check_tested

if TYPE_CHECKING:
    from fedmezo_nvflare.job_recipe import FedMezoRecipe as FedMezoRecipe
    from fedmezo_nvflare.round_controller import FedMezoController as FedMezoController
    from fedmezo_nvflare.scalar_privacy import ScalarPrivacy as ScalarPrivacy

check_tested("nvflare", "2.9", "2.10", "nvflare")

_HOMES = {
    "FedMezoController": "round_controller",
    "FedMezoRecipe": "job_recipe",
    "ScalarPrivacy": "scalar_privacy",
}
__all__ = ["FedMezoController", "FedMezoRecipe", "ScalarPrivacy"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
