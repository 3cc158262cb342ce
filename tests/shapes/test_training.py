"""Training: what captions say, and the whole command from nothing to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch
from shapes import autoencoder, captions, data, model, reading, train, workers

from fluxkiln import Pipeline
from fluxkiln.autoencoder import Autoencoder

TOOLS = Path(train.__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizers"
    model.save_tokenizers(folder)
    return folder


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


def test_short_text_is_the_same_text_with_less_padding(tokenizers: Path) -> None:
    denoiser = model.Denoiser(tokenizers)
    texts = ["a small red star at the top left of a blue background", "a star", ""]
    for long, short in zip(denoiser.tokenize(texts), denoiser.tokenize(texts, short=True), strict=True):
        assert long.shape == (3, 32)
        assert short.shape == (3, 16)
        assert torch.equal(long[:, :16], short)
        assert (long[:, 16:] == long[2, -1]).all()


def test_latents_stay_with_their_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that makes other scenes, or another encoder, finds none of the latents that were kept before."""
    monkeypatch.setattr(data, "CHUNK", 4)
    encoders = [Autoencoder(model.AUTOENCODER) for _ in range(2)]
    made = data.training_sample

    def grown(encoder: Autoencoder) -> data.Pool:
        pool = data.Pool(tmp_path, encoder, True, 32, 48, seed=0)
        pool.grow(2)
        for i, sample in enumerate(pool.samples):
            assert sample.before is not None
            with torch.no_grad():
                latents = model.pack(encoder.encode(data.pixels([sample.scene, sample.before], 32, 48)))
            torch.testing.assert_close(pool.latents[i // 4][i % 4].float(), latents, rtol=1e-2, atol=1e-2)
        return pool

    first = grown(encoders[0])
    with monkeypatch.context() as patch:
        patch.setattr(data.Pool, "_encode", None)  # nothing is encoded again
        assert grown(encoders[0]).samples == first.samples
    grown(encoders[1])
    monkeypatch.setattr(data, "training_sample", lambda rng, edit: (rng.random(), made(rng, edit))[1])
    assert grown(encoders[0]).samples != first.samples


@pytest.mark.parametrize("stage", [reading, autoencoder])
def test_a_stage_that_was_stopped_goes_on_where_it_was(
    stage: ModuleType, tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, save = [], workers.save
    monkeypatch.setattr(workers, "SAVE_EVERY", 2)
    monkeypatch.setattr(reading, "BATCH", 4)
    monkeypatch.setattr(stage, "average_gradients", steps.append)  # one for each step; there are no other workers

    def run(folder: str) -> Path:
        out = tmp_path / folder / "made.pt"
        out.parent.mkdir(exist_ok=True)
        where = (tokenizers.parent, out) if stage is reading else (out,)
        stage.train(0, *where, 4, 0, CPU, lambda **entry: None)
        return out

    def save_and_stop(state: object, path: Path) -> None:
        save(state, path)
        raise KeyboardInterrupt

    whole = torch.load(run("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(workers, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert [path.name for path in (tmp_path / "stopped").iterdir()] == ["made.partial"]
    out = run("stopped")
    assert [path.name for path in out.parent.iterdir()] == ["made.pt"]
    assert len(steps) == 4 + 2 + 2
    resumed = torch.load(out)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_workers_of_the_autoencoder_draw_noise_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, seen = torch.rand(2, 3, 32, 32), []
    monkeypatch.setattr(autoencoder, "_pictures", lambda rng: picture)
    monkeypatch.setattr(autoencoder, "average_gradients", lambda parameters: None)
    monkeypatch.setattr(autoencoder, "_reconstruction", lambda made, picture: seen.append(made) or made.mean())
    for rank in (0, 1, 1):
        autoencoder.train(rank, tmp_path / "made.pt", 1, 0, CPU, lambda **entry: None)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])


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
    snapshots = ("--run", str(tmp_path / "run"), "--each", "1", "--steps", "1")
    subprocess.run([sys.executable, "-m", "shapes.evaluate", *snapshots], cwd=TOOLS, check=True)
    judged = [json.loads(line) for line in (tmp_path / "run" / "accuracy.jsonl").read_text().splitlines()]
    assert [entry["snapshot"] for entry in judged] == ["average-000003", "average-000004"]
    assert Pipeline.from_pretrained(tmp_path / "out")("a red star", num_inference_steps=2).images[0].size == size
