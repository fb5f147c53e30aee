"""Which layers of a VAE stay float, and which of its convolutions are known: data of `vae_layers.yaml`.

`pipeline.vae` asks before it quantizes. No code knows the class of a VAE.
"""

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from int8run.models.family import DeferredNorm, IgnoreRule

VAE_LAYERS_FILE = Path(__file__).with_name("vae_layers.yaml")


@dataclass(frozen=True)
class VaeLayers:
    """What is known about the layers of VAEs.

    Args:
        ignore: rules for layers that stay float; the first that matches counts.
        padding_convolutions: subclasses of convolutions that change their input and nothing else.
        deferred_norms: norms and activations that convolutions can compute.
    """

    ignore: Sequence[IgnoreRule]
    padding_convolutions: Sequence[str]
    deferred_norms: Sequence[DeferredNorm]

    def find_skip_reason(self, layer: str) -> str | None:
        """Why a layer stays float; None: it becomes INT8."""
        for rule in self.ignore:
            if fnmatch.fnmatchcase(layer, rule.pattern):
                return rule.reason
        return None


@functools.cache
def load_vae_layers() -> VaeLayers:
    """Read the file."""
    facts = yaml.safe_load(VAE_LAYERS_FILE.read_text(encoding="utf-8"))
    return VaeLayers(
        ignore=tuple(IgnoreRule(**rule) for rule in facts["ignore"]),
        padding_convolutions=tuple(facts["padding_convolutions"]),
        deferred_norms=tuple(DeferredNorm(**rule) for rule in facts["deferred_norms"]),
    )
