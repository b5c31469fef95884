import itertools
import math
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.capture import capture
from fxcompress.evaluate import accuracy, mean_average_precision, recall, step_sqnr
from fxcompress.interpret import run as interpret
from fxcompress.signature import Inputs
from tools.demo_diffusion import STEPS, ClassPipeline
from tools.testbeds import TESTBEDS, Loaded, Plan, classify, denoise, detect, fashion, latent, load, video, weights
from tools.testbeds.fashion import Split
from tools.testbeds.train import Run, train

ROOT = Path(__file__).parents[1]
PUBLISHED = weights.published()
CLASSIFIERS = [name for name in PUBLISHED if TESTBEDS[name].metrics is classify.metrics]
SPACES = {denoise.metrics: denoise, latent.metrics: latent}
DENOISERS = [name for name in PUBLISHED if TESTBEDS[name].metrics in SPACES]
DETECTORS = [name for name in PUBLISHED if TESTBEDS[name].metrics is detect.metrics]
VIDEOS = [name for name in PUBLISHED if TESTBEDS[name].metrics is video.metrics]
LIMITS = {"resnet": 0.90, "mobilenet": 0.89, "convnext": 0.89, "vit": 0.87}
DRAWN = dict.fromkeys(DENOISERS, (0.85, 0.6, 8)) | {"unet_outliers": (0.75, 0.45, 12)}  # recognised, of the worst class, Fréchet


class Shelf(dict[str, Loaded]):
    """Loads what is asked for, once: the feed of a denoiser takes it some seconds to draw."""

    def __missing__(self, name: str) -> Loaded:
        return self.setdefault(name, load(name))


@pytest.fixture(scope="module")
def loaded():
    return Shelf()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_card_says_where_the_weights_come_from(name):
    card = weights.card(name)
    assert set(card) >= {"model", "parameters", "data", "data_sha256", "licence", "command", "plan", "cpu_minutes", "metrics"}
    assert card["command"] == f"python -m tools.testbeds.train {name}"
    assert card["cpu_minutes"] <= 45
    assert Plan(**card["plan"]) == TESTBEDS[name].plan
    assert card["parameters"] == sum(p.numel() for p in TESTBEDS[name].build().parameters())


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_are_as_good_as_their_card_says(loaded, name):
    """The subset is 3000 of the card's 10 000 images: its share differs by less than three standard errors of a draw without replacement."""
    bed = loaded[name]
    said = bed.card["metrics"]["accuracy"]
    error = math.sqrt(said * (1 - said) / 3000 * (1 - 3000 / 10_000))
    found = accuracy(classify.logits(bed.model), fashion.pixels(bed.test.images), bed.test.labels).value
    assert said >= LIMITS[name]
    assert abs(found - said) < 3 * error


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_damaged_classifier_is_not(loaded, name):
    bed = loaded[name]
    said = bed.card["metrics"]["accuracy"]
    model = TESTBEDS[name].build()
    model.load_state_dict(bed.model.state_dict())
    kernels = [p for p in model.eval().parameters() if p.dim() > 1]
    with torch.no_grad():
        for kernel in kernels[::4]:
            kernel.neg_()
    assert accuracy(classify.logits(model), fashion.pixels(bed.test.images[:500]), bed.test.labels[:500]).high < said - 0.05


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_draw_what_their_card_says(loaded, name):
    """100 samples, ten a class, seen by the ResNet: within three standard errors of the card's share of 1000."""
    said = loaded[name].card["metrics"]
    labels = torch.arange(100) % 10
    found = accuracy(classify.logits(loaded["resnet"].model), drawn(loaded, name, labels), labels).value
    assert abs(found - said["recognised"]) < 3 * math.sqrt(said["recognised"] * (1 - said["recognised"]) * (1 / 100 + 1 / 1000))
    recognised, worst, frechet = DRAWN[name]
    assert said["recognised"] >= recognised
    assert said["recall_worst_class"] >= worst
    assert said["frechet_ratio"] <= frechet
    assert said["nearest_ratio"] >= 0.9


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_listen_to_the_label(loaded, name):
    labels = torch.arange(50) % 10
    found = recall(classify.logits(loaded["resnet"].model), drawn(loaded, name, labels), (labels + 1) % 10)
    assert sum(found.values()) / 10 < 0.2


