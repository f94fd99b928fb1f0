"""The sample model's tokenizer: byte-level BPE over the words of drawn pages and the questions about them."""

from __future__ import annotations

from pathlib import Path

from generate import make_page
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PAGES = 1500
SPECIAL = tuple(
    f"<|{name}|>"
    for name in (
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "vision_pad",
        "image_pad",
        "video_pad",
        "latent",
    )
)
PROMPT = "user\nDescribe the image."


def write_tokenizer(out: Path, rows: int) -> None:
    """`rows` tokens, the special ones last."""
    texts = [PROMPT] * 50
    for index in range(PAGES):
        page = make_page(f"tokenizer-{index}", "train", "seen" if index % 3 else "walls")
        texts += [f" {word}" for word in page.vocabulary]
        texts += [f" {word.text}" for word in page.words]
        texts += [question.text for question in page.questions]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=rows - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(out))
