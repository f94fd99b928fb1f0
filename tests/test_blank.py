"""Blank paper that is not read: what is blank, where the rest stands, and that vectors are those of the rest."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import BACKBONE_OF, GOLDEN, BundleMaker
from libcembed import CallError, Library
from manifests import read
from numpy.typing import NDArray
from PIL import Image
from reference import Model, Zoo, reference_pixels
from test_cli import cembed
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import get_vision_position_ids, get_vision_window_index

from cembed.export.exporter import export
from cembed.export.plan import ExportOptions
from cembed.options import PageVectors, Reading, settings_of
from cembed.runtime import CembedError, Embedder
from cembed.runtime.bundle.bundle import Bundle
from cembed.runtime.bundle.image_processing import ImageProcessing, Tiles
from cembed.runtime.bundle.manifest_file import write_manifest
from cembed.runtime.embed import inputs
from cembed.runtime.embed.blank import LEAST, Sums, blank_parts, parts_to_read
from cembed.runtime.embed.embedder import Budget
from cembed.runtime.embed.inputs import PageOptions
from cembed.runtime.engines.session import EngineSettings
from cembed.runtime.verify import verify

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
SIDE, ROWS, COLUMNS = 28, 12, 8
GREY = ((0.5,) * 3, (0.5,) * 3)
SPEC = ImageProcessing("smart", 14, 2, 3136, 75264, 1 / 255, *GREY)
TILED = ImageProcessing("tiles", 14, 2, 3136, 75264, 1 / 255, *GREY, tiles=Tiles(56, 336, "", "", "", ""))
TILED_KINDS = ("colidefics3", "colmodernvbert")


def levels(values: NDArray[np.float64]) -> Pixels:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def page(paper: tuple[int, int, int] = (255, 255, 255), ink: int = 20, noise: float = 0.0, seed: int = 0) -> Pixels:
    """ROWS x COLUMNS parts of paper with lines of writing in rows 1, 2 and 7, but for their last two columns."""
    random = np.random.default_rng(seed)
    pixels = np.empty((ROWS * SIDE, COLUMNS * SIDE, 3))
    pixels[:] = paper
    for row in (1, 2, 7):
        strokes = random.random((12, (COLUMNS - 2) * SIDE)) < 0.3
        pixels[row * SIDE + 8 : row * SIDE + 20, : strokes.shape[1]][strokes] = ink
    return levels(pixels + noise * random.standard_normal((*pixels.shape[:2], 1)))


def photo(seed: int = 0) -> Pixels:
    """Light that falls off from one corner to the other, and grain."""
    down, across = np.mgrid[0 : ROWS * SIDE, 0 : COLUMNS * SIDE]
    light = 40 + 180 * (down + across) / (ROWS * SIDE + COLUMNS * SIDE)
    return levels(light[..., None] + 5 * np.random.default_rng(seed).standard_normal((*light.shape, 3)))


def written() -> Mask:
    found = np.zeros((ROWS, COLUMNS), bool)
    found[[1, 2, 7], : COLUMNS - 2] = True
    return found


# What is blank --------------------------------------------------------------------------------------------------------

PAPERS: dict[str, Pixels] = {
    "white": page(),
    "tinted": page((246, 236, 200)),
    "dark": page((24, 20, 40), ink=230),
    "scan": page((238, 236, 230), noise=6),
    "dark scan": page((40, 40, 44), ink=220, noise=5),
    "pencil": page((250, 250, 250), ink=225),
    "coloured": page((255, 255, 255), ink=200),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_writing_is_told_from_paper(paper: str) -> None:
    assert np.array_equal(~blank_parts(Sums.of(PAPERS[paper], SIDE)), written())
    wide = written()
    wide[[1, 2, 7], COLUMNS - 2] = True  # the neighbour to the right
    wide[0, 0] = wide[-1, -1] = True
    assert np.array_equal(parts_to_read(PAPERS[paper], SPEC), wide)


def test_what_a_compressed_scan_adds_to_paper_is_no_writing(tmp_path: Path) -> None:
    Image.fromarray(PAPERS["scan"]).save(tmp_path / "scan.jpg", quality=60)
    found = parts_to_read(np.asarray(Image.open(tmp_path / "scan.jpg")), SPEC)
    assert found[written()].all()
    assert found.mean() < 0.35


@pytest.mark.parametrize("seed", range(3))
def test_a_photo_is_read_whole(seed: int) -> None:
    assert parts_to_read(photo(seed), SPEC).all()


@pytest.mark.parametrize("paper", [(230, 230, 230), (30, 30, 30)])
def test_where_noise_hides_faint_writing_all_is_read(paper: tuple[int, int, int]) -> None:
    assert parts_to_read(page(paper, noise=20), SPEC).all()


def test_of_a_panel_in_another_colour_only_the_paper_around_it_is_blank() -> None:
    pixels = page()
    pixels[4 * SIDE : 6 * SIDE, 2 * SIDE : 5 * SIDE] = (90, 140, 220)
    blank = blank_parts(Sums.of(pixels, SIDE))
    assert not blank[4:6, 2:5].any()
    assert blank[3].all()


def test_a_hairline_is_no_paper() -> None:
    pixels = page()
    pixels[10 * SIDE + 13, :] = 190
    assert parts_to_read(pixels, SPEC)[10].all()


@pytest.mark.parametrize("noise", [0.0, 6.0])
def test_of_a_blank_page_some_is_read(noise: float) -> None:
    found = parts_to_read(page((240, 240, 240), ink=240, noise=noise), SPEC)
    assert found.sum() == LEAST
    assert found[0, 0]
    assert found[-1, -1]
    assert found.any(axis=1).all()  # all over the page


def test_of_a_page_with_fewer_parts_than_that_all_is_read() -> None:
    assert parts_to_read(np.full((2 * SIDE, 3 * SIDE, 3), 255, np.uint8), SPEC).all()


@pytest.mark.parametrize("side", [16, 28, 32, 256])
def test_sums_are_exact(side: int) -> None:
    pixels = np.full((2 * side, 3 * side, 3), 255, np.uint8)
    pixels[:side, :side] = np.random.default_rng(0).integers(0, 256, (side, side, 3))
    found = Sums.of(pixels, side).variances()
    expected = pixels[:side, :side].std(axis=(0, 1)).max()
    np.testing.assert_allclose(np.sqrt(found[0, 0]) / side**2, expected, rtol=1e-12)
    assert not found.reshape(-1)[1:].any()


def test_tiles_with_writing_are_read() -> None:
    """Of 2 x 2 parts each; the neighbours of writing in rows 1, 2 and 7 are in the last column of tiles."""
    found = parts_to_read(page(), TILED)
    assert np.array_equal(np.flatnonzero(found.all(axis=1)), [0, 1, 3])
    assert not found[[2, 4, 5]].any()
    assert not parts_to_read(np.full((112, 112, 3), 255, np.uint8), TILED).any()
    assert parts_to_read(np.full((56, 56, 3), 255, np.uint8), TILED).all()


# Where the rest stands, and its vectors -------------------------------------------------------------------------------


def pair(bundle: Path) -> tuple[Embedder, Embedder]:
    """The bundle's embedder that skips blank paper, and the one that does not."""
    return Embedder.load(bundle, threads=1, skip_blank=True), Embedder.load(bundle, threads=1)