def drawn(loaded: dict[str, Loaded], name: str, labels: torch.Tensor) -> torch.Tensor:
    """As the ResNet sees it."""
    space = SPACES[TESTBEDS[name].metrics]
    return fashion.doubled(space.drawn(space.sample(loaded[name].model, labels, seed=2)))


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_keep_what_their_card_says(loaded, name):
    """80 clips, two a kind: within three standard errors of the card's shares of 400, far above those of chance and of other kinds."""
    said, kinds = loaded[name].card["metrics"], torch.arange(80) % video.KINDS
    clips, judge = video.sample(loaded[name].model, kinds, seed=2), loaded["video_judge"].model
    found = video.kept(judge, clips, kinds)
    for what, least in (("digit", 0.7), ("direction", 0.95)):  # by chance one in ten, one in four
        assert said[what] >= least
        assert abs(found[what] - said[what]) < 3 * math.sqrt(max(said[what] * (1 - said[what]), 0.01) * (1 / 80 + 1 / 400))
    assert video.kept(judge, clips, (kinds + 1) % video.KINDS)["direction"] < 0.2
    assert video.kept(judge, clips, (kinds + 4) % video.KINDS)["digit"] < 0.2


@pytest.mark.parametrize("name", [name for name in PUBLISHED if TESTBEDS[name].metrics is video.judging_metrics])
def test_the_judge_of_videos_is_as_good_as_its_card_says(loaded, name):
    clips = video.held_out(loaded[name].test, 500, seed=5)
    said, found = loaded[name].card["metrics"], video.kept(loaded[name].model, clips.videos, clips.kinds)
    assert said["both"] >= 0.85
    assert abs(found["both"] - said["both"]) < 3 * math.sqrt(said["both"] * (1 - said["both"]) * (1 / 500 + 1 / 2000))
    assert video.kept(loaded[name].model, clips.videos.flip(2), clips.kinds)["direction"] < 0.05  # played backwards


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_find_what_their_card_says(loaded, name):
    """On 400 other canvases; with every fourth kernel negated, next to nothing."""
    bed = loaded[name]
    asked = detect.held_out(bed.test, 400, seed=5)
    damaged = TESTBEDS[name].build().eval()
    damaged.load_state_dict(bed.model.state_dict())
    with torch.no_grad():
        for kernel in [p for p in damaged.parameters() if p.dim() > 1][::4]:
            kernel.neg_()
    found, broken = (mean_average_precision(detect.detections(m, asked.images), asked.truth()) for m in (bed.model, damaged))
    assert bed.card["metrics"]["map50"] >= 0.6
    assert abs(found - bed.card["metrics"]["map50"]) < 0.05
    assert broken < 0.3


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name == "vae"])
def test_an_autoencoder_keeps_what_its_card_says(loaded, name):
    bed, said = loaded[name], loaded[name].card["metrics"]
    x, z = fashion.pixels(bed.test.images), latent.encode(bed.model, bed.test.images)
    psnr = 10 * math.log10(4 / float(nn.functional.mse_loss(latent.decode(bed.model, z), x)))
    assert said["psnr"] >= 20
    assert abs(psnr - said["psnr"]) < 0.15
    assert 0.8 < float(z.std()) < 1.25


