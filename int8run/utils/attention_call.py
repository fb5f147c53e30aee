"""One attention to compute: what a model asks torch for, and what is handed to whatever answers in its place.

Backends, models and layers speak of the same call, so it stands below them. It knows nothing of INT8.
"""

from typing import NamedTuple

from torch import Tensor


class AttentionCall(NamedTuple):
    """The arguments of one `F.scaled_dot_product_attention`, by torch's names and in its order.

    Args:
        query: [B, Hq, Lq, D].
        key: [B, Hkv, Lk, D].
        value: [B, Hkv, Lk, Dv].
        attn_mask: bool (True: attend) or float, which is added to the scores.
        dropout_p: share of the probabilities that are set to 0 at random.
        is_causal: row i attends to keys 0 .. i only.
        scale: of the scores; None: 1 / sqrt(D).
        enable_gqa: whether heads of the query share heads of key and value.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False
