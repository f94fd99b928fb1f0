"""llama.cpp as a peer of bench/peers.py, through llama-cpp-python (`pip install llama-cpp-python gguf`).

A checkpoint in Qwen2-VL's layout becomes two GGUF files, text and vision. Its page ends as ours does: the last position
of the prompt, then latent tokens, one vector each; all other positions are computed without the LM head. To leave the
head, which ours does not have, out of single tokens as well, the file that is timed has a vocabulary of `FEW` tokens;
loading, memory and disk are those of the whole one.
"""

import ctypes
import json
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

FEW = 1024
FORMATS = ("Q8_0", "BF16", "Q4_K_M")
Arrays = Mapping[str, NDArray[np.float32]]

TEXT = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
VISION = {"attn.proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "norm1": "ln1", "norm2": "ln2"}
MERGER = {"ln_q": "v.post_ln", "mlp.0": "mm.0", "mlp.2": "mm.2"}


def text_tensors(weights: Arrays) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, array in weights.items():
        layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        part, _, kind = rest.rpartition(".")
        yield (f"blk.{layer}.{TEXT[part]}.{kind}" if layer else TEXT[rest]), array


def vision_tensors(weights: Arrays) -> Iterator[tuple[str, NDArray[np.float32]]]:
    for name, array in weights.items():
        if name == "patch_embed.proj.weight":
            yield from (("v.patch_embd.weight", array[:, :, 0]), ("v.patch_embd.weight.1", array[:, :, 1]))
        elif name.startswith("merger."):
            part, _, kind = name.removeprefix("merger.").rpartition(".")
            yield f"{MERGER[part]}.{kind}", array
        else:
            _, layer, rest = name.split(".", 2)
            part, _, kind = rest.rpartition(".")
            split = zip("qkv", np.split(array, 3), strict=True) if part == "attn.qkv" else ()
            yield from ((f"v.blk.{layer}.attn_{letter}.{kind}", each) for letter, each in split)
            if not split:
                yield f"v.blk.{layer}.{VISION[part]}.{kind}", array


def write(
    path: Path, kind: str, tensors: Iterator[tuple[str, NDArray[np.float32]]], fill: Callable[[Any], None]
) -> None:
    """A GGUF file whose matrices are in a format, the rest in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "clip" if "vision" in path.name else "qwen2vl")
    fill(writer)
    for name, array in tensors:
        matrix = array.ndim == 2 and array.shape[-1] % 32 == 0
        stored = gguf.GGMLQuantizationType[kind if matrix else "F16" if array.ndim == 4 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe_text(config: Mapping[str, Any], vocabulary: int, writer: Any) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(1e6)
    writer.add_rope_dimension_sections([*config["rope_parameters"]["mrope_section"], 0])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    names = ["<|endoftext|>", "<|vision_start|>", "<|vision_end|>", *map(chr, range(0x21, 0x7F)), "Ġ", "Ċ"]
    writer.add_token_list([*names, *(f"<{number}>" for number in range(len(names), vocabulary))])
    writer.add_token_types([3, 3, 3, *[1] * (vocabulary - 3)])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def describe_vision(config: Mapping[str, Any], image: Mapping[str, Any], writer: Any) -> None:
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen2vl_merger")
    writer.add_vision_projection_dim(config["hidden_size"])
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(config["patch_size"])
    writer.add_vision_embedding_length(config["embed_dim"])
    writer.add_vision_feed_forward_length(config["embed_dim"] * config["mlp_ratio"])
    writer.add_vision_block_count(config["depth"])
    writer.add_vision_head_count(config["num_heads"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    writer.add_vision_image_mean(image["image_mean"])
    writer.add_vision_image_std(image["image_std"])


def convert(checkpoint: Path, root: Path) -> dict[str, list[Path]]:
    """Of each format: the text file, that with few tokens, the vision file."""
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text())
    image = json.loads((checkpoint / "preprocessor_config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    sides = {
        side: {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        for side, prefix in (("text", "model.language_model."), ("vision", "model.visual."))
    }
    root.mkdir(parents=True, exist_ok=True)
    files = {kind: [root / f"{kind}-{part}.gguf" for part in ("text", "few", "vision")] for kind in FORMATS}
    for kind, (text, few, vision) in files.items():
        made_of = "BF16" if kind == "Q4_K_M" else kind
        few_of = {**sides["text"], "embed_tokens.weight": sides["text"]["embed_tokens.weight"][:FEW]}
        for path, given, size in ((text, sides["text"], config["text_config"]["vocab_size"]), (few, few_of, FEW)):
            if not path.exists():
                source = path.with_suffix(".tmp")
                write(source, made_of, text_tensors(given), partial(describe_text, config["text_config"], size))
                quantise(source, path) if kind == "Q4_K_M" else source.rename(path)
        if not vision.exists():
            stored = "Q8_0" if kind == "Q4_K_M" else kind
            write(
                vision,
                stored,
                vision_tensors(sides["vision"]),
                partial(describe_vision, config["vision_config"], image),
            )
    return files


def quantise(source: Path, out: Path) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters)) == 0
    source.unlink()


class Llama:
    """One format, ready to embed; `inputs`: ids of the prompt with one image token, the latent's id, the page."""

    def __init__(self, text: Path, vision: Path, threads: int, inputs: Mapping[str, Any]) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self.llama, self.mtmd, self.inputs = llama_cpp, mtmd_cpp, inputs
        start = time.perf_counter()
        llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(text).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 1024
        settings.n_threads = settings.n_threads_batch = threads
        settings.pooling_type, settings.flash_attn_type = 0, 1
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        options = mtmd_cpp.mtmd_context_params_default()
        options.use_gpu, options.n_threads, options.warmup, options.flash_attn_type = False, threads, False, 1
        options.image_max_tokens, options.image_min_tokens = 4096, 4
        self.vision = mtmd_cpp.mtmd_init_from_file(str(vision).encode(), self.model, options)
        if not (self.model and self.context and self.vision):
            raise SystemExit(f"llama.cpp cannot open {text} and {vision}")
        self.ready: float = time.perf_counter() - start
        self.batch = llama_cpp.llama_batch_init(1024, 0, 1)
        self.width = llama_cpp.llama_model_n_embd(self.model)

    def decode(self, ids: list[int], first: int, outputs: int) -> None:
        """Tokens from a position on; the last `outputs` give embeddings."""
        self.llama.llama_set_embeddings(self.context, bool(outputs))
        batch = self.batch
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, first + i, 1, 0
            batch.logits[i] = i >= len(ids) - outputs
        if status := self.llama.llama_decode(self.context, batch):
            raise SystemExit(f"llama_decode gave {status}")

    def states(self, count: int) -> NDArray[np.float32]:
        rows = [self.llama.llama_get_embeddings_ith(self.context, i - count) for i in range(count)]
        return np.stack([np.ctypeslib.as_array(row, (self.width,)).copy() for row in rows])

    def chunk(self, image: Image.Image) -> tuple[Any, Any]:
        mtmd, pixels = self.mtmd, image.tobytes()
        bitmap = mtmd.mtmd_bitmap_init(
            image.width, image.height, (ctypes.c_uint8 * len(pixels)).from_buffer_copy(pixels)
        )
        chunks, marker = mtmd.mtmd_input_chunks_init(), mtmd.mtmd_default_marker()
        text = mtmd.mtmd_input_text(marker, len(marker), False, True)
        bitmaps = (mtmd.mtmd_bitmap_p_ctypes * 1)(bitmap)
        if status := mtmd.mtmd_tokenize(self.vision, chunks, ctypes.byref(text), bitmaps, 1):
            raise SystemExit(f"mtmd_tokenize gave {status}")
        found = [mtmd.mtmd_input_chunks_get(chunks, i) for i in range(mtmd.mtmd_input_chunks_size(chunks))]
        (images,) = [chunk for chunk in found if mtmd.mtmd_input_chunk_get_type(chunk) == 1]
        mtmd.mtmd_bitmap_free(bitmap)
        return chunks, images

    def prompt(self, image: Image.Image, tail: int) -> tuple[int, dict[str, float]]:
        """Runs prompt and `tail` latents; the position after them, and seconds of vision and text."""
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.context), True)
        ids, at = self.inputs["ids"], self.inputs["ids"].index(self.inputs["image_id"])
        start = time.perf_counter()
        chunks, chunk = self.chunk(image)
        if self.mtmd.mtmd_encode_chunk(self.vision, chunk):
            raise SystemExit("mtmd_encode_chunk failed")
        seen = time.perf_counter()
        self.decode(ids[:at], 0, 0)
        past = ctypes.c_int32()
        rows = self.mtmd.mtmd_get_output_embd(self.vision)
        none = self.mtmd.mtmd_helper_post_decode_callback()
        arguments = self.vision, self.context, chunk, rows, at, 0, 1024, ctypes.byref(past), none, None
        if self.mtmd.mtmd_helper_decode_image_chunk(*arguments):
            raise SystemExit("mtmd_helper_decode_image_chunk failed")
        rest = [*ids[at + 1 :], *[self.inputs["latent_id"]] * tail]
        self.decode(rest, past.value, tail + 1)
        self.mtmd.mtmd_input_chunks_free(chunks)
        return past.value + len(rest), {"vision": seen - start, "text": time.perf_counter() - seen}

    def page(self) -> tuple[dict[str, float], NDArray[np.float32]]:
        start = time.perf_counter()
        _, seconds = self.prompt(self.inputs["image"], self.inputs["vectors"] - 1)
        states = self.states(self.inputs["vectors"])
        found = states / np.linalg.norm(states, axis=1, keepdims=True)
        return {"page": time.perf_counter() - start, **seconds}, found

    def step(self) -> float:
        """Seconds of a latent after the page's prompt."""
        position, _ = self.prompt(self.inputs["image"], 1)
        start = time.perf_counter()
        for number in range(self.inputs["vectors"]):
            self.decode([self.inputs["latent_id"]], position + number, 1)
            self.states(1)
        return (time.perf_counter() - start) / int(self.inputs["vectors"])

    def opened(self) -> float:
        return self.ready


def errors_only(level: int, text: bytes, data: object) -> None:
    if level >= 4:
        print(text.decode().rstrip())


quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(errors_only)
