"""Training: what a step is made of, and the whole command from nothing to a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from random import Random
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from shapes import autoencoder, data, model, plot, reading, rollouts, train, workers
from shapes.fast import Fast

from fluxkiln import Pipeline
from fluxkiln.autoencoder import Autoencoder
from fluxkiln.hub import resolve

TOOLS = Path(train.__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "tokenizers"
    model.save_tokenizers(folder)
    return folder


_EDITS = [train.SHORT_EDITS, train.LONG_EDITS]


@pytest.mark.parametrize(
    ("step", "rank", "drawn"),
    [
        (9, 0, [train.PROMPTS, train.OTHER_SIZES]),
        (10, 0, [train.PROMPTS, *_EDITS]),
        (10, 1, [train.OTHER_SIZES, *_EDITS]),
        (11, 0, [train.OTHER_SIZES, *_EDITS]),
        (11, 1, [train.PROMPTS, *_EDITS]),
        (20, 0, [train.PROMPTS, *_EDITS]),
        (20, 1, [train.OTHER_SIZES, *_EDITS]),
    ],
)
def test_a_step_draws_the_kinds_of_its_phase(step: int, rank: int, drawn: list) -> None:
    phase = train.portions(step, rank, Namespace(edits_from=10, own_from=20))
    assert [portion.kinds for portion in phase] == drawn
    assert [portion.own for portion in phase] == [step == 20 and kinds != train.OTHER_SIZES for kinds in drawn]


def test_kinds_have_their_shares_and_portions_as_many_tokens() -> None:
    for kinds in (train.PROMPTS, train.OTHER_SIZES, *_EDITS):
        assert sum(kinds.values()) == pytest.approx(1)
        for kind in kinds:
            width, height = kind.size
            each = (1 + kind.edit) * (width // 16) * (height // 16) + kind.text
            assert train.TOKENS - each < kind.samples * each <= train.TOKENS


def test_one_portion_in_six_is_padded_as_pipelines_pad() -> None:
    rng = Random(0)
    for kind in train.SHARES:
        lengths = [train.text_length(kind, rng) for _ in range(3000)]
        assert {*lengths} == {kind.text, model.vocabulary.MAX_LENGTH}
        if kind.text < 32:
            assert lengths.count(32) == pytest.approx(500, rel=0.2)


def test_as_many_rolls_are_kept_as_there_is_time_for() -> None:
    """A save begins them anew, so that a run that goes on has the same."""
    assert rollouts.KEPT * rollouts.EVERY == workers.SAVE_EVERY


def test_edits_in_other_tokenizers_words_are_kept() -> None:
    """To those of the bundled model "in this style" is eight tokens; a run may begin from it."""
    denoiser, rng = model.Denoiser(resolve("shapes")), Random(6)
    drawn = [data.training_sample(rng, edit=True).caption for _ in range(600)]
    assert max(map(denoiser.length, drawn)) > 20
    usual = [kind for kind in _kinds() if kind.size == train.USUAL]
    assert all(sum(train.has_tokens(denoiser, kind, caption) for kind in usual) == 1 for caption in drawn)


def test_short_and_long_edits_are_all_edits_as_they_come(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each belongs to one of the two, and a portion of each is the mixture; so no text is cut or needs more padding."""
    denoiser, rng = model.Denoiser(tokenizers), Random(5)
    short, long = (next(kind for kind in kinds if kind.size == train.USUAL) for kinds in _EDITS)
    other = train.Kind(True, (48, 80), 32)
    drawn = [data.training_sample(rng, edit=True).caption for _ in range(1000)]
    among = {kind: [caption for caption in drawn if train.has_tokens(denoiser, kind, caption)] for kind in _kinds()}
    assert sorted(among[short] + among[long]) == sorted(drawn)
    assert among[other] == drawn
    share = short.samples / (short.samples + long.samples)
    assert len(among[short]) / 1000 == pytest.approx(share, abs=0.06)
    monkeypatch.setattr(data, "CHUNK", 16)
    encoder = Autoencoder(model.AUTOENCODER)
    for kind in (short, long):
        pool = data.Pool(tmp_path, encoder, True, 64, 64, 0, partial(train.has_tokens, denoiser, kind))
        pool.grow(1)
        captions = pool.batch(100, rng).captions
        assert len({*captions} - {""}) > 10
        assert all(ids.shape == (100, kind.text) for ids in denoiser.tokenize(captions, kind.text))
        assert all(train.has_tokens(denoiser, kind, caption) for caption in captions if caption)


