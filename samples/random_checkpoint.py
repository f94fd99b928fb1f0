"""Random checkpoints in the layout of the released ones (CausalEmbed, ColPali, ColQwen), from tiny to the public size.

    python samples/random_checkpoint.py OUT --backbone qwen2-vl --head causal --size tiny

Files and key names follow what `save_pretrained` of transformers 4.57 writes for these models. The `2b` rows are the
shapes published for Qwen/Qwen2-VL-2B-Instruct, Qwen/Qwen2.5-VL-3B-Instruct and google/paligemma-3b-pt-448 (257216 rows
and one for <|latent|>). Weights are streamed to disk; the whole model is never in memory.
"""

import json
import struct
import sys
import zlib
from collections.abc import Iterator
from itertools import accumulate
from math import isqrt, prod, sqrt
from pathlib import Path
from string import Template
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

Backbone = Literal["qwen2-vl", "qwen2.5-vl", "paligemma"]
Head = Literal["causal", "colbert"]
Size = Literal["tiny", "mid", "2b"]
Dtype = Literal["float32", "bfloat16", "float16"]
Shapes = dict[str, tuple[int, ...]]

CORPUS = Path(__file__).resolve().parents[1] / "LICENSE"  # any English text will do
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # in safetensors
DTYPES = {name: np.dtype(name) for name in ("float32", "float16")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
CHUNK = 1 << 22  # values made at a time: 16 MiB even for a 2 GB embedding table

# Text columns, vision columns (v_), and the most visual tokens a page may take.
COLUMNS = "hidden layers heads kv_heads mlp vocab head_dim v_hidden v_layers v_heads v_mlp tokens"
SIZES: dict[tuple[Backbone, Size], tuple[int, ...]] = {
    ("qwen2-vl", "tiny"): (96, 3, 6, 2, 160, 600, 16, 48, 3, 3, 96, 96),
    ("qwen2-vl", "mid"): (896, 12, 14, 2, 3456, 2000, 64, 640, 12, 10, 2560, 768),
    ("qwen2-vl", "2b"): (1536, 28, 12, 2, 8960, 151936, 128, 1280, 32, 16, 5120, 768),
    ("qwen2.5-vl", "tiny"): (96, 3, 6, 2, 160, 600, 16, 48, 3, 3, 96, 96),
    ("qwen2.5-vl", "mid"): (896, 12, 14, 2, 3456, 2000, 64, 640, 12, 10, 1728, 768),
    ("qwen2.5-vl", "2b"): (2048, 36, 16, 2, 11008, 151936, 128, 1280, 32, 16, 3420, 768),
    ("paligemma", "tiny"): (96, 3, 6, 1, 160, 600, 16, 48, 3, 3, 96, 64),
    ("paligemma", "mid"): (896, 12, 14, 1, 3456, 2000, 64, 640, 14, 10, 2560, 256),
    ("paligemma", "2b"): (2048, 18, 8, 1, 16384, 257217, 256, 1152, 27, 16, 4304, 1024),
}
FULL_ATTENTION: dict[Size, list[int]] = {"tiny": [1], "mid": [2, 5, 8, 11], "2b": [7, 15, 23, 31]}  # Qwen2.5-VL blocks

# Shapes: modules -> weight [out, in...]; `+bias` adds [out]; `@` stands for every layer.
GEMMA = {
    "norm @input_layernorm @post_attention_layernorm": "hidden",
    "embed_tokens": "vocab hidden",
    "@self_attn.q_proj": "heads*head_dim hidden",
    "@self_attn.k_proj @self_attn.v_proj": "kv_heads*head_dim hidden",
    "@self_attn.o_proj": "hidden heads*head_dim",
    "@mlp.gate_proj @mlp.up_proj": "mlp hidden",
    "@mlp.down_proj": "hidden mlp",
}
QWEN = GEMMA | {
    names: f"{GEMMA[names]} +bias" for names in ("@self_attn.q_proj", "@self_attn.k_proj @self_attn.v_proj")
}
QWEN2_VISUAL = {
    "patch_embed.proj": "v_hidden 3 2 14 14",
    "@attn.qkv": "3*v_hidden v_hidden +bias",
    "@attn.proj": "v_hidden v_hidden +bias",
    "@norm1 @norm2 merger.ln_q": "v_hidden +bias",
    "@mlp.fc1": "v_mlp v_hidden +bias",
    "@mlp.fc2": "v_hidden v_mlp +bias",
    "merger.mlp.0": "4*v_hidden 4*v_hidden +bias",
    "merger.mlp.2": "hidden 4*v_hidden +bias",
}
QWEN2_5_VISUAL = {name: shape for name, shape in QWEN2_VISUAL.items() if "fc" not in name} | {
    "@norm1 @norm2 merger.ln_q": "v_hidden",
    "@mlp.gate_proj @mlp.up_proj": "v_mlp v_hidden +bias",
    "@mlp.down_proj": "v_hidden v_mlp +bias",
}
SIGLIP = {
    "embeddings.patch_embedding": "v_hidden 3 14 14 +bias",
    "embeddings.position_embedding": "tokens v_hidden",
    "@layer_norm1 @layer_norm2 post_layernorm": "v_hidden +bias",
    "@self_attn.q_proj @self_attn.k_proj @self_attn.v_proj @self_attn.out_proj": "v_hidden v_hidden +bias",
    "@mlp.fc1": "v_mlp v_hidden +bias",
    "@mlp.fc2": "v_hidden v_mlp +bias",
}
GEMMA_PREFIX = "model.language_model.model."
PARTS: dict[Backbone | Head, list[tuple[str, str, str, dict[str, str]]]] = {  # prefix, `@`, number of layers, modules
    "qwen2-vl": [("model.", "layers", "layers", QWEN), ("visual.", "blocks", "v_layers", QWEN2_VISUAL)],
    "qwen2.5-vl": [("model.", "layers", "layers", QWEN), ("visual.", "blocks", "v_layers", QWEN2_5_VISUAL)],
    "paligemma": [
        (GEMMA_PREFIX, "layers", "layers", GEMMA),
        ("model.vision_tower.vision_model.", "encoder.layers", "v_layers", SIGLIP),
        ("model.multi_modal_projector.", "", "layers", {"linear": "hidden v_hidden +bias"}),
    ],
    "causal": [],
    "colbert": [("", "", "layers", {"custom_text_proj": "128 hidden +bias"})],
}

# What the JSON files say; $names are filled in from `template_values`.
NAMES = {"causal": "Causal", "colbert": "Col", "qwen2-vl": "Qwen2", "qwen2.5-vl": "Qwen2_5", "paligemma": "Pali"}
QWEN_TOKENS = "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|>"
TOKENS: dict[Backbone | Head, list[str]] = {
    "qwen2-vl": f"{QWEN_TOKENS} <|video_pad|>".split(),
    "qwen2.5-vl": f"{QWEN_TOKENS} <|video_pad|>".split(),
    "paligemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
    "causal": ["<|latent|>"],
    "colbert": [],
}
QWEN_CONFIG = """{"dtype": "$dtype", "image_token_id": $image_pad, "video_token_id": $video_pad,
"vision_start_token_id": $vision_start, "vision_end_token_id": $vision_end, "transformers_version": "4.57.3",
"tie_word_embeddings": true, "text_config": {"architectures": ["$architecture"], "hidden_size": $hidden,
 "num_hidden_layers": $layers, "num_attention_heads": $heads, "num_key_value_heads": $kv_heads,
 "intermediate_size": $mlp, "vocab_size": $vocab, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
 "rope_scaling": {"mrope_section": $mrope, "rope_type": "default", "type": "default"}, "layer_types": $layer_types,
 "max_position_embeddings": 32768, "sliding_window": null, "use_sliding_window": false, "model_type": "${family}_text"},
"model_type": "$family", "vision_config": {"model_type": "$family", "depth": $v_layers, "num_heads": $v_heads,
 "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, """
QWEN2_VISION = '"embed_dim": $v_hidden, "hidden_size": $hidden, "mlp_ratio": $mlp_ratio, "hidden_act": "quick_gelu"}}'
QWEN2_5_VISION = """"hidden_size": $v_hidden, "out_hidden_size": $hidden, "intermediate_size": $v_mlp,
 "hidden_act": "silu", "fullatt_block_indexes": $full_attention, "window_size": 112, "tokens_per_second": 4}}"""
GEMMA_CONFIG = """{"architectures": ["$architecture"], "model_type": "paligemma", "dtype": "$dtype",
"bos_token_id": $bos, "eos_token_id": $eos, "pad_token_id": $pad, "image_token_index": $image,
"hidden_size": $hidden, "projection_dim": $hidden, "tie_word_embeddings": true, "transformers_version": "4.57.3",
"text_config": {"model_type": "gemma", "hidden_size": $hidden, "num_hidden_layers": $layers,
 "num_attention_heads": $heads, "num_key_value_heads": $kv_heads, "head_dim": $head_dim, "intermediate_size": $mlp,
 "vocab_size": $vocab, "num_image_tokens": $tokens, "hidden_act": "gelu_pytorch_tanh",
 "rms_norm_eps": 1e-6, "rope_theta": 1e4, "attention_bias": false, "max_position_embeddings": 8192,
 "bos_token_id": $bos, "eos_token_id": $eos, "pad_token_id": $pad},
"vision_config": {"model_type": "siglip_vision_model", "hidden_size": $v_hidden, "num_hidden_layers": $v_layers,
 "num_attention_heads": $v_heads, "intermediate_size": $v_mlp, "projection_dim": $hidden, "image_size": $image_size,
 "patch_size": 14, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh",
 "vision_use_head": false}}"""
IMAGES = """{"do_normalize": true, "do_rescale": true, "do_resize": true, "rescale_factor": 0.00392156862745098,
"resample": 3, """
QWEN_IMAGES = """"image_processor_type": "Qwen2VLImageProcessor", "do_convert_rgb": true, "patch_size": 14,
"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
"max_pixels": $max_pixels, "min_pixels": 3136, "merge_size": 2, "temporal_patch_size": 2,
"size": {"longest_edge": $max_pixels, "shortest_edge": 3136}}"""
GEMMA_IMAGES = """"image_processor_type": "SiglipImageProcessor", "do_convert_rgb": null, "image_seq_length": $tokens,
"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": $image_size, "width": $image_size}}"""
ROLES = '{"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false, '
QWEN_ROLES = '"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
GEMMA_ROLES = '"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}'
FILES: dict[Backbone, tuple[str, str, str]] = {  # tokenizer_config, preprocessor_config, config
    "qwen2-vl": (ROLES + QWEN_ROLES, IMAGES + QWEN_IMAGES, QWEN_CONFIG + QWEN2_VISION),
    "qwen2.5-vl": (ROLES + QWEN_ROLES, IMAGES + QWEN_IMAGES, QWEN_CONFIG + QWEN2_5_VISION),
    "paligemma": (ROLES + GEMMA_ROLES, IMAGES + GEMMA_IMAGES, GEMMA_CONFIG),
}
# Beyond unit gain: sharper attention keeps different pages apart, and positions must show beside patches.
GAINS = {"q_proj": 1.75, "k_proj": 1.75, "qkv": 1.25, "position_embedding": 10.0}


def tensor_shapes(backbone: Backbone, head: Head, size: Size) -> Shapes:
    """Name -> shape of every tensor of the checkpoint, sorted by name."""
    dims = dict(zip(COLUMNS.split(), SIZES[backbone, size], strict=True))
    shapes: Shapes = {}
    for prefix, layer, count, modules in PARTS[backbone] + PARTS[head]:
        for names, words in modules.items():
            copies = [names.replace("@", f"{layer}.{n}.").split() for n in range(dims[count])]
            for name in {prefix + name for copy in copies for name in copy}:
                shapes |= module_shapes(name, words, dims)
    return dict(sorted(shapes.items()))


def module_shapes(name: str, words: str, dims: dict[str, int]) -> Shapes:
    """The weight of one module and, after `+bias`, its bias; a word is a dimension or a product of some."""
    factors = [word.split("*") for word in words.removesuffix(" +bias").split()]
    shape = tuple(prod(dims[part] if part in dims else int(part) for part in parts) for parts in factors)
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if "+bias" in words else {})


