"""Training: what captions say, and the whole command from nothing to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from random import Random

import pytest
import torch
from shapes import captions, data, model, reading, train

from fluxkiln import Pipeline

TOOLS = Path(train.__file__).parents[1]


def test_facts_are_said_and_known() -> None:
    rng = Random(0)
    for i in range(2000):
        sample = data.training_sample(rng, edit=i % 2 == 1)
        for field, value in reading.facts(sample).items():
            assert value in reading.FIELDS[field]
            implied = (
                field in ("kind", "relation", "number", "background") or value == reading.NOTHING or "letter" in field
            )
            if not implied:
                assert value in sample.caption.lower()


def test_facts_tell_who_is_what() -> None:
    rng, pairs = Random(1), []
    while len(pairs) < 200:
        sample = captions.text_to_image(rng, "pair")
        facts = reading.facts(sample)
        first, second = (sample.caption.lower().find(f"{facts[f'color {i}']} {facts[f'shape {i}']}") for i in range(2))
        assert 0 <= first < second
        if facts["relation"] != "inside":
            row = ("left", "right") if facts["relation"] in ("left of", "right of") else ("top", "bottom")
            there = row if facts["relation"] in ("left of", "above") else row[::-1]
            assert [facts[f"{cell}: shape"] for cell in there] == [facts[f"shape {i}"] for i in range(2)]
            assert [facts[f"{cell}: color"] for cell in there] == [facts[f"color {i}"] for i in range(2)]
        pairs.append(facts["relation"])
    assert set(pairs) == set(reading.RELATIONS)


def test_a_reader_is_right_only_about_what_is_said() -> None:
    sample = captions.text_to_image(Random(2), "pair", complete=True)
    facts = reading.facts(sample)
    answers = [
        10
        * torch.nn.functional.one_hot(torch.tensor([values.index(facts.get(field, values[-1]))]), len(values)).float()
        for field, values in reading.FIELDS.items()
    ]
    loss, right = reading.loss_and_right(answers, [sample])
    assert right == 1
    assert loss < 1e-3
    wrong = list(reading.FIELDS).index("color 1")
    answers[wrong] = answers[wrong].roll(1, dims=1)
    assert reading.loss_and_right(answers, [sample])[1] == pytest.approx(1 - 1 / len(facts))


@pytest.mark.parametrize(
    ("step", "drawn"),
    [
        (9, [(False, train.SQUARE)]),
        (10, [(False, train.SQUARE), (True, train.SQUARE)]),
        (20, [(False, train.SQUARE), (False, train.OTHER_SIZES), (True, train.EDIT_SIZES)]),
    ],
)
def test_a_step_draws_the_sizes_of_its_phase_and_as_many_tokens(step: int, drawn: list) -> None:
    class Counting:
        def __init__(self, edit: bool, size: tuple[int, int]) -> None:
            self.edit, self.size = edit, size

        def batch(self, n: int, rng: Random) -> data.Batch:
            reference = torch.empty(n) if self.edit else None
            return data.Batch(self.size, ["a star"] * n, torch.empty(n), reference, torch.empty(n))

    sizes = {(False, size) for size in (train.USUAL, *train.OTHER_SIZES)} | {(True, size) for size in train.EDIT_SIZES}
    pools: dict = {(edit, *size): Counting(edit, size) for edit, size in sizes}
    phase = train.portions(step, Namespace(edits_from=10, sizes_from=20))
    found: list[set] = [set() for _ in drawn]
    for seed in range(600):
        rng = Random(seed)
        batches = [train.micro_batch(pools, rng, portion) for portion in phase]
        lengths = [batch.size[0] * batch.size[1] // 256 * (1 + (batch.reference is not None)) + 32 for batch in batches]
        tokens = sum(len(batch.captions) * length for batch, length in zip(batches, lengths, strict=True))
        assert 3070 - sum(lengths) < tokens <= 3070
        for seen, batch in zip(found, batches, strict=True):
            seen.add((batch.reference is not None, batch.size))
    assert found == [{(edit, size) for size in sizes} for edit, sizes in drawn]


def test_the_asked_share_of_times_lies_where_the_prompt_is_read() -> None:
    noise = torch.Generator().manual_seed(0)
    plain, early = (train.times(20_000, noise, share) for share in (0.0, 0.65))
    assert all(t.min() > 0 and t.max() <= 1 for t in (plain, early))
    # The rest is drawn as ever, and reaches there too.
    usual = (plain > 0.8).float().mean().item()
    assert (early > 0.8).float().mean().item() == pytest.approx(0.65 + 0.35 * usual, abs=0.02)


def test_short_text_is_the_same_text_with_less_padding(tmp_path: Path) -> None:
    model.save_tokenizers(tmp_path)
    denoiser = model.Denoiser(tmp_path)
    texts = ["a small red star at the top left of a blue background", "a star", ""]
    for long, short in zip(denoiser.tokenize(texts), denoiser.tokenize(texts, short=True), strict=True):
        assert long.shape == (3, 32)
        assert short.shape == (3, 16)
        assert torch.equal(long[:, :16], short)
        assert (long[:, 16:] == long[2, -1]).all()


@pytest.mark.long  # makes tokenizers, an autoencoder and thousands of latents from nothing
def test_one_command_trains_resumes_and_writes_a_pipeline(tmp_path: Path) -> None:
    def command(steps: int) -> None:
        few = ("--reading-steps", "50", "--autoencoder-steps", "2", "--polish-steps", "2", "--decay", "2")
        late = ("--steps", str(steps), "--edits-from", "1")
        folders = ("--run", str(tmp_path / "run"), "--out", str(tmp_path / "out"))
        subprocess.run([sys.executable, "-m", "shapes.train", *folders, *few, *late], cwd=TOOLS, check=True)

    command(3)
    first = torch.load(tmp_path / "run" / "denoiser.pt")
    command(4)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if entry["stage"] == "denoiser"] == [3, 4]
    assert sum(entry["stage"] == "reading" for entry in log) == 1  # not done again
    last = torch.load(tmp_path / "run" / "denoiser.pt")
    assert (first["step"], last["step"]) == (3, 4)
    size = (model.PICTURE, model.PICTURE)
    assert Pipeline.from_pretrained(tmp_path / "out")("a red star", num_inference_steps=2).images[0].size == size