def _kinds() -> list[train.Kind]:
    return [kind for kinds in _EDITS for kind in kinds]


@pytest.fixture
def pools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[bool, data.Pool]:
    """Of prompts and of edits, each of 16 samples."""
    monkeypatch.setattr(data, "CHUNK", 16)
    encoder = Autoencoder(model.AUTOENCODER)
    made = {edit: data.Pool(tmp_path / "latents", encoder, edit, 64, 64, seed=0) for edit in (False, True)}
    for pool in made.values():
        pool.grow(1)
    return made


@pytest.mark.parametrize("edit", [False, True])
def test_what_is_certain_leaves_nothing_open(pools: dict[bool, data.Pool], edit: bool) -> None:
    pool = pools[edit]
    batch = pool.batch(300, Random(0), certain=True)
    assert batch.guidance.min() >= 2
    for caption, target in zip(batch.captions, batch.target, strict=True):
        (i,) = [i for i in range(16) if torch.equal(pool.latents[0][i, 0].float(), target)]
        sample = pool.samples[i]
        if edit:
            assert caption == sample.caption
            continue
        scene = sample.scene
        said = [*scene.background.colors, *(thing.color for thing in scene.things)]
        said += [thing.size for thing in scene.things if scene.relation != "inside"]
        assert all(word in caption.lower() for word in said)
    assert "" in pool.batch(300, Random(0)).captions


def test_guidance_is_the_chance_that_an_edit_is_to_be_believed(pools: dict[bool, data.Pool]) -> None:
    """If it is not, or nothing is asked for, the picture stays as it was."""
    pool, stayed = pools[True], {True: list[bool](), False: list[bool]()}
    latents = pool.latents[0].float()
    batch = pool.batch(3000, Random(0))
    assert batch.reference is not None
    for caption, target, reference, guidance in zip(
        batch.captions, batch.target, batch.reference, batch.guidance, strict=True
    ):
        (i,) = (latents[:, 1] == reference).flatten(1).all(1).nonzero().flatten().tolist()
        assert caption in ("", pool.samples[i].caption)
        as_it_was = torch.equal(target, reference)
        if not caption:
            assert as_it_was
        elif guidance < 1:
            stayed[True].append(as_it_was)
        else:
            stayed[False].append(as_it_was and guidance >= 2)
            assert torch.equal(target, latents[i, 0]) or as_it_was
    assert not any(stayed[False])
    share = sum(stayed[True]) / len(stayed[True])  # the mean of (1 - guidance / 2) ** 2 up to 1 is 7 / 12
    assert share == pytest.approx(7 / 12, abs=0.1)
    assert batch.captions.count("") == pytest.approx(0.08 * 3000, rel=0.25)


def test_guidance_is_the_chance_that_a_prompt_is_to_be_believed(pools: dict[bool, data.Pool]) -> None:
    """If it is not, the prompt is another picture's."""
    pool, believed = pools[False], {True: list[bool](), False: list[bool]()}
    batch = pool.batch(3000, Random(0))
    for caption, target, guidance in zip(batch.captions, batch.target, batch.guidance, strict=True):
        (i,) = (pool.latents[0][:, 0].float() == target).flatten(1).all(1).nonzero().flatten().tolist()
        scene = pool.samples[i].scene
        shapes = {scene.word or "", *(thing.shape for thing in scene.things)} - {""}
        if caption and shapes and (guidance < 1 or guidance >= 2):
            believed[guidance.item() >= 2].append(all(shape.lower() in caption.lower() for shape in shapes))
    assert all(believed[True])
    assert sum(believed[False]) / len(believed[False]) < 0.75