def tall(pixels: Pixels) -> Pixels:
    """For tiles, which are larger: with as much blank paper again below."""
    return np.concatenate([pixels, np.broadcast_to(pixels[-1, -1], pixels.shape)])


@pytest.mark.parametrize("name", [name for name in BACKBONE_OF if name not in TILED_KINDS])
def test_what_is_read_stays_where_it_is(name: str, bundle_of: BundleMaker) -> None:
    skipping, whole = pair(bundle_of(name))
    read, prompt, full = skipping.kept(page()), skipping.inputs.document(page()), whole.inputs.document(page())
    assert 0 < read.mean() < 1
    assert whole.kept(page()).all()
    count, image = read.size, prompt_of(whole)
    stay = np.ones(len(full), bool)
    start = int(np.argmax(image))
    stay[start : start + count] = read.reshape(-1)
    assert np.array_equal(prompt.positions, full.positions[:, stay])
    assert np.array_equal(prompt.rows["inputs_embeds"][~image[stay]], full.rows["inputs_embeds"][~image])
    assert (skipping.tokens_read.read, skipping.tokens_read.of) == (read.sum(), read.size)


def prompt_of(embedder: Embedder) -> Mask:
    manifest, read = embedder.manifest, embedder.kept(page())
    return embedder.inputs.prompter.document(manifest.document.prompt, read.size) == manifest.image_token_id


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_where_nothing_is_blank_nothing_changes(name: str, bundle_of: BundleMaker) -> None:
    skipping, whole = pair(bundle_of(name))
    for picture in (photo(1), photo(2)[:200]):
        assert skipping.kept(picture).all()
        assert np.array_equal(skipping.embed_image(picture), whole.embed_image(picture))


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_batch_mates_do_not_matter(name: str, bundle_of: BundleMaker) -> None:
    skipping, whole = pair(bundle_of(name))
    pages = [tall(page()), photo(), tall(page((246, 236, 200), noise=4)), np.full((336, 224, 3), 255, np.uint8)]
    together = skipping.embed_images(pages)
    assert all(np.array_equal(skipping.embed_image(one), vectors) for one, vectors in zip(pages, together, strict=True))
    differ = [
        a.shape != b.shape or not np.array_equal(a, b) for a, b in zip(together, whole.embed_images(pages), strict=True)
    ]
    assert differ == [True, False, True, True]


