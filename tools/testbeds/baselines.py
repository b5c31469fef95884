"""What rounding alone costs every testbed: min-max ranges, no correction, at W8A8, W6A6, W4A8 and W4A4. Every later method has to beat this.

    python -m tools.testbeds.baselines [NAME ...] [--widths W8A8 ...] [--samples 200] [--windows 4] [--json FILE]

NAME: all testbeds with weights if left out, and "smollm2", the language model, only if asked for.
Weights have one scale an output channel, activations one a value, from the range of the calibration feed; products of two activations inside
attention are rounded too. "fake" runs every code dequantised, in float, on the reference backend; "integer" is the artifact on ONNX Runtime,
whose share of multiplications in integer kernels is read back. The weights are the committed ones in float32. Beside each figure stands
what it is worth: the half-width of its 95 % interval or, in brackets, the same figure of the float model drawn from other noise.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress.calibrate import Feed
from fxcompress.evaluate import (
    Estimate,
    Rollout,
    accuracy,
    bootstrap,
    frame_difference_error,
    frechet,
    image_snr,
    mask_iou,
    mean_average_precision,
    noise_floor,
    paired_distance,
    rollout,
)
from tools.testbeds import (
    EVALUATION,
    TESTBEDS,
    Loaded,
    classify,
    denoise,
    detect,
    fashion,
    language,
    latent,
    load,
    scenes,
    segment,
    video,
    weights,
)
from tools.testbeds.widths import macs_by_width

WIDTHS = {"W8A8": ("int8", "uint8"), "W6A6": ("int6", "uint6"), "W4A8": ("int4", "uint8"), "W4A4": ("int4", "uint4")}
INTEGER = "W8A8"  # what ONNX Runtime has integer kernels for
Figures = dict[str, str]
Models = dict[str, Callable[..., Any]]
Judge = Callable[[Models], Figures]


def main() -> None:
    """Print a row for each model and width as it is measured."""
    options = _options()
    torch.set_num_threads(1)
    rows = []
    for name in options.names or weights.published():
        for row in rows_of(subject(name, options.samples, options.windows), options.widths):
            rows.append({"model": name, **row})
            print(line(rows[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--widths", nargs="+", choices=WIDTHS, default=list(WIDTHS))
    parser.add_argument("--samples", type=int, default=200, help="drawn by each diffusion model")
    parser.add_argument("--windows", type=int, default=4, help="of 256 tokens of each domain")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


@dataclass(frozen=True)
class Subject:
    """A model, how models of its kind are judged, and a calibration feed for each way in which it is called."""

    model: nn.Module
    judge: Judge
    feeds: dict[str, Feed]


def rows_of(subject: Subject, widths: list[str]) -> Iterator[dict[str, Any]]:
    """The float model's row, then one for each width, with a second one for what runs in integers."""
    yield {"width": "float", "runs": "float", "figures": subject.judge(dict.fromkeys(subject.feeds, subject.model))}
    for width in widths:
        for runs, backend in [("fake", "reference"), ("integer", "onnxruntime")][: 1 + (width == INTEGER)]:
            start = time.process_time()
            made = {kind: compiled(subject.model, feed, _rounded(width), backend) for kind, feed in subject.feeds.items()}
            row = {"width": width, "runs": runs, "macs": _shares(next(iter(made.values())), runs), "figures": subject.judge(made)}
            yield row | {"cpu_seconds": round(time.process_time() - start, 1)}


def _shares(made: fxc.CompiledModel, runs: str) -> dict[str, float]:
    assert made.program is not None
    assert made.report.backend is not None
    return {"integer": made.report.backend.integer_share or 0.0} if runs == "integer" else macs_by_width(made.program)


def compiled(model: nn.Module, feed: Feed, recipe: dict[str, Any], backend: str) -> fxc.CompiledModel:
    """A model under a recipe, calibrated on the feed whose first item is the example, in one thread."""
    return fxc.compile(model, recipe, next(iter(feed)), calibration=feed, backend=backend, check="off", threads=1)


def _rounded(width: str) -> dict[str, Any]:
    """Rounding to nearest on min-max ranges, as a recipe."""
    weight, activation = WIDTHS[width]
    insert = {"weights": f"{weight}/channel", "activations": f"{activation}/tensor", "range": "minmax"}
    tidy = ["tidy.fold_constants", "tidy.fold_batch_norm", "tidy.open_attention"]
    return {"name": width.lower(), "passes": [*tidy, {"quant.insert": insert}, "quant.finalize"]}


