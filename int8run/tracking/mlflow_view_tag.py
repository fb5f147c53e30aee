"""A view of MLflow's page as the tag of an experiment that keeps it, and the link that opens it.

`mlflow_tracker.py` writes and links it. What a view shows is built by `mlflow_dashboard.py`.
"""

import base64
import json
import time
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from int8run.tracking.setting_names import hash_text, replace_unusual

if TYPE_CHECKING:
    from mlflow import MlflowClient

VIEW_TAG_PREFIX = "mlflow.sharedViewState."
MAX_KEY_LENGTH = 150  # characters of a view's name
MAX_TAG_LENGTH = 5000  # characters; this MLflow takes 20,000, older servers no more than this


def make_view_key(sweep: str) -> str:
    """The name of a sweep's view, which becomes a part of a tag's name and of a link.

    Sweeps of earlier versions are called like their folders, with characters that MLflow refuses there: they
    are replaced, and a hash keeps two such names apart.
    """
    plain = replace_unusual(sweep)
    if plain == sweep and len(sweep) <= MAX_KEY_LENGTH:
        return sweep
    return f"{plain[:MAX_KEY_LENGTH]}-{hash_text(sweep)[:8]}"


def write_view(client: "MlflowClient", experiment_id: str, key: str, state: Mapping[str, Any]) -> int:
    """Keep a view in an experiment, in place of one with the same key.

    Args:
        client: of the store.
        experiment_id: whose tag it becomes.
        key: the view's name, also in its link: a sweep's id.
        state: what the page shows.

    Returns:
        How many image keys were left out because the view would have been too long.
    """
    value, num_left_out = encode_view(state, key)
    client.set_experiment_tag(experiment_id, VIEW_TAG_PREFIX + key, value)
    return num_left_out


def encode_view(state: Mapping[str, Any], name: str) -> tuple[str, int]:
    """The value of a view's tag.

    Returns:
        At most MAX_TAG_LENGTH characters, and how many image keys were left out, from the end, to get there.
    """
    now = int(time.time() * 1000)
    num_images = count_grid_images(state)
    # Found by halving: ten thousand images cost fourteen tries.
    num_fitting = bisect_right(
        range(num_images + 1), MAX_TAG_LENGTH, key=lambda num_kept: len(pack_view(state, name, now, num_kept))
    )
    num_kept = max(0, num_fitting - 1)
    return pack_view(state, name, now, num_kept), num_images - num_kept


def pack_view(state: Mapping[str, Any], name: str, now: int, num_images: int) -> str:
    """The value of a tag with the first images alone; `now` is in milliseconds."""
    text = json.dumps(limit_images(state, num_images), separators=(",", ":"))
    packed = "deflate;" + base64.b64encode(zlib.compress(text.encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": now, "updatedAt": now, "state": packed})


def count_grid_images(state: Mapping[str, Any]) -> int:
    """Rows of the image grid."""
    grids = [chart for chart in state["compareRunCharts"] if chart["type"] == "IMAGE"]
    return max((len(grid["imageKeys"]) for grid in grids), default=0)


def limit_images(state: Mapping[str, Any], num_images: int) -> dict[str, Any]:
    """The state with the first image keys alone, and without an image grid where none is left."""
    charts = []
    for chart in state["compareRunCharts"]:
        if chart["type"] != "IMAGE":
            charts.append(chart)
            continue
        image_keys = chart["imageKeys"][:num_images]
        if image_keys:
            charts.append({**chart, "imageKeys": image_keys})
    return {**state, "compareRunCharts": charts}


def decode_view(value: str) -> dict[str, Any]:
    """The state in a tag's value, as MLflow's page reads it."""
    packed = json.loads(value)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


def build_view_link(address: str, experiment_id: str, key: str, *, charts: bool = True) -> str:
    """The page that opens with a view.

    Args:
        address: of the MLflow server.
        experiment_id: that has the view.
        key: of the view.
        charts: whether to open its charts, rather than its table.
    """
    experiment_link = build_experiment_link(address, experiment_id)
    mode = "CHART" if charts else "TABLE"
    return f"{experiment_link}&viewStateShareKey={quote(key, safe='')}&compareRunsMode={mode}"


def build_experiment_link(address: str, experiment_id: str) -> str:
    """The page of an experiment, without a view.

    Args:
        address: of the MLflow server.
        experiment_id: to show.
    """
    # Without the type of workflow the page may open on its side for language models, which has no metrics.
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
