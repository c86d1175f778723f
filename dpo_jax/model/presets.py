"""Shapes of decoders by name: small ones to try things with, and published ones."""

import dataclasses

from dpo_jax.model.config import DecoderConfig, Kind, Llama3Scaling, Rope

LLAMA_3_1 = Llama3Scaling(
    factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_max_positions=8192
)

PRESETS: dict[str, DecoderConfig] = {
    # For tests.
    "tiny": DecoderConfig(
        vocabulary_size=512,
        width=64,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        hidden=128,
        max_positions=1024,
        tied_head=True,
    ),
    # To try a real tokenizer of 50 thousand tokens on a CPU: 3,293,504 parameters.
    "tiny-50k": DecoderConfig(
        vocabulary_size=50_304,
        width=64,
        layers=2,
        heads=4,
        key_value_heads=2,
        head_dim=16,
        hidden=128,
        max_positions=2048,
        tied_head=True,
    ),
    # For the built-in task: 541,536, 1,082,496 and 5,082,368 parameters.
    "reviews-500k": DecoderConfig(
        vocabulary_size=1024,
        width=96,
        layers=4,
        heads=3,
        key_value_heads=3,
        head_dim=32,
        hidden=256,
        max_positions=1024,
        tied_head=True,
    ),
    "reviews-1m": DecoderConfig(
        vocabulary_size=1024,
        width=128,
        layers=4,
        heads=4,
        key_value_heads=4,
        head_dim=32,
        hidden=448,
        max_positions=1024,
        tied_head=True,
    ),
    "reviews-5m": DecoderConfig(
        vocabulary_size=1024,
        width=256,
        layers=6,
        heads=4,
        key_value_heads=4,
        head_dim=64,
        hidden=704,
        max_positions=1024,
        tied_head=True,
    ),
    # The stories models' shapes with a vocabulary that GPT-NeoX's tokenizer fits in: 20,463,264 and
    # 123,587,328 parameters, of which 5,975,712 and 84,953,856 are not the embedding.
    "llama-15m": DecoderConfig(
        vocabulary_size=50_304,
        width=288,
        layers=6,
        heads=6,
        key_value_heads=6,
        head_dim=48,
        hidden=768,
        max_positions=2048,
        tied_head=True,
    ),
    "llama-110m": DecoderConfig(
        vocabulary_size=50_304,
        width=768,
        layers=12,
        heads=12,
        key_value_heads=12,
        head_dim=64,
        hidden=2048,
        max_positions=2048,
        tied_head=True,
    ),
    # Published shapes.
    "llama-3.2-1b": DecoderConfig(
        vocabulary_size=128_256,
        width=2048,
        layers=16,
        heads=32,
        key_value_heads=8,
        head_dim=64,
        hidden=8192,
        max_positions=131_072,
        block=(Kind(rope=Rope(500_000.0, dataclasses.replace(LLAMA_3_1, factor=32.0))),),
        tied_head=True,
    ),
    "llama-3.1-8b": DecoderConfig(
        vocabulary_size=128_256,
        width=4096,
        layers=32,
        heads=32,
        key_value_heads=8,
        head_dim=128,
        hidden=14_336,
        max_positions=131_072,
        block=(Kind(rope=Rope(500_000.0, LLAMA_3_1)),),
    ),
    "mistral-7b": DecoderConfig(
        vocabulary_size=32_000,
        width=4096,
        layers=32,
        heads=32,
        key_value_heads=8,
        head_dim=128,
        hidden=14_336,
        max_positions=32_768,
        family="mistral",
        block=(Kind(window=4096),),
    ),
}
