"""Post-training quantization of a whole model: calibrate, quantize each Linear, search a mixed precision.

`quantize` has the loops over the Linears; `calibration` samples their inputs; `layer_costs` times what a
method costs; `mixed_precision` finds the layers that stay float.
"""
