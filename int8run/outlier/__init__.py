"""Outlier methods, one module each. `base.OutlierMethod` says what a method is.

To add one: write a frozen dataclass with `name`, `needs_calibration`, `unsupported_reason`, `get_settings`
and `fit` in a module here, as `none.py` does in its shortest form; name the class in
`conf/outlier/<name>.yaml`; and add it to the candidates in `conf/outlier/auto.yaml` if `outlier=auto`
should try it. `tests/outlier` then checks the new method: before rounding, the transformed product must
equal the plain one.
"""
