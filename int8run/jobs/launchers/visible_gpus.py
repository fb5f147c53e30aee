"""Which GPUs a process may use, by the drivers' own environment variables.

The joblib launcher reads them for `gpus=all` and sets them for its workers. They name GPUs and change nothing
else of a run, so this is the one place outside the command line that reads the environment.
"""

import os

# of ROCm alone, which is read first there; of CUDA and ROCm; of Intel's driver
HIP_VARIABLE, CUDA_VARIABLE, XPU_VARIABLE = "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"
DEVICE_VARIABLES = (HIP_VARIABLE, CUDA_VARIABLE, XPU_VARIABLE)


def list_visible_gpus(kind: str, count: int) -> list[int | str]:
    """How the driver names the GPUs that this process may use; torch numbers them from 0, whichever they are.

    Args:
        kind: `cuda` (ROCm, too) or `xpu`.
        count: how many torch sees.
    """
    variables = (XPU_VARIABLE,) if kind == "xpu" else (HIP_VARIABLE, CUDA_VARIABLE)
    for variable in variables:
        value = os.environ.get(variable, "")
        if value:
            names = [name.strip() for name in value.split(",")]
            return list(names[:count])
    return list(range(count))
