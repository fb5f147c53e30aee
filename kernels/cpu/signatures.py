"""The C functions of the libraries of `library.py`: what ctypes must know of their arguments."""

import ctypes

# types of arguments
POINTER, INT64, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float


def declare_functions(layer: str, functions: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of a library.

    Args:
        layer: `linear`, `conv` or `attention`.
        functions: the loaded library.
    """
    declarations = {
        "linear": declare_linear_functions,
        "conv": declare_conv_functions,
        "attention": declare_attention_functions,
    }
    declarations[layer](functions)


def declare_linear_functions(functions: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of linear.h."""
    functions.int8run_quantize.argtypes = [
        *(POINTER, INT, INT64, INT64, INT64),  # x, dtype, M, K, stride
        *(POINTER, INT64, INT, INT64),  # factor, rotation, sylvester, gelu_from
        *(POINTER, POINTER, INT),  # q, scale, threads
    ]
    functions.int8run_linear.argtypes = [
        *(POINTER, POINTER, INT64, INT64, INT64),  # q, x_scale, M, K, N
        *(POINTER, POINTER, POINTER),  # packed, w_scale, bias
        *(INT64, POINTER, POINTER, POINTER, POINTER),  # rank, down, down_scale, up, up_scale
        *(POINTER, INT, INT),  # y, dtype, threads
    ]
    functions.int8run_grouped_linear.argtypes = [
        *(POINTER, POINTER, INT64, INT64, INT64),  # q, x_scale, M, K, N
        *(POINTER, POINTER, INT, POINTER, INT, INT64),  # codes, scale, has_byte_scales, levels, bits, group
        *(POINTER, POINTER),  # w_scale, bias
        *(INT64, POINTER, POINTER, POINTER, POINTER),  # rank, down, down_scale, up, up_scale
        *(POINTER, INT, INT),  # y, dtype, threads
    ]
    for function in ("int8run_quantize", "int8run_linear", "int8run_grouped_linear"):
        getattr(functions, function).restype = INT
    functions.int8run_rms_norm.argtypes = [
        *(POINTER, POINTER, INT, INT64, INT64, FLOAT),  # x, weight, dtype, M, K, eps
        *(POINTER, INT),  # y, threads
    ]
    functions.int8run_rotary.argtypes = [
        *(POINTER, POINTER, POINTER, INT, INT64, INT64, INT64, INT64),  # x, cos, sin, dtype, and four sizes
        *(POINTER, INT),  # y, threads
    ]
    functions.int8run_rms_norm.restype = functions.int8run_rotary.restype = None


def declare_conv_functions(functions: ctypes.CDLL) -> None:
    """Tell ctypes the signatures of conv.h."""
    functions.int8run_group_norm.argtypes = [
        *(POINTER, POINTER),  # a PixelsInput and a NormStruct of pixels.py
        *(POINTER, POINTER, INT),  # factor, shift, threads
    ]
    functions.int8run_quantize_pixels.argtypes = [
        POINTER,  # a PixelsInput
        *(POINTER, POINTER, POINTER, INT),  # q, scale, center, threads
    ]
    functions.int8run_conv.argtypes = [
        *(POINTER, POINTER, POINTER, POINTER, INT64, INT64),  # geometry, q, scale, center, C, N
        *(POINTER, POINTER, POINTER),  # packed, w_scale, bias
        *(POINTER, INT64, INT, INT),  # y, y_stride, dtype, threads
    ]
    for function in ("int8run_group_norm", "int8run_quantize_pixels", "int8run_conv"):
        getattr(functions, function).restype = INT


def declare_attention_functions(functions: ctypes.CDLL) -> None:
    """Tell ctypes the signature of attention.h."""
    functions.int8run_attention.argtypes = [POINTER]  # an Attention of attention.py
    functions.int8run_attention.restype = INT
