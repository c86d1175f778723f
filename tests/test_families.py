"""Every family against transformers' own models, which write the files and read ours."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from dpo_jax import generate
from dpo_jax.model import decoder, families, hf_files, weights
from dpo_jax.model.attention import Ids
from dpo_jax.model.config import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL_HEADS = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **values}}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 16}
GEMMA = {**SIZES, "head_dim": 8}
SLIDING = {"use_sliding_window": True, "sliding_window": 5}

# model type and changes to HF's defaults; together they use every feature of the decoder
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, "head_dim": 8}),
    "llama tied, biases": (
        "llama",
        {**SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama, llama3 rope": ("llama", {**SIZES, **rope("llama3", **LLAMA3, **ORIGINAL)}),
    "llama, linear rope": ("llama", {**SIZES, **rope("linear", factor=3.0)}),
    "mistral": ("mistral", {**SIZES, "sliding_window": 5}),
    "qwen2": ("qwen2", {**SIZES, "tie_word_embeddings": True}),
    "qwen2, late window": (
        "qwen2",
        {**SIZES, **SLIDING, "num_hidden_layers": 3, "max_window_layers": 1},
    ),
    "qwen2, yarn": ("qwen2", {**SIZES, **rope("yarn", factor=4.0, **ORIGINAL)}),
    "qwen3": ("qwen3", {**SIZES, "head_dim": 8}),
    "gemma": ("gemma", {**GEMMA, "num_key_value_heads": 1}),
    "gemma2": (
        "gemma2",
        {
            **GEMMA,
            "num_hidden_layers": 3,
            "sliding_window": 5,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (
        "gemma3_text",
        {
            **GEMMA,
            "num_hidden_layers": 14,
            "sliding_window": 5,
            "query_pre_attn_scalar": 5,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "phi3": (
        "phi3",
        {**SIZES, "hidden_size": 32, "sliding_window": 5, "partial_rotary_factor": 0.5},
    ),
    "olmo2": ("olmo2", SIZES),
    "smollm3": ("smollm3", {**SIZES, "num_hidden_layers": 6}),
    "smollm3, window": ("smollm3", {**SIZES, **SLIDING, "num_hidden_layers": 4}),
    "gpt2": (
        "gpt2",
        {"vocab_size": 40, "n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 4}
        | {name: None for name in ("bos_token_id", "eos_token_id")},
    ),
    "gpt_neox": ("gpt_neox", {**ALL_HEADS, "hidden_size": 32}),
    "gpt_neox serial": (
        "gpt_neox",
        {**ALL_HEADS, "use_parallel_residual": False, "hidden_act": "gelu_new"}
        | rope("default", partial_rotary_factor=1.0),
    ),
    "opt": ("opt", {**ALL_HEADS, "ffn_dim": 32, "word_embed_proj_dim": 24}),
    "phi": ("phi", {**SIZES, "hidden_size": 32}),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4}),
    "qwen3_moe": (
        "qwen3_moe",
        {**SIZES, "head_dim": 8, "num_experts": 5, "moe_intermediate_size": 16}
        | {"num_experts_per_tok": 3},
    ),
    "qwen3_moe normalised, window": (
        "qwen3_moe",
        {**SIZES, **SLIDING, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16}
        | {"num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
}


class Tried(NamedTuple):
    """A model of transformers, and the same as read from its files."""

    model: Any
    folder: Path
    config: DecoderConfig
    params: dict


@pytest.fixture(scope="module", params=TINY)
def tried(request, tmp_path_factory) -> Tried:
    torch = pytest.importorskip("torch", reason="parity needs torch")
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model_type, values = TINY[request.param]
    config = transformers.AutoConfig.for_model(model_type, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        # Norms' scales and biases are 1 and 0 at first, and the rest too small to tell mistakes.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.normal_(std=0.3)
    folder = tmp_path_factory.mktemp("model")
    model.eval().save_pretrained(folder)
    return Tried(model, folder, *weights.load(folder))


def draw_tokens(*shape: int) -> np.ndarray:
    # 0 is what pads.
    return np.random.default_rng(0).integers(1, 40, shape, np.int32)


def torch_logits(model: Any, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    torch = pytest.importorskip("torch")
    mask = np.ones_like(tokens) if mask is None else mask
    with torch.no_grad():
        return model(torch.tensor(tokens).long(), attention_mask=torch.tensor(mask)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config: DecoderConfig, params: dict, tokens, ids: Ids):
    hidden: Any = decoder.Decoder(config).apply({"params": params}, tokens, ids)
    return decoder.logits(hidden, decoder.head(params, config))


def assert_near(found, expected) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def test_every_family_is_among_those_tried():
    tried = {model_type for model_type, _ in TINY.values()}
    assert tried == {family.model_type for family in families.FAMILIES.values()}


@pytest.mark.parity
def test_logits_of_rows_padded_on_the_right_are_those_of_transformers(tried):
    tokens = draw_tokens(3, 24)
    position = np.tile(np.arange(24, dtype=np.int32), (3, 1))
    real = (position < np.array([[24], [9], [17]])).astype(np.int32)
    expected = torch_logits(tried.model, tokens, real)
    ids = Ids(real, np.zeros_like(real), position)
    found = np.asarray(our_logits(tried.config, tried.params, tokens, ids))
    assert_near(found[real == 1], expected[real == 1])
    assert np.isfinite(found).all()


@pytest.mark.parity
def test_logits_of_packed_prefix_shared_rows_are_those_of_each_completion_alone(tried):
    # [P x 7, a x 6, b x 9 | Q x 3, c x 5 | pad x 2]
    lengths = [(1, 0, 7, 0), (1, 1, 6, 7), (1, 2, 9, 7), (2, 0, 3, 0), (2, 1, 5, 3), (0, 0, 2, 0)]
    columns = [(e, b, start + i) for e, b, n, start in lengths for i in range(n)]
    example, branch, position = np.array(columns, np.int32).T[:, None]
    tokens = draw_tokens(*example.shape)
    found = our_logits(tried.config, tried.params, tokens, Ids(example, branch, position))[0]
    prompt, other = list(range(7)), list(range(22, 25))
    for places in (
        prompt + list(range(7, 13)),
        prompt + list(range(13, 22)),
        other + list(range(25, 30)),
    ):
        assert_near(found[np.array(places)], torch_logits(tried.model, tokens[:, places])[0])


@pytest.mark.parity
def test_a_saved_folder_loads_in_transformers_whole_and_bit_equal(tried, tmp_path):
    import transformers

    weights.save(tmp_path, tried.config, tried.params)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(again) is type(tried.model)
    expected = tried.model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)
    tokens = draw_tokens(1, 24)
    assert_near(torch_logits(again, tokens), torch_logits(tried.model, tokens))
    names = safetensors.numpy.load_file(tmp_path / "model.safetensors").keys()
    assert names == safetensors.numpy.load_file(tried.folder / "model.safetensors").keys()


@pytest.mark.parity
def test_a_folder_saved_in_several_files_loads_in_transformers_whole_and_bit_equal(tried, tmp_path):
    import transformers

    weights.save(tmp_path / "ours", tried.config, tried.params, max_file_bytes=4_000)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    expected = tried.model.state_dict()
    for name, tensor in again.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), expected[name].numpy(), err_msg=name)
    # transformers' own files of it: another order, but an index of the same form and content
    tried.model.save_pretrained(tmp_path / "theirs", max_shard_size=4_000)
    ours, theirs = (
        json.loads((tmp_path / name / hf_files.INDEX).read_text()) for name in ("ours", "theirs")
    )
    assert ours["metadata"] == theirs["metadata"]
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    jax.tree.map(np.testing.assert_array_equal, weights.load(tmp_path / "theirs")[1], tried.params)


@pytest.mark.parity
def test_a_folder_saved_in_bfloat16_loads_in_transformers_in_bfloat16(tried, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    weights.save(tmp_path, tried.config, tried.params, jax.numpy.bfloat16)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    expected = tried.model.state_dict()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@pytest.mark.parity
def test_greedy_tokens_after_uneven_prompts_are_those_of_transformers(tried):
    torch = pytest.importorskip("torch")
    prompts = [draw_tokens(n).tolist() for n in (11, 3, 7)]
    found = generate.complete(
        decoder.Decoder(tried.config),
        tried.params,
        prompts,
        jax.random.key(0),
        select=generate.greedy,
        max_tokens=32,
        stop_ids=[tried.config.vocabulary_size],
        batch_size=3,
    )
    for prompt, ours in zip(prompts, found, strict=True):
        tokens = torch.tensor([prompt])
        expected = tried.model.generate(
            tokens, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert ours == expected[0, len(prompt) :].tolist()
