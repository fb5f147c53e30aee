"""What pipelines call their denoisers, from `denoiser_components.yaml`.

Asked for by all that looks for denoisers in a pipeline or its folder. It must work without diffusers.
"""

from pathlib import Path

import yaml

COMPONENTS_FILE = Path(__file__).with_name("denoiser_components.yaml")
_FACTS = yaml.safe_load(COMPONENTS_FILE.read_text(encoding="utf-8"))
# in the order in which a pipeline calls them
DENOISER_COMPONENTS: tuple[str, ...] = tuple(_FACTS)
# denoisers of a pipeline with several, to which a LoRA is applied only if it says so
COMPONENTS_WITHOUT_LORAS = frozenset(name for name, facts in _FACTS.items() if not facts["loras"])
