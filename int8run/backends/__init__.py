"""Programs that run an INT8 layer, one module each. `base.Backend` says what a backend is.

To add one: write a frozen dataclass with `name`, `limits`, `pack_weight`, `quantize` and `linear` in a module
here, as `reference.py` does in its shortest form; name the class in `conf/backend/<name>.yaml`; and add that
file to the candidates in `conf/backend/auto.yaml` if `backend=auto` should time it. `tests/backends` then
runs all its comparisons on the new backend.
"""