@pytest.mark.parametrize("backbone", ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_the_loop_gives_what_one_pass_does(backbone: str, zoo: Zoo) -> None:
    embedder = Embedder.load(zoo.model(backbone).bundle, threads=1, skip_blank=True)
    for picture in (page(), np.full((336, 224, 3), 255, np.uint8)):
        loop, at_once = (embedder.embed_image(picture, Budget(9, decode=how)) for how in ("loop", "single-pass"))
        np.testing.assert_allclose(loop, at_once, rtol=0, atol=1e-5)
        np.testing.assert_allclose(embedder.start(picture).extend(9), at_once, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["qwen2-vl", "qwen3-vl"])
def test_a_state_goes_on_from_its_file(backbone: str, zoo: Zoo, tmp_path: Path) -> None:
    """Its prompt has no rectangle of visual tokens, which an embedder that reads whole pages takes for damage."""
    skipping, whole = pair(zoo.model(backbone).bundle)
    file = tmp_path / "page.state.safetensors"
    for picture in (page(), page()[:, : 5 * SIDE], page(noise=3), np.full((336, 224, 3), 255, np.uint8), photo()):
        state = skipping.start(picture)
        state.extend(2)
        state.save(file)
        assert np.array_equal(skipping.resume(file).extend(5), state.extend(5))
    skipping.start(page()).save(file)
    assert "ends at" in refusal(lambda: whole.resume(file))
    whole.start(photo()).save(file)
    assert np.array_equal(skipping.resume(file).extend(5), whole.resume(file).extend(5))


def features_of_read(model: Model, picture: Image.Image, read: Mask) -> torch.Tensor:
    """Features [V, H] by the modules of transformers, each on what is read alone: windows keep what is left of them."""
    spec, tower = model.embedder.manifest.image, model.reference.model.visual
    pixels, grid = reference_pixels(picture, spec)
    place, kept = torch.tensor([[1, *grid]]), torch.from_numpy(read.reshape(-1))
    order, bounds = torch.arange(kept.numel()), torch.tensor([0, len(pixels)])
    if spec.window_size:
        order, bounds = get_vision_window_index(place, spec.merge_size, spec.window_size, spec.patch_size)
        order, bounds = torch.as_tensor(order), torch.as_tensor(bounds)
    left = kept[order]
    inside = [int(part.sum()) for part in torch.split(left, (bounds.diff() // spec.merge_size**2).tolist())]
    sizes = torch.tensor([count for count in inside if count]) * spec.merge_size**2
    windows = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
    order = order[left]
    patches = (order[:, None] * spec.merge_size**2 + torch.arange(spec.merge_size**2)).flatten()
    hidden = tower.patch_embed(torch.from_numpy(pixels))[patches]
    rotary = tower.rotary_pos_emb(hidden, get_vision_position_ids(place, spec.merge_size)[patches])
    for number, block in enumerate(tower.blocks):
        whole = not spec.window_size or number in tower.fullatt_block_indexes
        spans = torch.tensor([0, len(patches)], dtype=torch.int32) if whole else windows
        hidden = block(hidden, cu_seqlens=spans, position_embeddings=rotary)
    return tower.merger(hidden)[torch.argsort(order)]


@pytest.mark.parametrize("backbone", ["qwen2-vl", "qwen2.5-vl"])
@pytest.mark.parametrize("paper", ["white", "dark scan"])
def test_vectors_are_those_of_torch_for_what_is_read(backbone: str, paper: str, zoo: Zoo) -> None:
    model = zoo.model(backbone)
    embedder = Embedder(model.embedder.bundle, EngineSettings(threads=1), PageOptions(skip_blank=True))
    picture, side = Image.fromarray(PAPERS[paper]), embedder.manifest.document
    read = embedder.kept(picture)
    with torch.inference_mode():
        embeds, positions = model.document(picture)
        features = features_of_read(model, picture, read)
    embeds = embeds.clone()
    ids = embedder.inputs.prompter.document(side.prompt, read.size)
    is_image = ids == embedder.manifest.image_token_id
    embeds[0, np.flatnonzero(is_image)[read.reshape(-1)]] = features
    stay = ~is_image
    stay[is_image] = read.reshape(-1)
    rows = model.rows("document", 64)
    states = model.reference.single_pass(embeds[:, stay], positions[:, stay], rows, side.slot_positions)[-64:]
    expected = torch.nn.functional.normalize(states, dim=-1).numpy()
    np.testing.assert_allclose(embedder.embed_image(picture), expected, rtol=0, atol=1e-4)
    assert np.abs(model.embedder.embed_image(picture) - expected).max() > 1e-3


@pytest.mark.parametrize("name", TILED_KINDS)
def test_blank_tiles_go_with_their_markers(name: str, bundle_of: BundleMaker) -> None:
    skipping, whole = pair(bundle_of(name))
    picture = tall(page())
    read, tiles = skipping.kept(picture), skipping.manifest.image.tiles
    assert tiles is not None
    assert 0 < read.mean() < 1
    assert not read[-1].any()
    prompter, tokens = skipping.inputs.prompter, (tiles.side // skipping.manifest.image.factor) ** 2
    filled = skipping.manifest.document.prompt.replace("{image}", tiles.fill(*read.shape, read.tolist()))
    length = len(skipping.inputs.document(picture))
    assert length == len(prompter.document(filled, tokens))
    assert length < len(whole.inputs.document(picture)) - tokens
    count = skipping.tokens_read
    assert (count.read, count.of) == ((read.sum() + 1) * tokens, (read.size + 1) * tokens)
    empty = skipping.inputs.document(np.full((336, 224, 3), 255, np.uint8))
    alone = skipping.manifest.document.prompt.replace("{image}", tiles.alone)
    assert len(empty) == len(prompter.document(alone, tokens))


def test_a_pickled_embedder_skips_what_it_skipped(causal_bundle: Path) -> None:
    embedder = Embedder.load(causal_bundle, threads=1, skip_blank=True, max_visual_tokens=60)
    again = pickle.loads(pickle.dumps(embedder))
    assert np.array_equal(again.kept(page()), embedder.kept(page()))
    assert not again.kept(page()).all()


# Who says so ----------------------------------------------------------------------------------------------------------


def skipping_bundle(source: Path, to: Path) -> Path:
    """A copy whose manifest says that blank paper is skipped."""
    shutil.copytree(source, to)
    bundle = Bundle(to)
    image = replace(bundle.manifest.image, skip_blank=True)
    write_manifest(to, replace(bundle.manifest, image=image).to_json())
    return to


def test_the_bundle_says_what_happens_unless_the_caller_does(causal_bundle: Path, tmp_path: Path) -> None:
    bundle = skipping_bundle(causal_bundle, tmp_path / "bundle")
    assert read(bundle)["image"]["skip_blank"] is True
    assert "skip_blank" not in read(causal_bundle)["image"]
    skipping, whole = pair(causal_bundle)
    for chosen, expected in ((None, skipping), (True, skipping), (False, whole)):
        embedder = Embedder.load(bundle, threads=1, skip_blank=chosen)
        assert np.array_equal(embedder.embed_image(page()), expected.embed_image(page()))


@pytest.fixture
def whole_bundle(bundle_of: BundleMaker, tmp_path: Path) -> Path:
    """A PaliGemma as it was exported before patches had places: all rows of their table are added."""
    root = Path(shutil.copytree(bundle_of("colpali"), tmp_path / "whole"))
    raw, graph = read(root), onnx.load(root / "vision.onnx", load_external_data=False)
    image = Bundle(root).manifest.image
    side = int(image.max_pixels**0.5) // image.patch_size
    kept = [tensor for tensor in graph.graph.input if tensor.name == "pixel_values"]
    kept[0].type.tensor_type.shape.dim[1].dim_value = side**2
    del graph.graph.input[:]
    graph.graph.input.extend(kept)
    nodes = list(graph.graph.node)
    rows = next(node for node in nodes if node.op_type == "Gather" and "position_embedding" in node.input[0])
    added = next(node for node in nodes if rows.output[0] in node.input)
    added.input[list(added.input).index(rows.output[0])] = rows.input[0]
    del graph.graph.node[: nodes.index(rows) + 1]
    (root / "vision.onnx").write_bytes(graph.SerializeToString())
    raw["graphs"]["vision"]["inputs"] = raw["graphs"]["vision"]["inputs"][:1]
    raw["graphs"]["vision"]["inputs"][0]["shape"][1] = side**2
    data = (root / "vision.onnx").read_bytes()
    raw["files"]["vision.onnx"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_manifest(root, json.dumps(raw))
    return root


def test_a_tower_that_has_the_places_inside_reads_whole_pages(
    whole_bundle: Path, bundle_of: BundleMaker, tmp_path: Path
) -> None:
    said = refusal(lambda: Embedder.load(whole_bundle, skip_blank=True))
    assert said.startswith("skip_blank: pages of this bundle are read whole")
    whole, today = (Embedder.load(root, threads=1) for root in (whole_bundle, bundle_of("colpali")))
    np.testing.assert_allclose(whole.embed_image(page()), today.embed_image(page()), rtol=0, atol=1e-6)
    bundle = skipping_bundle(whole_bundle, tmp_path / "bundle")
    assert "image.skip_blank is true" in refusal(lambda: Embedder.load(bundle))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(CembedError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pages_of_an_index_are_known_by_it() -> None:
    as_before, skipped = (settings_of(PageVectors(), Reading(), skip) for skip in (False, True))
    assert as_before == settings_of(PageVectors(), Reading())
    assert skipped != as_before
    assert skipped != settings_of(PageVectors(), Reading(max_pixels=9))


def test_the_exporter_writes_it_down(tmp_path: Path) -> None:
    options = ExportOptions("qwen2-vl", str(GOLDEN / "colqwen2"), skip_blank=True, num_layers=1)
    assert export(options, tmp_path / "bundle").image.skip_blank
    assert all(check.passed for check in verify(Bundle(tmp_path / "bundle")))


# Commands -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    Image.fromarray(page()).save(folder / "letter.png")
    Image.fromarray(photo()).save(folder / "photo.png")
    return folder


def test_embed_tells_and_shows_what_was_read(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    out, shown = tmp_path / "v.npz", tmp_path / "shown"
    command = ("embed", causal_bundle, scans, "--out", out, "--force")
    assert "visual tokens" not in cembed(*command).out
    said = cembed(*command, "--skip-blank", "--show-kept", shown)
    skipping = Embedder.load(causal_bundle, threads=1, skip_blank=True)
    read = skipping.kept(page())
    assert f"{read.sum() + 96} of 192 visual tokens read, {(read.sum() + 96) / 192:.0%}" in said.out
    letter, picture = (np.asarray(Image.open(shown / name)) for name in ("00001-letter-1.png", "00002-photo-1.png"))
    assert np.array_equal(picture, photo())
    grey = np.repeat(np.repeat(~read, SIDE, axis=0), SIDE, axis=1)
    assert np.array_equal(letter[~grey], page()[~grey])
    assert (letter[grey] == 255 // 3 + 85).all()
    vectors = np.load(out)
    assert np.array_equal(vectors["vectors"][:8], skipping.embed_image(page())), vectors.files


def test_show_kept_needs_something_to_show(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    command = ("embed", causal_bundle, scans, "--out", tmp_path / "v.npz", "--show-kept")
    assert cembed(*command, tmp_path / "shown").error == "--show-kept shows what --skip-blank leaves unread: give both"
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot make" in cembed(*command, blocked, "--skip-blank").error


def test_an_index_knows_pages_that_were_read_whole(causal_bundle: Path, scans: Path, tmp_path: Path) -> None:
    add = ("index", "add", tmp_path / "shelf", scans, "--bundle", causal_bundle)
    assert "2 pages added" in cembed(*add).out
    told = cembed(*add, "--skip-blank").out
    assert "2 pages added" in told
    assert "visual tokens read" in told
    assert "0 pages added, 2 were there" in cembed(*add, "--skip-blank").out
    assert "2 pages added" in cembed(*add, "--no-skip-blank").out


@pytest.fixture
def dataset(scans: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    shutil.copytree(scans, folder / "pages")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "a letter"}\n')
    (folder / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq\tletter.png\t1\n")
    return folder


def test_eval_measures_what_is_read(causal_bundle: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, parts = list[float](), inputs.parts_to_read

    def watched(pixels: Pixels, image: ImageProcessing) -> Mask:
        kept.append(float(parts(pixels, image).mean()))
        return parts(pixels, image)

    monkeypatch.setattr(inputs, "parts_to_read", watched)
    command = ("eval", causal_bundle, dataset, "--budgets", 8, "--json")
    assert cembed(*command).status == 0
    assert not kept
    assert json.loads(cembed(*command, "--skip-blank").out)["pages"] == 2
    assert min(kept) < 1


def test_commands_refuse_what_the_bundle_cannot_do(
    whole_bundle: Path, scans: Path, dataset: Path, tmp_path: Path
) -> None:
    for command in (
        ("embed", whole_bundle, scans, "--out", tmp_path / "v.npz"),
        ("eval", whole_bundle, dataset),
        ("index", "add", tmp_path / "shelf", scans, "--bundle", whole_bundle),
    ):
        assert cembed(*command, "--skip-blank").error.startswith("skip_blank: pages of this bundle are read whole")


# The C library --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONE_OF)
def test_the_c_library_reads_the_same(name: str, bundle_of: BundleMaker, library: Library) -> None:
    bundle = bundle_of(name)
    skipping, whole = pair(bundle)
    ours, all_of_it = library.open(bundle, skip_blank=1), library.open(bundle, skip_blank=-1)
    for picture in (*map(tall, PAPERS.values()), photo(), np.full((336, 224, 3), 255, np.uint8)):
        found = ours.embed_image(picture)
        np.testing.assert_allclose(found, skipping.embed_image(picture), rtol=0, atol=1e-6)
    np.testing.assert_allclose(all_of_it.embed_image(page()), whole.embed_image(page()), rtol=0, atol=1e-6)
    ours.close(), all_of_it.close()


def test_the_c_library_does_as_the_bundle_says(causal_bundle: Path, tmp_path: Path, library: Library) -> None:
    bundle = skipping_bundle(causal_bundle, tmp_path / "bundle")
    skipping, whole = pair(causal_bundle)
    for chosen, expected in ((0, skipping), (1, skipping), (-1, whole)):
        opened = library.open(bundle, skip_blank=chosen)
        for loop, decode in ((0, None), (1, "loop")):
            wanted = expected.embed_image(page(), Budget(decode=decode))
            np.testing.assert_allclose(opened.embed_image(page(), loop=loop), wanted, rtol=0, atol=1e-6)
        opened.close()


def test_what_the_c_library_refuses(causal_bundle: Path, whole_bundle: Path, tmp_path: Path, library: Library) -> None:
    with pytest.raises(CallError, match="skip_blank is -1, 0 or 1"):
        library.open(causal_bundle, skip_blank=2)
    with pytest.raises(CallError, match="skip_blank: pages of this bundle are read whole"):
        library.open(whole_bundle, skip_blank=1)
    with pytest.raises(CallError, match=r"image\.skip_blank is true"):
        library.open(skipping_bundle(whole_bundle, tmp_path / "bundle"))