def moments(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation of a tensor: deviation 1/sqrt(inputs) for weights, so that values stay sane at any depth."""
    if name.endswith(".bias"):
        return 0.0, 0.05  # not zero: a bias that gets lost must show
    if len(shape) == 1:
        return float(not name.startswith(GEMMA_PREFIX)), 0.05  # Gemma multiplies by 1 + weight
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return 0.0, gain / sqrt(prod(shape[1:]))


def random_bytes(name: str, shape: tuple[int, ...], dtype: Dtype, seed: int) -> Iterator[bytes]:
    """One tensor in chunks; its values depend on its name and the seed, not on the other tensors."""
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    mean, deviation = moments(name, shape)
    for start in range(0, prod(shape), CHUNK):
        values = generator.standard_normal(min(CHUNK, prod(shape) - start), dtype=np.float32)
        yield (np.float32(mean) + np.float32(deviation) * values).astype(DTYPES[dtype]).tobytes()


def write_safetensors(path: Path, shapes: Shapes, dtype: Dtype, seed: int) -> None:
    """Header length (8 bytes, little-endian), JSON header, raw bytes; save_file would want every tensor in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            file.writelines(random_bytes(name, shape, dtype, seed))


def write_weights(out: Path, shapes: Shapes, dtype: Dtype, seed: int, shard_bytes: int) -> None:
    """model.safetensors, or numbered shards and the index; a new shard starts once `shard_bytes` are passed."""
    starts = list(accumulate((prod(shape) * DTYPES[dtype].itemsize for shape in shapes.values()), initial=0))
    total = starts.pop()
    cuts = [start // shard_bytes for start in starts]
    numbers = {cut: n for n, cut in enumerate(dict.fromkeys(cuts), 1)}
    pattern = "model-{:05}-of-{:05}.safetensors" if total > shard_bytes else "model.safetensors"
    weight_map = {name: pattern.format(numbers[cut], len(numbers)) for name, cut in zip(shapes, cuts, strict=True)}
    if total > shard_bytes:
        write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    for file in dict.fromkeys(weight_map.values()):
        write_safetensors(out / file, {name: shapes[name] for name in shapes if weight_map[name] == file}, dtype, seed)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def make_tokenizer(rows: int, special: list[str]) -> Tokenizer:
    """Byte-level BPE of at most `rows` tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=rows - len(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS.read_text(encoding="utf-8").splitlines(), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def template_values(backbone: Backbone, head: Head, size: Size, tokenizer: Tokenizer) -> dict[str, object]:
    """What the $names stand for; special tokens go by their bare names ($image_pad, $bos)."""
    dims = dict(zip(COLUMNS.split(), SIZES[backbone, size], strict=True))
    ids = {token.strip("<|>"): tokenizer.token_to_id(token) for token in TOKENS[backbone]}
    derived = {
        "architecture": NAMES[head] + NAMES[backbone],
        "family": backbone.replace("-", "_").replace(".", "_"),
        "mrope": [dims["head_dim"] * share // 16 for share in (2, 3, 3)],  # pairs for time, height, width
        "layer_types": json.dumps(["full_attention"] * dims["layers"]),
        "mlp_ratio": dims["v_mlp"] // dims["v_hidden"],
        "full_attention": FULL_ATTENTION[size],
        "max_pixels": dims["tokens"] * 28 * 28,
        "image_size": isqrt(dims["tokens"]) * 14,
    }
    return {**dims, **ids, **derived}


def make_checkpoint(
    out: Annotated[Path, typer.Argument(help="A new or empty directory.")],
    backbone: Annotated[Backbone, typer.Option()],
    head: Annotated[Head, typer.Option(help="causal: latent slots; colbert: one 128-d vector per position.")],
    size: Annotated[Size, typer.Option(help="2b: the public shape (3B for qwen2.5-vl and paligemma).")],
    *,
    dtype: Dtype = "float32",
    seed: int = 0,
    shard_bytes: int = 2 * 2**30,
) -> None:
    """Write a random checkpoint; config.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new directory")
    write_weights(out, tensor_shapes(backbone, head, size), dtype, seed, shard_bytes)
    tokenizer = make_tokenizer(SIZES[backbone, size][5], TOKENS[backbone] + TOKENS[head])
    tokenizer.save(str(out / "tokenizer.json"))
    values = template_values(backbone, head, size, tokenizer) | {"dtype": dtype}
    for name, template in zip(("tokenizer_config", "preprocessor_config", "config"), FILES[backbone], strict=True):
        write_json(out / f"{name}.json", json.loads(Template(template).substitute(values)))


if __name__ == "__main__":
    try:
        typer.run(make_checkpoint)
    except FileExistsError as error:
        sys.exit(str(error))
