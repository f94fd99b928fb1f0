"""From pages and queries to vectors.

Letters: K vectors, D length of a state, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.graph_tensors import grows, state_tensors
from cembed.runtime.bundle.manifest import Side, SideName
from cembed.runtime.bundle.vectors import Vectors
from cembed.runtime.embed.explain import (
    CachedPage,
    ChangedPage,
    Explanation,
    Reading,
    affordable,
    by_hiding,
    by_similarity,
    check_query,
)
from cembed.runtime.embed.inputs import (
    ImageLike,
    InputBuilder,
    PageOptions,
    PagePrompt,
    Prompt,
    TokensRead,
    check_length,
)
from cembed.runtime.embed.kv_cache import StaticKVCache
from cembed.runtime.embed.latent import LatentState, Loop, StateMemory
from cembed.runtime.embed.pooling import normalise, pool_states, pool_tokens
from cembed.runtime.embed.positions import slot_positions
from cembed.runtime.embed.state_files import StateSchema, open_state
from cembed.runtime.engines import tuned
from cembed.runtime.engines.memory import longest_row
from cembed.runtime.engines.providers import open_sessions
from cembed.runtime.engines.session import CPU, Array, EngineSettings, Session
from cembed.runtime.errors import CembedError

Decode = Literal["single-pass", "loop"]
DEFAULT_STATE_MEMORY = 1 << 30


@dataclass(frozen=True)
class Budget:
    """What a caller may choose for each call; see `Embedder.embed_images`."""

    num_vectors: int | None = None
    dim: int | None = None
    decode: Decode | None = None
    pool_factor: int = 1


FULL = Budget()
AS_BUNDLED = PageOptions()


def check_slots(side: Side, budget: Budget) -> None:
    """Raises CembedError for what a side cannot do with its latent slots, or without any."""
    if side.num_vectors is None:
        if budget.num_vectors is not None or budget.decode == "loop":
            raise CembedError("this bundle makes one vector for every token: there is no budget and no loop")
    elif budget.pool_factor != 1:
        raise CembedError("pool_factor is for bundles that make one vector for every token")
    if budget.pool_factor < 1:
        raise CembedError(f"pool_factor is {budget.pool_factor}: give 1 or more")
    if budget.decode == "single-pass" and side.slots == "feedback":
        raise CembedError("slots that are fed back cannot run in a single pass: use decode='loop'")


class Embedder:
    """Embeds with one bundle. Every page and query runs alone, so batch mates cannot change its vectors.

    Methods may be called from several threads. Graphs are loaded when first needed: queries never load the vision one.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: EngineSettings,
        pages: PageOptions = AS_BUNDLED,
        state_memory: int = DEFAULT_STATE_MEMORY,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._options = (engine, pages, state_memory)
        self._open = open_sessions(bundle, engine)
        self._sessions: dict[str, Session] = {}
        self._replaced = False
        self._lock, self._opening = threading.Lock(), dict[str, threading.Lock]()
        self.inputs = InputBuilder(bundle, pages, self.session)
        self._slots = bundle.table(self.manifest.slot_embeddings) if self.manifest.slot_embeddings else None
        self._states = StateMemory(state_memory)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        prepack: bool | None = True,
        max_visual_tokens: int | None = None,
        skip_blank: bool | None = None,
        state_memory: int = DEFAULT_STATE_MEMORY,
        verify: bool = True,
        trusted: str | Path | None = None,
    ) -> Embedder:
        """Open a bundle.

        `providers` are `onnxruntime-bf16` (attention in bfloat16), `onnxruntime-exact` (int8 weights meet activations
        of eight bits on x86 without VNNI, too), `tensorrt` (see `cembed build-engine`), `openvino`, `openvino-bf16` and
        ONNX Runtime's execution providers, in order of preference, one for a single graph as `vision=openvino`; None is
        what `cembed tune` chose for this bundle and machine, else ONNX Runtime on the CPU;
        `threads` is per operator, None for all cores or what was tuned; `prepack=False` leaves the weights
        memory-mapped, which opens at once and is a little slower per page, but twice as slow per step of the loop with
        int8 weights and fifteen times or more with int4; `prepack=None` maps those only that this costs little, for a
        process of a few queries; `max_visual_tokens` lowers the bundle's own limit, for speed; `skip_blank` leaves
        blank paper out before the vision graph, also for speed (see `kept` and docs/numbers.md; None is as the bundle
        says); `state_memory` bounds, in bytes, what the states of `start` hold together; `verify=False` skips the
        sha256 of files, and then a signature says nothing about them; `trusted` is a public key (a PEM file), or a
        folder of them: one of these must have signed the bundle, beside what the device wants (docs/security.md).
        An Embedder can be pickled: it is opened again where it is unpickled.
        Raises CembedError: no bundle, a damaged one, one whose signature will not do, a provider that is not available,
        `skip_blank` where the vision graph takes whole pages only.
        """
        bundle = Bundle(path, verify=verify, trusted=trusted)
        found = tuned.read(bundle.root, bundle.hash) if providers is None else None
        chosen, known = (found.providers, found.threads) if found else (tuple(providers or CPU), None)
        engine = EngineSettings(chosen, threads or known, prepack)
        return cls(bundle, engine, PageOptions(max_visual_tokens, skip_blank), state_memory)

    @property
    def dim(self) -> int:
        """Length of a document's vector at the full budget."""
        return self.manifest.document.vector_dim(self.manifest.dim)

    @property
    def tokens_read(self) -> TokensRead:
        """Visual tokens of all pages so far: fewer were `read` than there are where blank paper is skipped."""
        return self.inputs.tokens_read

    def kept(self, image: ImageLike) -> NDArray[np.bool_]:
        """Which visual tokens of a page are read, bool [rows, columns]; or which tiles, where it comes in tiles: the
        whole page in one more always is. All are unless blank paper is skipped. Raises CembedError: no image."""
        return self.inputs.kept(image)

    def embed_images(
        self,
        images: Iterable[ImageLike],
        num_vectors: int | None = None,
        *,
        dim: int | None = None,
        decode: Decode | None = None,
        pool_factor: int = 1,
    ) -> list[Vectors]:
        """Vectors float32 [num_vectors, dim] of each page, L2-normalised; one row where the bundle pools them.

        `images` may be a generator: one page at a time is held. `num_vectors` is the budget, by default the bundle's: n
        vectors are the first n of a larger budget and cost no more than n. `dim` keeps the first components and
        normalises again (Matryoshka, arXiv 2205.13147). `decode` is `single-pass`, or `loop`, one slot at a time; by
        default the single pass where slots are not fed back. `pool_factor` p merges the vectors of `all_tokens` heads
        to a p-th of them by hierarchical clustering (arXiv 2409.14683).
        Raises CembedError: no image, a budget the bundle does not have, NaN from the model.
        """
        budget = Budget(num_vectors, dim, decode, pool_factor)
        return [self.embed_image(image, budget) for image in items(images, "images")]

    def embed_queries(
        self,
        texts: Iterable[str],
        num_vectors: int | None = None,
        *,
        dim: int | None = None,
        decode: Decode | None = None,
    ) -> list[Vectors]:
        """Vectors float32 [num_vectors, dim] of each query; arguments and errors as in `embed_images`."""
        budget = Budget(num_vectors, dim, decode)
        return [self.embed_query(text, budget) for text in items(texts, "queries")]

    def embed_image(self, image: ImageLike, budget: Budget = FULL) -> Vectors:
        """One page of `embed_images`."""
        self.check(self.manifest.document, budget)
        return self.embed_prompt("document", self.inputs.document(image), budget)

    def embed_query(self, text: str, budget: Budget = FULL) -> Vectors:
        """One query of `embed_queries`."""
        self.check(self.manifest.query, budget)
        return self.embed_prompt("query", self.inputs.query(text), budget)

    def explain(
        self, image: ImageLike, query: str | Vectors, budget: Budget = FULL, *, passes: int | None = None
    ) -> Explanation:
        """Where a page matches a query: a text, or its vectors float32 [Q, dim].

        The score that is explained is that of the page at `budget`. Without slots heat comes from the tokens' own
        similarities, before `pool_factor`. With them parts of the page are hidden, one in each of `passes`, at least 4:
        more of them show more; by default 6 to 24, such that they cost half as much as the page's text, or next to
        nothing. Where the text graph keeps no keys and values of the page, or others beside them, or attends both ways,
        a pass costs as much as the page's text.
        Raises CembedError: as `embed_image` and `embed_query` do, vectors of another shape or type, too few passes.
        """
        side = self.manifest.document
        num_vectors = self.check(side, budget)
        if isinstance(query, np.ndarray):
            asked = check_query(query, budget.dim or side.vector_dim(self.manifest.dim, budget.num_vectors))
        else:
            asked = self.embed_query(query, Budget(dim=budget.dim))
        page = self.inputs.page(image)
        if num_vectors is None and side.pooling != "last":
            states = self._single_pass(side, page.prompt, None)
            vectors = self._finish(side, states, budget.dim, "text")
            tokens = (vectors if side.pooling == "none" else states[:, : budget.dim])[page.places]
            return by_similarity(page, asked, pool_tokens(vectors, budget.pool_factor), tokens)
        reading = self._reading(page, budget, num_vectors)
        return by_hiding(page, asked, reading, self._passes(page, reading) if passes is None else passes)

    def _reading(self, page: PagePrompt, budget: Budget, num_vectors: int | None) -> Reading:
        side, step = self.manifest.document, self.manifest.graphs.get("text_step")
        caches = step is not None and all(grows(tensor.name) for tensor in state_tensors(step))
        if num_vectors is None or not caches or self.manifest.prompt_attention != "causal":
            return ChangedPage(lambda prompt: self.embed_prompt("document", prompt, budget), page)
        capacity = len(page.prompt) + side.num_slots(num_vectors)
        check_length(self.manifest, capacity)
        loop = replace(self._loop("document"), finish=lambda states: self._finish(side, states, budget.dim))
        return CachedPage(loop, self._cache(capacity), page, num_vectors)

    def _passes(self, page: PagePrompt, reading: Reading) -> int:
        graph = next(self.manifest.graphs[name] for name in ("text", "text_step") if name in self.manifest.graphs)
        weights = sum(self.manifest.files[file].size for file in graph.data)
        return affordable(len(page.prompt), reading.positions, weights)

    def start(self, image: ImageLike, max_vectors: int | None = None) -> LatentState:
        """Runs a page's prompt; the state's `extend(n)` gives n vectors, and later more without running it again.

        `max_vectors` sizes the cache: by default twice the bundle's budget, at least 64, or all learned slots.
        Raises CembedError: a bundle without slots, too many states for `state_memory`.
        """
        return self._start("document", self.inputs.document(image), max_vectors)

    def start_query(self, text: str, max_vectors: int | None = None) -> LatentState:
        """`start` for a query."""
        return self._start("query", self.inputs.query(text), max_vectors)

    def resume(self, path: str | Path, max_vectors: int | None = None) -> LatentState:
        """A state that `LatentState.save` wrote.

        One of a page whose blank paper was skipped needs an embedder that skips it.
        Raises CembedError: damaged, of another bundle or version of cembed, too many states for `state_memory`.
        """
        around = len(self.inputs.prompter.document(self.manifest.document.prompt, 0))
        longest = longest_row(self.inputs.image) if self.inputs.image.skip_blank else None
        saved = open_state(Path(path), StateSchema(self.bundle.hash, self.manifest, around, longest))
        more = max(0, self._max_vectors(saved.schema.side(saved.side), max_vectors) - saved.vectors)
        check_length(self.manifest, saved.positions + more)
        state = self._states.add(LatentState(self._loop(saved.side), self._cache(saved.positions + more)))
        return state.restore(saved.read(), saved.positions)

    def check(self, side: Side, budget: Budget) -> int | None:
        """The number of vectors to make, None for all positions. Raises CembedError for what the bundle cannot do."""
        if budget.decode not in (None, "single-pass", "loop"):
            raise CembedError(f"unknown decode {budget.decode!r}: cembed has single-pass, loop")
        length = side.vector_dim(self.manifest.dim, budget.num_vectors)
        if budget.dim is not None and not 1 <= budget.dim <= length:
            raise CembedError(f"dim is {budget.dim}: this bundle's vectors have {length}")
        check_slots(side, budget)
        if budget.num_vectors is not None:
            side.check_budget(budget.num_vectors)
            check_length(self.manifest, budget.num_vectors)
        return budget.num_vectors or side.num_vectors

    def prepare(self, name: SideName, budget: Budget = FULL) -> None:
        """Verifies and opens the graphs that pages ("document") or queries ("query") of this budget need.

        They are opened when needed without it, too. Raises CembedError: one is damaged, or cannot be loaded.
        """
        side = self.manifest.side(name)
        self.check(side, budget)
        graphs = ["vision"] if name == "document" else []
        graphs += ["text_step" if self._loops(side, budget) else "text"]
        self.bundle.start(file for graph in graphs for file in self.manifest.graphs[graph].data)
        with ThreadPoolExecutor(len(graphs), "open") as pool:  # each is packed by one thread
            others = [pool.submit(self.session, graph) for graph in graphs[1:]]
            self.session(graphs[0])
            for opened in others:
                opened.result()
        self.inputs.tokens.verify()

    def session(self, name: str) -> Session:
        """The session of a graph, loaded on first use."""
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:
            session = self._sessions.get(name) or self._open(name)
            self._sessions[name] = session
            return session

    def replace_sessions(self, sessions: Mapping[str, Session]) -> None:
        """Run these in place of the bundle's own graphs, by name: other engines, or one that watches."""
        with self._lock:
            self._sessions |= sessions
            self._replaced = True

    def release(self, name: str) -> None:
        """Closes a graph's session, which frees its memory; it is loaded again when needed."""
        with self._lock:
            self._sessions.pop(name, None)

    def _slot_rows(self, side: Side, first: int, count: int) -> Array:
        """What is fed into slots first..first + count, float32 [count, H]; constant and learned slots only."""
        if side.slots == "learned":
            assert self._slots is not None
            assert side.slot_rows is not None
            start = side.slot_rows[0] + first
            return self._slots[start : start + count]
        return self.inputs.tokens[np.full(count, side.latent_token_id)]

    def _finish(self, side: Side, states: Array, dim: int | None = None, graph: str = "text_step") -> Vectors:
        """Vectors from states [n, D] that `graph` gave: pooled, cut to `dim`, normalised. Raises CembedError: D is not
        the manifest's, NaN."""
        source = "image" if side is self.manifest.document else "query"
        if states.shape[1] != self.manifest.dim:
            raise CembedError(f"graph {graph} gave states of {states.shape[1]}, by the manifest of {self.manifest.dim}")
        return normalise(pool_states(states, side.pooling)[:, :dim], f"graph {graph}, of this {source},")

    def embed_prompt(self, name: SideName, prompt: Prompt, budget: Budget = FULL) -> Vectors:
        """Vectors of what `inputs` made of a page or query, by the text graphs alone; errors as in `embed_images`."""
        side = self.manifest.side(name)
        num_vectors = self.check(side, budget)
        if num_vectors is not None and self._loops(side, budget):
            state = self._state(name, prompt, num_vectors)
            vectors = state.extend(num_vectors)
            state.close()
            return vectors if budget.dim is None else normalise(vectors[:, : budget.dim])
        vectors = self._finish(side, self._single_pass(side, prompt, num_vectors), budget.dim, "text")
        return pool_tokens(vectors, budget.pool_factor)

    def __reduce__(self) -> tuple[Callable[..., Embedder], tuple[Any, ...]]:
        if self._replaced:
            raise CembedError("an Embedder whose sessions were replaced cannot be pickled: load one in each process")
        return type(self), (self.bundle, *self._options)

    def _loops(self, side: Side, budget: Budget) -> bool:
        return budget.decode == "loop" or side.slots == "feedback"

    def _single_pass(self, side: Side, prompt: Prompt, num_vectors: int | None) -> Array:
        """States [K, D] of prompt and slots in one run of the text graph; all positions or the last if K is None."""
        num_slots = 0 if num_vectors is None else side.num_slots(num_vectors)
        length = len(prompt)
        check_length(self.manifest, length + num_slots)
        if num_slots:
            positions = slot_positions(prompt.positions, num_slots, side.slot_positions)
            prompt = prompt.followed_by(self.inputs.slots(self._slot_rows(side, 0, num_slots), positions))
        count = num_vectors or (1 if side.pooling == "last" else length)
        feeds = prompt.feeds() | {"slot_indices": np.arange(length + num_slots - count, length + num_slots)[None]}
        if any(tensor.name == "prompt_length" for tensor in self.manifest.graphs["text"].inputs):
            feeds["prompt_length"] = np.array([length])
        states: Array = self.session("text").run(feeds)[0]
        return states

    def _start(self, name: SideName, prompt: Prompt, max_vectors: int | None) -> LatentState:
        budget = self._max_vectors(self.manifest.side(name), max_vectors)
        return self._state(name, prompt, budget, self._states)

    def _state(
        self, name: SideName, prompt: Prompt, num_vectors: int, memory: StateMemory | None = None
    ) -> LatentState:
        """A state with room for `num_vectors`, its prompt run; one that is kept counts in `memory`."""
        side = self.manifest.side(name)
        capacity = len(prompt) + side.num_slots(num_vectors)
        check_length(self.manifest, capacity)
        state = LatentState(self._loop(name), self._cache(capacity))
        if memory is not None:
            memory.add(state)
        return state.start(prompt)

    def _max_vectors(self, side: Side, max_vectors: int | None) -> int:
        if side.num_vectors is None:
            raise CembedError("this bundle makes one vector for every token: there are no slots to add")
        if max_vectors is not None:
            side.check_budget(max_vectors)
            return max_vectors
        return side.room

    def _loop(self, name: SideName) -> Loop:
        side = self.manifest.side(name)
        return Loop(
            bundle=self.bundle.hash,
            name=name,
            side=side,
            axes=self.manifest.positions.axes,
            step=self.session("text_step"),
            row=lambda slot: self._slot_rows(side, slot, 1)[0],
            slot=self.inputs.slots,
            finish=lambda states: self._finish(side, states),
        )

    def _cache(self, capacity: int) -> StaticKVCache:
        return StaticKVCache(state_tensors(self.manifest.graphs["text_step"]), capacity)


def items(values: Iterable[Any], what: str) -> Iterable[Any]:
    """`values`, unless it is one item where a list of them was meant."""
    if isinstance(values, (str, bytes, Image.Image)):
        raise CembedError(f"{what} must be a list or another iterable: put the one you have into brackets")
    return values
