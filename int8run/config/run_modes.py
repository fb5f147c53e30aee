"""The words of `compile=` and `offload=` that more than one module has to know.

`run_spec` checks the settings by them, `pipeline.compile` and `pipeline.offload` act on them.
"""

REDUCE_OVERHEAD = "reduce-overhead"  # torch.compile's own name for CUDA graphs
GROUP_STREAM = "group_stream"  # diffusers' group offloading with streams
OFFLOAD_MODES = ("none", "model", "group", GROUP_STREAM)
