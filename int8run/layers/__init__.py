"""Layers that take the place of a Linear or an Embedding, the plan that says which do, and putting them in.

`int8_linear` is the INT8 layer; `plan` is decided before it; `assemble` and `fusion` put it into a model.
`weight_only` and `block_int8_linear` are for the formats of text encoders.
"""