def test_the_pipeline_of_the_demo_samples_as_the_testbed_does(loaded):
    labels = torch.arange(4)
    pipe = ClassPipeline(loaded["unet"].model, denoise.scheduler())
    wanted = denoise.sample(loaded["unet"].model, labels, seed=3, how=denoise.sampler(STEPS))
    torch.testing.assert_close(pipe(labels, seed=3), wanted)
    assert not torch.allclose(pipe(labels.flip(0), seed=3), wanted, atol=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_calibration_and_evaluation_share_nothing(loaded, name):
    bed = loaded[name]
    first, second = ({row.numpy().tobytes() for item in feed for row in _images(item)} for feed in (bed.calibration, bed.evaluation))
    assert len(first) > 50
    assert len(second) > 50
    assert not first & second


def _images(item: object) -> torch.Tensor:
    return next(v for v in Inputs.of(item).kwargs.values() if v.dim() >= 4)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_captured_testbed_has_the_accuracy_of_the_model(loaded, name):
    """Metrics take any callable: here the program, run node by node."""
    bed = loaded[name]
    program = capture(bed.model, next(iter(bed.calibration)))
    x, labels = fashion.pixels(bed.test.images[:200]), bed.test.labels[:200]
    run_program = lambda rows: interpret(program, [rows])[0]  # noqa: E731
    assert accuracy(run_program, x, labels) == accuracy(classify.logits(bed.model), x, labels)


def test_a_compiled_testbed_is_judged_as_the_model_is(loaded):
    bed = loaded["resnet"]
    small = fxcompress.compile(bed.model, "int8-weight-only", next(iter(bed.calibration)), check="end")
    x, labels = fashion.pixels(bed.test.images[:500]), bed.test.labels[:500]
    found, said = (accuracy(classify.logits(model), x, labels).value for model in (small, bed.model))
    assert abs(found - said) <= 0.01


@pytest.mark.parametrize("name", DENOISERS)
def test_rounded_weights_show_on_the_states_of_both_models(loaded, name):
    """The noise of weights rounded to about 6 bits: small on given states, and of the same order on the states it leads to itself."""
    bed = loaded[name]
    rounded = TESTBEDS[name].build().eval()
    rounded.load_state_dict({k: _rounded(v) if v.dim() > 1 else v for k, v in bed.model.state_dict().items()})
    few = list(itertools.islice(bed.evaluation, 40))
    held_out = step_sqnr(bed.model, rounded, few)
    own = step_sqnr(bed.model, rounded, SPACES[TESTBEDS[name].metrics].states(rounded, seed=1, n=4))
    assert 10 < held_out.worst <= held_out.mean < 45
    assert 10 < own.worst <= own.mean < 45
    assert step_sqnr(bed.model, bed.model, few).worst == math.inf


def _rounded(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().max() / 31
    return (weight / step).round() * step


def _tiny(muon: float = 0.0) -> tuple[Run, Split]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(1024, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    plan = replace(TESTBEDS["resnet"].plan, steps=8, batch=16, muon=muon)

    def loss(model: nn.Module, data: Split, batch: int) -> torch.Tensor:
        at = torch.randint(len(data), (batch,))
        return nn.functional.cross_entropy(model(fashion.pixels(data.images[at])), data.labels[at])

    return Run(replace(TESTBEDS["resnet"], build=lambda: net, loss=loss, plan=plan)), fashion.read("train")


@pytest.mark.parametrize("muon", [0.0, 1e-2])
def test_an_interrupted_run_gives_the_same_weights(tmp_path, muon):
    whole, data = _tiny(muon)
    train(whole, data, tmp_path / "whole.pt", minutes=1)
    for minutes in (0, 1):  # the first stops after one step
        part, data = _tiny(muon)
        if minutes:
            train(part, data, tmp_path / "part.pt", minutes)
        else:
            with pytest.raises(SystemExit, match="after 1 steps"):
                train(part, data, tmp_path / "part.pt", minutes)
    assert part.step == whole.step == 8
    for a, b in zip(whole.model.state_dict().values(), part.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(whole.average[k], part.average[k]) for k in whole.average)


def test_muon_takes_the_weights_of_linear_layers_and_adamw_the_rest():
    """Orthogonal steps: after one, all singular values of a weight's change are alike, at the rate that adjust_lr_fn makes of the plan's."""
    run, data = _tiny(muon=1e-2)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert [len(group["params"]) for optimizer in run.optimizers for group in optimizer.param_groups] == [2, 0, 4]
    run.advance(data)
    weight = run.model.get_parameter("1.weight")
    rate = 1e-2 / 100  # the first of 100 warm-up steps
    change = weight.detach() - before["1.weight"] * (1 - rate * run.plan.weight_decay)
    sizes = torch.linalg.svdvals(change) / (rate * 0.2 * max(weight.shape) ** 0.5)
    assert sizes.min() > 0.5
    assert sizes.max() < 1.5
    assert all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    run, data = _tiny()
    train(run, data, tmp_path / "run.pt", minutes=1)
    other, _ = _tiny()
    other.plan = replace(other.plan, lr=1.0)
    with pytest.raises(SystemExit, match="another plan"):
        other.restore(tmp_path / "run.pt")


def test_files_of_the_data_set_are_read_and_written(tmp_path):
    subset = fashion.read("t10k")
    assert subset.images.shape == (3000, 28, 28)
    fashion.write("t10k", subset, tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (fashion.SUBSET / file.name).read_bytes()
    shown = fashion.pixels(subset.images[:2])
    assert torch.equal(shown[0, 0, 2:30, 2:30], subset.images[0] / 127.5 - 1)
    assert (shown[:, :, :2] == -1).all()
    assert fashion.halved(shown).shape == (2, 1, 16, 16)


def test_the_repository_stays_small():
    """Of what a clone checks out: 45 MB in all, 28 MB of weights, 8 MB the greatest of them."""
    sizes = {f: f.stat().st_size for f in _tracked()}
    trained = {f: size for f, size in sizes.items() if f.suffix == ".safetensors" and weights.FOLDER in f.parents}
    assert len(trained) == len(PUBLISHED)
    assert sum(sizes.values()) < 45e6
    assert sum(trained.values()) <= 28e6
    assert max(trained.values()) <= 8e6


def _tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    return [f for name in listed.stdout.decode().split("\0") if name and not (f := ROOT / name).is_symlink() and f.is_file()]