@pytest.mark.parametrize("edit", [False, True])
def test_places_on_own_paths_are_where_eulers_steps_lead(
    pools: dict[bool, data.Pool], tokenizers: Path, edit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a velocity whose paths are known: each sample drifts as fast as its guidance says."""
    pool = pools[edit]

    def drift(predict: object, img: torch.Tensor, reference: torch.Tensor | None, size: tuple, *rest: torch.Tensor):
        assert size == (64, 64)
        assert (reference is not None) is edit
        *_, guidance = rest
        return guidance[:, None, None].expand_as(img)

    monkeypatch.setattr(rollouts, "velocity", drift)
    monkeypatch.setattr(rollouts, "STEPS", (9, 9))
    denoiser, paths, rng = model.Denoiser(tokenizers), rollouts.Rollouts(pool), Random(3)
    for _ in range(rollouts.KEPT + 2):
        paths.roll(denoiser, denoiser, rng)
    assert len(paths.rolls) == rollouts.KEPT
    batch, img, t = places = paths.batch(60, rng)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.58)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 9, 9).tolist())
    steps = scheduler.sigmas[1:-1]
    assert len(t.unique()) == 8
    assert all((steps - at).abs().min() < 1e-6 for at in t)
    # Noise has the mean 0 and the deviation 1; 1024 numbers of it have a mean within 0.15.
    torch.testing.assert_close(img.mean((1, 2)), batch.guidance * (t - 1), atol=0.15, rtol=0)
    torch.testing.assert_close(img.std((1, 2)), torch.ones(60), atol=0.1, rtol=0)
    for n, target in enumerate(batch.target):
        (i,) = [i for i in range(16) if torch.equal(pool.latents[0][i, 0].float(), target)]
        if edit:
            assert batch.captions[n] == pool.samples[i].caption
            assert batch.reference is not None
            assert torch.equal(batch.reference[n], pool.latents[0][i, 1].float())
    monkeypatch.setattr(paths, "batch", lambda n, rng: places)
    wanted = train.own(paths, 60, rng)
    torch.testing.assert_close(img - t[:, None, None] * wanted.velocity, batch.target)


@pytest.mark.parametrize("edit", [False, True])
def test_late_places_on_own_paths_count_by_the_picture(
    pools: dict[bool, data.Pool], edit: bool, tokenizers: Path
) -> None:
    """From a velocity of zero, one time's places at a time: below 0.4 the loss is the picture's error over 0.4."""
    batch = pools[edit].batch(3, Random(0))
    denoiser, noise = model.Denoiser(tokenizers), torch.Generator()

    def still(img: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(img)

    for at, counts_at in ((0.9, 0.9), (0.5, 0.5), (0.4, 0.4), (0.2, 0.4), (0.1, 0.4)):
        img, t = batch.target + torch.randn(batch.target.shape), torch.full((3,), at)
        paths = SimpleNamespace(batch=lambda n, rng, img=img, t=t: (batch, img, t))
        places = train.own(paths, 3, Random(0))
        error = (img - batch.target).square().mean().item()
        loss = train.velocity_loss(denoiser, still, places, 32, noise).item()
        assert loss == pytest.approx(error / counts_at**2, rel=1e-4)
        both = train.joined(places, train.straight(batch, 0.4, noise))
        assert both.weight.tolist() == [*places.weight.tolist(), 1, 1, 1]
        assert both.batch.captions == 2 * batch.captions
        assert torch.equal(both.img[:3], img)


def test_the_rate_falls_to_zero() -> None:
    def rate(step: int, first: int = 0, steps: int = 1500) -> float:
        args = Namespace(steps=steps, own_from=1000)
        return train.learning_rate(step, first, args) / train.LEARNING_RATE

    assert [rate(step) for step in (0, 49, 99, 999)] == pytest.approx([0.01, 0.5, 1, 1])
    assert [rate(step) for step in (1000, 1250, 1499)] == pytest.approx([1, 0.5, 0.002])
    assert [rate(step, first=1000) for step in (1000, 1250, 1499)] == pytest.approx([0.005, 0.25, 0.001])
    assert rate(400, steps=500) == pytest.approx(1)  # a run that is to go on later


def test_the_asked_share_of_times_lies_where_the_prompt_is_read() -> None:
    noise = torch.Generator().manual_seed(0)
    plain, early = (train.times(20_000, noise, share) for share in (0.0, 0.65))
    assert all(t.min() > 0 and t.max() <= 1 for t in (plain, early))
    # The rest is drawn as ever, and reaches there too.
    usual = (plain > 0.8).float().mean().item()
    assert (early > 0.8).float().mean().item() == pytest.approx(0.65 + 0.35 * usual, abs=0.02)


def test_straight_places_lie_between_noise_and_picture(pools: dict[bool, data.Pool]) -> None:
    batch = pools[True].batch(50, Random(0))
    places = train.straight(batch, 0.4, torch.Generator().manual_seed(0))
    t = places.t[:, None, None]
    torch.testing.assert_close(places.img - t * places.velocity, batch.target)
    noise = places.img + (1 - t) * places.velocity
    assert noise.std().item() == pytest.approx(1, abs=0.02)


def test_short_text_is_the_same_text_with_less_padding(tokenizers: Path) -> None:
    denoiser = model.Denoiser(tokenizers)
    texts = ["a small red star at the top left of a blue background", "a star", ""]
    for whole, short in zip(denoiser.tokenize(texts), denoiser.tokenize(texts, 16), strict=True):
        assert whole.shape == (3, 32)
        assert short.shape == (3, 16)
        assert torch.equal(whole[:, :16], short)
        assert (whole[:, 16:] == whole[2, -1]).all()
    assert all(ids.shape == (3, 32) for ids in denoiser.tokenize(texts, 8))  # one of them is longer


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


def test_curves_fall_and_rise_where_the_numbers_do(tmp_path: Path) -> None:
    # At 60 the run was stopped, and went on from 1.
    losses = [{"stage": "reading", "step": step, "loss": 100.0 / step} for step in (1, 30, 30, 60, 100)]
    losses.insert(2, {"stage": "reading", "step": 60, "loss": 90.0})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in losses))
    judged = [
        {"snapshot": f"average-{step:06}", "each": 9, "single": share} for step, share in ((200, 1.0), (100, 0.0))
    ]
    (tmp_path / "accuracy.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in judged))
    plot.curves(tmp_path)
    picture = np.asarray(Image.open(tmp_path / "loss.png").convert("RGB"))
    assert picture.shape == (2 * plot.HEIGHT, plot.WIDTH, 3)
    for panel, falls in zip(np.split(picture, 2), (True, False), strict=True):
        line = (panel == plot.COLORS[0]).all(-1)
        heights = [np.flatnonzero(line[:, x]).mean() for x in range(plot.LEFT + 5, plot.WIDTH - plot.RIGHT - 5, 50)]
        assert heights == sorted(heights, reverse=not falls)
        assert max(heights) - min(heights) > 0.8 * (plot.HEIGHT - plot.TOP - plot.BOTTOM)


def test_no_run_is_mistaken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"step": 50}, tmp_path / "denoiser.pt")

    def refused(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["train", "--run", str(tmp_path), "--out", str(tmp_path / "out"), *options])
        with pytest.raises(SystemExit):
            train.main()
        return capsys.readouterr().err

    assert f"--steps is 49, but the run in {tmp_path} has come to step 50 already" in refused("--steps", "49")
    for option, value, wanted in (
        ("--start", str(tmp_path), "must be the folder of a pipeline that this command wrote"),
        ("--start", "no/pipeline", "must be the folder of a pipeline that this command wrote"),
        ("--device", "gpu", "must be cpu, or cuda where there is a GPU, got 'gpu'"),
        *((option, "0", "must be at least 1") for option in ("--workers", "--steps", "--polish-steps")),
    ):
        assert wanted in refused(option, value)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "--compile takes a C++ compiler" in refused("--compile")
    assert "--own-from must not come before --edits-from" in refused("--edits-from", "5", "--own-from", "4")
    assert "goes on at step 2000, so --steps must be more, got 9" in refused("--start", "shapes", "--steps", "9")
    (tmp_path / "autoencoder-raw.pt").touch()
    assert f"another run has begun in {tmp_path}" in refused("--start", "shapes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["autoencoder-raw.pt", "denoiser.pt"]


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


def test_the_denoiser_goes_on_where_it_was_on_its_own_paths_too(
    tokenizers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "SAVE_EVERY", 2)
    monkeypatch.setattr(data, "CHUNK", 8)
    monkeypatch.setattr(train, "FIRST_CHUNKS", 1)
    monkeypatch.setattr(rollouts, "SAMPLES", 8)
    rolled: list[torch.Tensor] = []
    roll = rollouts.Rollouts.roll

    def watched(self: rollouts.Rollouts, averaged: model.Denoiser, predict: Fast, rng: Random) -> None:
        rolled.append(averaged.t5.shared.weight.clone())
        assert predict.model is averaged
        roll(self, averaged, predict, rng)

    monkeypatch.setattr(rollouts.Rollouts, "roll", watched)
    monkeypatch.setattr(rollouts, "STEPS", (2, 3))
    monkeypatch.setattr(train, "average_gradients", lambda parameters: None)
    monkeypatch.setattr(plot, "curves", lambda run: None)  # two steps are too few to log
    monkeypatch.setattr(train, "TOKENS", 250)
    own = [train.Portion(kinds, 0.4, own=True) for kinds in (train.PROMPTS, train.SHORT_EDITS)]
    monkeypatch.setattr(train, "portions", lambda step, rank, args: own)
    torch.manual_seed(0)
    encoder, t5 = Autoencoder(model.AUTOENCODER).state_dict(), model.Denoiser(tokenizers).t5.state_dict()

    def run(name: str, steps: int) -> dict:
        folder = tmp_path / name
        if not folder.exists():
            shutil.copytree(tokenizers, folder / "tokenizers")
            torch.save(encoder, folder / "autoencoder.pt")
            torch.save(t5, folder / "t5.pt")
        # Until `own_from`, the rate does not depend on how many steps there will be.
        args = Namespace(run=folder, steps=steps, seed=0, device=CPU, compile=False, edits_from=0, own_from=99)
        train.train_denoiser(0, args)
        return torch.load(folder / "denoiser.pt")

    whole = run("whole", 4)
    assert run("stopped", 2)["step"] == 2
    resumed = run("stopped", 4)
    assert whole["step"] == resumed["step"] == 4
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in whole["model"].items())
    assert all(map(torch.equal, whole["average"], resumed["average"]))
    assert len(rolled) == 3 * 2 * 2  # for prompts, short and long edits, at steps 0 and 2 of each run
    assert torch.equal(rolled[3], rolled[9])
    assert not torch.equal(rolled[0], rolled[3])  # by the averaged weights as they are then


def test_a_run_that_begins_from_a_pipeline_has_its_weights(tmp_path: Path) -> None:
    """Those of the bundled model, to the bit, and they can be written again."""
    bundled, run = resolve("shapes"), tmp_path / "run"
    run.mkdir()
    train.begin_from(bundled, run, step=10)
    state = torch.load(run / "denoiser.pt")
    assert (state["step"], state["first"]) == (10, 10)
    torch.save(state["average"], tmp_path / "average.pt")
    shutil.copytree(run / "tokenizers", tmp_path / "again")
    autoencoder = train.load_autoencoder(run / "autoencoder-whitened.pt")
    model.save_pipeline(tmp_path / "again", train.load_denoiser(run, tmp_path / "average.pt"), autoencoder)
    files = [path.relative_to(bundled) for path in bundled.rglob("*.safetensors")]
    assert len(files) == 4
    for file in files:
        shipped, written = load_file(bundled / file), load_file(tmp_path / "again" / file)
        assert shipped.keys() == written.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in shipped.items())


@pytest.mark.long  # makes tokenizers, an autoencoder and thousands of latents from nothing
def test_one_command_trains_resumes_and_writes_a_pipeline(tmp_path: Path) -> None:
    def command(run: str, out: str, steps: int, *more: str) -> None:
        few = ("--reading-steps", "50", "--autoencoder-steps", "2", "--polish-steps", "2")
        late = ("--steps", str(steps), "--edits-from", "1", "--own-from", "2")
        folders = ("--run", str(tmp_path / run), "--out", str(tmp_path / out))
        subprocess.run([sys.executable, "-m", "shapes.train", *folders, *few, *late, *more], cwd=TOOLS, check=True)

    def logged(run: str) -> list[dict]:
        return [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text().splitlines()]

    command("run", "out", 3)
    first = torch.load(tmp_path / "run" / "denoiser.pt")
    command("run", "out", 4)
    assert [entry["step"] for entry in logged("run") if entry["stage"] == "denoiser"] == [3, 4]
    assert sum(entry["stage"] == "reading" for entry in logged("run")) == 1  # not done again
    command("again", "better", 3, "--start", str(tmp_path / "out"))
    assert [(entry["stage"], entry["step"]) for entry in logged("again")] == [("denoiser", 3)]
    encoders = [model.load_pipeline(tmp_path / out)[1].encoder.state_dict() for out in ("out", "better")]
    assert all(torch.equal(tensor, encoders[1][name]) for name, tensor in encoders[0].items())
    last = torch.load(tmp_path / "run" / "denoiser.pt")
    assert (first["step"], last["step"]) == (3, 4)
    size = (model.PICTURE, model.PICTURE)
    snapshots = ("--run", str(tmp_path / "run"), "--each", "1", "--steps", "1")
    subprocess.run([sys.executable, "-m", "shapes.evaluate", *snapshots], cwd=TOOLS, check=True)
    judged = [json.loads(line) for line in (tmp_path / "run" / "accuracy.jsonl").read_text().splitlines()]
    assert [entry["snapshot"] for entry in judged] == ["average-000003", "average-000004"]
    assert Pipeline.from_pretrained(tmp_path / "out")("a red star", num_inference_steps=2).images[0].size == size
