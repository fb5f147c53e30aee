"""Small checkpoints of every kind that is read, written byte for byte by the formats' published formulas.

Nothing of int8run is used in them. Codes and scales are random, so that nothing is rounded; the real weight
is computed in float64. `MISTAKES` are files with one thing wrong, each with the words that the refusal must
contain.
"""

from checkpoints.drafts.blocks import BLOCK_DRAFTS
from checkpoints.drafts.draft import Draft, Mistake
from checkpoints.drafts.floats import FLOAT_DRAFTS
from checkpoints.drafts.fp8 import FP8_DRAFTS
from checkpoints.drafts.grouped import GROUPED_DRAFTS
from checkpoints.drafts.int8 import INT8_DRAFTS
from checkpoints.drafts.transformed import TRANSFORMED_DRAFTS
from checkpoints.mistakes.blocks import BLOCK_MISTAKES
from checkpoints.mistakes.foreign import FOREIGN_MISTAKES
from checkpoints.mistakes.grouped import GROUPED_MISTAKES
from checkpoints.mistakes.markers import MARKER_MISTAKES
from checkpoints.mistakes.scales import SCALE_MISTAKES
from checkpoints.mistakes.transforms import TRANSFORM_MISTAKES

DRAFTS: dict[str, Draft] = {
    **INT8_DRAFTS,
    **TRANSFORMED_DRAFTS,
    **FP8_DRAFTS,
    **BLOCK_DRAFTS,
    **GROUPED_DRAFTS,
    **FLOAT_DRAFTS,
}
MISTAKES: dict[str, Mistake] = {
    **SCALE_MISTAKES,
    **MARKER_MISTAKES,
    **TRANSFORM_MISTAKES,
    **BLOCK_MISTAKES,
    **GROUPED_MISTAKES,
    **FOREIGN_MISTAKES,
}
