"""LoRA files: read, matched to a model, applied to its float and INT8 layers.

From a file to a layer:

    find.py          a name or hub id -> the path of a file
    key_parsing.py   a key of the file -> component, module name, part of the adapter
    parse.py         the tensors of one module -> its adapter (adapters/; of OFT and BOFT build_oft.py)
    load.py          the two together: a file -> LoraFile
    module_names.py  module names as trainers write them -> modules of the model
    match.py         a stack of files -> which module gets which change
    float_merge.py   the changes of a float model -> its weights, and back
    apply.py         the changes of one INT8 layer -> its integers or a branch beside it, and back
    installed.py     what is on a model, and whose it is
    stack.py         LoraStack, which does all of this for a model

Around it: config.py holds the settings, modes.py chooses how an INT8 layer gets its LoRAs, and header_info.py
uses what a header tells before anything is loaded, with base_model.py (for which model), few_step.py (for how
many steps) and trigger_words.py.
"""
