"""The two tokenizers, made from the captions: CLIP's byte-pair encoding and T5's unigram pieces.

Every word of the captions is one token; anything else falls apart into characters. The quoted words to be drawn are
spelt in capitals, so T5 sees them letter by letter.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5Tokenizer

from . import captions

MAX_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"


def corpus() -> list[str]:
    """Captions and instructions, with the quoted words taken out."""
    rng = Random(0)
    makers = (captions.text_to_image, captions.edit)
    return [re.sub(r'"\w+"', '""', makers[i % 2](rng).caption) for i in range(20_000)]


def save_clip(folder: Path, texts: list[str]) -> None:
    """Write vocab.json, merges.txt and configuration as CLIP's tokenizer has them."""
    tokenizer = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    pattern = Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(vocab_size=4096, end_of_word_suffix="</w>", min_frequency=2, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    merges = [tuple(m) for m in json.loads(tokenizer.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(m) for m in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=MAX_LENGTH
    ).save_pretrained(folder)


def save_t5(folder: Path, texts: list[str]) -> None:
    """Write tokenizer.json and configuration as T5's tokenizer has them."""
    words = Counter(word for text in texts for word in re.findall(r"\w+", text))
    total = sum(words.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A word costs less than any way to spell it: 8 at most, and each of its letters 14 or 20.
    pieces += [(f"▁{word}", (n / total) ** 0.5 - 8) for word, n in sorted(words.items()) if len(word) > 1]
    pieces += [(f"▁{c}", -14.0) for c in string.ascii_letters + string.digits]
    pieces += [("▁", -10.0), *((c, -20.0) for c in string.printable.strip())]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=MAX_LENGTH).save_pretrained(folder)
