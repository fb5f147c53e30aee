"""The tiny FLUX pipeline with fresh weights: what its parts are and how large."""

import json
import string
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

TOKENS = 16  # caption length of both text encoders, end tokens included
TEXT_WIDTH = 256
# words that never occur in a name but must not fall to pieces: the styles' trigger words
TRIGGERS = {"ink": "ink style", "gloss": "gloss style"}


def clip_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE of CLIP's kind, learned from the captions."""
    blank = CLIPTokenizer()
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    specials = ["<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=specials,
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TOKENS)


def t5_tokenizer(captions: list[str]) -> T5Tokenizer:
    """A unigram tokenizer of T5's kind, learned from the captions."""
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    unigram.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=2000,
        special_tokens=specials,
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list(string.printable.strip()),
    )
    unigram.train_from_iterator(captions, trainer)
    learned = json.loads(unigram.to_str())["model"]["vocab"]
    return T5Tokenizer(vocab=[tuple(v) for v in learned], extra_ids=0, model_max_length=TOKENS)


def make_tokenizers(captions: list[str], work: Path) -> tuple[CLIPTokenizer, T5Tokenizer]:
    """Both tokenizers, learned once and kept in `<work>/tokenizers`.

    Ties are broken differently at every learning.
    """
    folder = work / "tokenizers"
    if not folder.exists():
        words = captions + [f"drawing, {trigger}" for trigger in TRIGGERS.values()] * 8
        clip_tokenizer(words).save_pretrained(folder / "tokenizer")
        t5_tokenizer(words).save_pretrained(folder / "tokenizer_2")
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    return clip, t5


def make_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """The pooled text encoder, with fresh weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """The text encoder whose states the transformer attends to, with fresh weights."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=64,
        d_ff=2 * TEXT_WIDTH,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config)


def make_transformer(latent_channels: int) -> FluxTransformer2DModel:
    """A FLUX transformer 384 wide (6 heads of 64) with 1 double and 4 single blocks, 15.0 M parameters.

    Wide enough for INT8 to pay.
    """
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * latent_channels,
        num_layers=1,
        num_single_layers=4,
        attention_head_dim=64,
        num_attention_heads=6,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )


def build_pipeline(captions: list[str], vae: AutoencoderKL, work: Path, seed: int = 0) -> FluxPipeline:
    """A FluxPipeline with fresh text encoders and transformer around a trained VAE: 64 image tokens.

    Args:
        captions: the text that the tokenizers are learned from, where `work` has none yet.
        vae: for images of 64x64.
        work: the folder that keeps the tokenizers.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = make_tokenizers(captions, work)
    # the order of the three decides which random numbers each gets
    clip = make_clip(tokenizer)
    t5 = make_t5(tokenizer_2)
    transformer = make_transformer(vae.config.latent_channels)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=clip,
        tokenizer=tokenizer,
        text_encoder_2=t5,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


def collect_trained_parts(pipe: FluxPipeline) -> nn.ModuleDict:
    """The parts that the base model's training changes: all but the VAE."""
    parts = {name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2")}
    return nn.ModuleDict(parts)


def encode_captions(
    pipe: FluxPipeline, captions: list[str], *, grad: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Captions -> (T5 states [B, TOKENS, C], CLIP pooled [B, C], text ids [TOKENS, 3])."""
    with torch.set_grad_enabled(grad):
        return pipe.encode_prompt(prompt=captions, device=pipe.transformer.device, max_sequence_length=TOKENS)