def subject(name: str, samples: int, windows: int) -> Subject:
    """A testbed by name, judged on as many samples, if it draws, or windows, if it reads."""
    if name == "smollm2":
        model, tokenizer = language.load()
        return Subject(model, lambda models: _read(models[""], tokenizer, windows), {"": language.feed(tokenizer)})
    loaded, metrics = load(name), TESTBEDS[name].metrics
    feeds = {"": loaded.calibration}
    if metrics is segment.metrics:
        few = fashion.read("train")
        feeds = {kind: segment.feed(few, 0, kind=kind) for kind in segment.PROMPTS}
    return Subject(loaded.model, JUDGES[metrics](loaded, samples), feeds)


def _read(model: Callable[..., Any], tokenizer: Any, windows: int) -> Figures:
    with torch.no_grad():
        found = language.perplexities(lambda ids: model(input_ids=ids).logits, tokenizer, windows)
    return {f"perplexity, {domain}": f"{p.value:.1f} ± {(p.high - p.low) / 2:.1f}" for domain, p in found.items()}


def _classified(loaded: Loaded, samples: int) -> Judge:
    x, labels = fashion.pixels(loaded.test.images), loaded.test.labels

    def judge(models: Models) -> Figures:
        both = [torch.cat([m(pixel_values=rows).logits.detach() for rows in x.split(250)]).argmax(1) for m in (models[""], loaded.model)]
        share = bootstrap(lambda hits: float(hits.mean()), (both[0] == labels).double())
        return {"accuracy": _percent(share), "other answer than float": f"{float((both[0] != both[1]).double().mean()):.1%}"}

    return judge


def _segmented(loaded: Loaded, samples: int) -> Judge:
    asked = scenes.held_out(loaded.test, 500, seed=EVALUATION + 1)
    return lambda models: {f"IoU, {kind}": _percent(mask_iou(segment.masks(model, asked, kind), asked.masks)) for kind, model in models.items()}


def _detected(loaded: Loaded, samples: int) -> Judge:
    """In brackets the float model's figure on as many other canvases."""
    asked, others = (detect.held_out(loaded.test, 500, seed=seed) for seed in (EVALUATION + 1, EVALUATION + 2))

    def figure(model: Callable[..., Any], canvases: detect.Canvases) -> float:
        return mean_average_precision(detect.detections(model, canvases.images), canvases.truth())

    floor = figure(loaded.model, others)
    return lambda models: {"mAP50": f"{figure(models[''], asked):.3f} [{floor:.3f}]"}


def _decoded(loaded: Loaded, samples: int) -> Judge:
    """Of images that went through the autoencoder and back."""
    x, labels = fashion.pixels(loaded.test.images[:1000]), loaded.test.labels[:1000]
    resnet = classify.logits(weights.read(classify.resnet(), "resnet"))

    def judge(models: Models) -> Figures:
        with torch.no_grad():
            mine, floats = (torch.cat([m(sample=rows).sample for rows in x.split(50)]) for m in (models[""], loaded.model))
        figures = {"recognised": _percent(accuracy(resnet, mine, labels)), "dB to the image": f"{image_snr(x, mine).mean:.1f}"}
        return figures if models[""] is loaded.model else figures | {"dB to float's": f"{image_snr(floats, mine).mean:.1f}"}

    return judge


