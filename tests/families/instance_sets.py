"""All tiny pipelines by name: those whose denoisers every run of the tests builds, and the long tail."""

from collections.abc import Mapping
from typing import Any

from families import (
    instances,
    instances_b,
    instances_edit,
    instances_modular,
    instances_more,
    instances_new,
    instances_rest,
    instances_video,
)
from families.instances import Instance
from support.tiers import slow_except

QUICK: Mapping[str, Instance] = {
    **instances.INSTANCES,
    **instances_b.INSTANCES,
    **instances_modular.QUICK,
}
# their denoisers are on the meta device in quick tests
LONG_TAIL: Mapping[str, Instance] = {
    **instances_edit.INSTANCES,
    **instances_video.INSTANCES,
    **instances_modular.LONG_TAIL,
    **instances_more.INSTANCES,
    **instances_new.INSTANCES,
    **instances_rest.INSTANCES,
}
INSTANCES: Mapping[str, Instance] = {**QUICK, **LONG_TAIL}
# of these, whole pipelines run in every run of the tests, one of each structure: a UNet, single blocks, lists
# of images, a callback of the old kind, two denoisers of a video, an own denoiser class, a modular pipeline
DAILY = ("sd15", "flux", "z_image", "pixart", "wan22", "anima", "minimax_h3")
# what a test of whole pipelines is called with
NAMES: list[Any] = slow_except(DAILY, INSTANCES)
# denoisers whose files have the very names of another class of their family
NAMED_AS: Mapping[str, str] = {
    "chronoedit": "WanTransformer3DModel",
    "skyreels": "WanTransformer3DModel",
    "skyreels_i2v": "WanTransformer3DModel",
    "joyimage_edit_plus": "JoyImageEditTransformer3DModel",
}
# the same of their authors' names alone
ORIGINAL_NAMED_AS: Mapping[str, str] = {**NAMED_AS, "wan_animate_2": "WanTransformer3DModel"}
