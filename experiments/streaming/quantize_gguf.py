"""A GGUF denoiser with the shapes of FLUX.1-dev, quantized to ConvRot INT8 from file to file.

    python experiments/streaming/quantize_gguf.py OUT [--type Q8_0 --doubles 19 --singles 38 --heads 24]

The file has the authors' names and random blocks with scales of 2e-4; norms and biases are F32, as
converters have them. `int8run task=quantize` is a process of its own whose resident memory is sampled every
20 ms. Rows of every attention output are then dequantized by llama.cpp's library, rotated and rounded by the
definition, and compared.
"""

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent))

from make_flux import CONFIG, list_entries
from measure import INT8RUN, evict_files, watch_process

from int8run.models.original_names import to_original
from int8run.models.tensor_part import join_shapes
from int8run.outlier.convrot import ConvRot
from int8run.quant.rounding import AbsMax
from int8run.utils.hardware import get_device_name

# where a block has its float16 scales
SCALE_PLACES = {"Q8_0": (0,), "Q6_K": (208,), "Q5_K": (0, 2), "Q4_K": (0, 2), "Q4_0": (0,)}
SCALE = 2e-4
CHECKED_ROWS = 4
BLOCKS = 2**16  # that are drawn; each tensor enters them at another place


def draw_blocks(kind: str) -> np.ndarray:
    """Random blocks of a type: uint8 [blocks, bytes]."""
    _, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = np.random.default_rng(0).integers(0, 256, (BLOCKS, nbytes), dtype=np.uint8)
    for place in SCALE_PLACES[kind]:
        blocks[:, place : place + 2] = np.array([SCALE], np.float16).view(np.uint8)
    return blocks


def write_file(path: Path, config: dict[str, object], kind: str) -> int:
    """Write the file. Returns how many tensors are blocks."""
    shapes = {name: shape for name, _, shape in list_entries(config)}
    writer = gguf.GGUFWriter(path, "flux")
    chosen = gguf.GGMLQuantizationType[kind]
    numbers, nbytes = gguf.GGML_QUANT_SIZES[chosen]
    blocks = draw_blocks(kind)
    planned: list[tuple[int, bool]] = []
    for key, parts in to_original(shapes, "FluxTransformer2DModel").items():
        shape = join_shapes(parts, shapes)
        assert shape is not None
        count = int(np.prod(shape))
        is_blocks = len(shape) == 2 and shape[1] % numbers == 0
        if is_blocks:
            stored = (shape[0], shape[1] // numbers * nbytes)
            writer.add_tensor_info(key, stored, np.dtype(np.uint8), count // numbers * nbytes, chosen)
        else:
            writer.add_tensor_info(key, shape, np.dtype(np.float32), 4 * count)
        planned.append((count, is_blocks))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for start, (count, is_blocks) in enumerate(planned):
        if is_blocks:
            places = (np.arange(count // numbers) + 4099 * start) % BLOCKS
            writer.write_tensor_data(blocks[places])
        else:
            writer.write_tensor_data(np.full(count, 0.02, np.float32))
    writer.close()
    return sum(is_blocks for _, is_blocks in planned)


def check_rows(source: Path, target: Path) -> int:
    """Compare rows of attention outputs with the definition. Returns the number of layers."""
    reader = gguf.GGUFReader(source)
    compared = 0
    with safe_open(target, "pt") as made:
        for tensor in reader.tensors:
            if not tensor.name.endswith("img_attn.proj.weight"):
                continue
            data = np.ascontiguousarray(tensor.data[-CHECKED_ROWS:])
            weight = torch.from_numpy(gguf.quants.dequantize(data, tensor.tensor_type).copy())
            transform = ConvRot().fit(torch.ones(1, weight.shape[1]), None)
            expected = AbsMax().round_weight(transform.transform_weight(weight), None)
            found = made.get_slice(tensor.name)[-CHECKED_ROWS:]
            scale = made.get_slice(f"{tensor.name}_scale")[-CHECKED_ROWS:]
            # another order of the additions in a rotation moves a tie by one
            assert (found.int() - expected.qdata.int()).abs().max() <= 1, tensor.name
            assert torch.allclose(scale, expected.scale, rtol=1e-5), tensor.name
            compared += 1
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", choices=SCALE_PLACES, default="Q8_0")
    parser.add_argument("--doubles", type=int, default=CONFIG["num_layers"], help="double blocks")
    parser.add_argument("--singles", type=int, default=CONFIG["num_single_layers"], help="single blocks")
    parser.add_argument(
        "--heads", type=int, default=CONFIG["num_attention_heads"], help="of 128 columns each"
    )
    arguments = parser.parse_args()
    config = {
        **CONFIG,
        "num_layers": arguments.doubles,
        "num_single_layers": arguments.singles,
        "num_attention_heads": arguments.heads,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    source, target = arguments.out / "flux.gguf", arguments.out / "int8.safetensors"
    num_blocks = write_file(source, config, arguments.type)
    evict_files([source])
    watched = watch_process(
        [
            *INT8RUN,
            "task=quantize",
            f"model.location={source}",
            f"save={target}",
            "outlier=convrot",
            "tracker=none",
            "progress=false",
            f"hydra.run.dir={arguments.out / 'job'}",
        ]
    )
    metrics = json.loads((arguments.out / "job" / "metrics.json").read_text())["metrics"]
    compared = check_rows(source, target)
    size = source.stat().st_size
    print(f"{get_device_name(torch.device('cpu'))}, torch {torch.__version__}")
    print("| type | tensors in blocks | read | written | seconds | peak RSS | INT8 layers | compared |")
    print("|---|---|---|---|---|---|---|---|")
    print(
        f"| {arguments.type} | {num_blocks} | {size / 1e6:.0f} MB | {target.stat().st_size / 1e6:.0f} MB "
        f"| {watched['seconds']:.1f} | {watched['peak_rss'] / 1e6:.0f} MB "
        f"| {metrics['quant/layers_int8']:.0f} | {compared} |"
    )


if __name__ == "__main__":
    main()