class _Denoised:
    """Judges samples from one noise: what the ResNet sees in them, their distance to real images and to the float model's samples."""

    def __init__(self, loaded: Loaded, samples: int, space: Any = denoise) -> None:
        self.loaded, self.space, self.labels = loaded, space, torch.arange(samples) % len(fashion.CLASSES)
        self.how = space.sampler(guidance=loaded.card["metrics"]["guidance"])
        self.resnet = weights.read(classify.resnet(), "resnet")
        self.real = self._features(denoise.images(loaded.test))
        floor = noise_floor(frechet, self.real, samples, 2000)
        self.floor = sum(floor) / len(floor)
        self.other = self._features(space.drawn(space.sample(loaded.model, self.labels, seed=3, how=self.how)))

    def __call__(self, models: Models) -> Figures:
        asked = {"shape": self.space.SHAPE, "conditions": self.space.conditions(self.labels), "seed": 2}
        found = rollout(self.loaded.model, models[""], self.how, len(self.labels), **asked)
        reference, changed = (self.space.drawn(samples) for samples in (found.reference, found.changed))
        mine, floats = self._features(changed), self._features(reference)
        figures = {
            "recognised": _percent(accuracy(classify.logits(self.resnet), fashion.doubled(changed), self.labels)),
            "Fréchet, real": f"{frechet(mine, self.real[:2000]) / self.floor:.2f} x real",
        }
        if models[""] is self.loaded.model:
            return figures
        return figures | {"Fréchet, float's samples": f"{frechet(mine, floats):.2f} [{frechet(self.other, floats):.2f}]"} | _apart(found)

    def _features(self, x: Tensor) -> Tensor:
        return classify.features(self.resnet, fashion.doubled(x))


def _judged(loaded: Loaded, samples: int) -> Judge:
    """The share of clips whose digit and direction are both recognised."""
    clips = video.held_out(loaded.test, 1000, seed=EVALUATION + 1)
    return lambda models: {
        name: _percent(bootstrap(lambda rows: float(rows.mean()), right.double()))
        for name, right in video.hits(models[""], clips.videos, clips.kinds).items()
    }


class _Filmed:
    """Judges clips from one noise: digits and directions that the judge sees, distances to real clips and to the float model's."""

    def __init__(self, loaded: Loaded, samples: int) -> None:
        self.loaded, self.kinds = loaded, torch.arange(samples) % video.KINDS
        self.by = weights.read(video.judge(), "video_judge")
        self.real = video.features(self.by, video.held_out(loaded.test, 3000, seed=2).videos)
        floor = noise_floor(frechet, self.real, samples, 2000)
        self.floor = sum(floor) / len(floor)
        self.other = video.sample(loaded.model, self.kinds, seed=3)

    def __call__(self, models: Models) -> Figures:
        asked = {"shape": video.SHAPE, "conditions": video.conditions(self.kinds), "seed": 2}
        found = rollout(self.loaded.model, models[""], video.sampler(), len(self.kinds), **asked)
        mine, floats, other = (video.features(self.by, x) for x in (found.changed, found.reference, self.other))
        hits = video.hits(self.by, found.changed, self.kinds)
        figures = {name: _percent(bootstrap(lambda rows: float(rows.mean()), right.double())) for name, right in hits.items()}
        figures["Fréchet, real"] = f"{frechet(mine, self.real[:2000]) / self.floor:.2f} x real"
        if models[""] is self.loaded.model:
            return figures
        flicker = frame_difference_error(found.reference, found.changed).value
        return (
            figures
            | {
                "Fréchet, float's samples": f"{frechet(mine, floats):.2f} [{frechet(other, floats):.2f}]",
                "frame differences": f"{flicker:.3f} [{frame_difference_error(found.reference, self.other).value:.3f}]",
            }
            | _apart(found)
        )


def _apart(found: Rollout) -> Figures:
    paired = paired_distance(found.reference, found.changed)
    return {
        "distance, same noise": f"{paired.value:.3f} [1]",
        "dB, float's states": f"{found.given.mean:.1f}, worst {found.given.worst:.1f}",
        "dB, own states": f"{found.own.mean:.1f}, worst {found.own.worst:.1f}",
    }


JUDGES: dict[Any, Callable[[Loaded, int], Judge]] = {
    classify.metrics: _classified,
    segment.metrics: _segmented,
    detect.metrics: _detected,
    latent.coding_metrics: _decoded,
    denoise.metrics: _Denoised,
    latent.metrics: partial(_Denoised, space=latent),
    video.metrics: _Filmed,
    video.judging_metrics: _judged,
}


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.1f} ± {50 * (share.high - share.low):.1f} %"


def line(row: dict[str, Any]) -> str:
    """A row of a table."""
    shares = ", ".join(f"{width} {share:.1%}" for width, share in row.get("macs", {}).items())
    figures = "; ".join(f"{name} {value}" for name, value in row["figures"].items())
    return f"| {row['model']} | {row['width']} | {row['runs']} | {shares} | {figures} |"


if __name__ == "__main__":
    main()
