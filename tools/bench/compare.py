"""Static int8 by fxcompress, NNCF and onnxruntime.quantization: same model, same calibration items, one thread, one process a row.

    python -m tools.bench.compare [--only NAME ...] [--runs 30] [--json FILE]

Needs nncf and openvino (pip install nncf openvino). Models: ResNet, ViT, BERT, a diffusion UNet, DiT and a Llama of transformers and diffusers,
weights drawn, and the trained classifiers of tools/testbeds. Rivals run a small grid of their own options; the one with the best SQNR on the
calibration items is kept. Sizes are fixed for all (`dynamic={}`), since the files that rivals are given take those of the example only; a file
for any batch is slower, on OpenVINO by up to a half. Per row, as ratios of fxcompress to the rival:

    quantise   captured Program -> finalised Program, against the rival's quantise call on the exported model (CPU seconds)
    to file    nn.Module -> file, each through its own exporter (CPU seconds; peak memory beside it)
    latency    one call of the file in the plain runtime, both in one process in turn: median over the median
    SQNR       of the outputs on held-out items against the float model, in dB, higher is better
    task       share of 2 976 test images that are recognised, of trained classifiers; mean IoU of 400 held-out objects asked for by boxes, of
               the trained segmenter's decoder on the float encoder's embeddings
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ITEMS, HELD_OUT, BATCH = 8, 4, 32
SCENES, SAM_BATCH = 200, 8
TRAINED = ("resnet", "vit", "mobilenet", "sam-encoder", "sam-decoder")
MODELS = ("resnet", "vit", "bert", "unet", "dit", "llama", *(f"{name}-trained" for name in TRAINED))
PAIRS = (("fxcompress-ov", "nncf-ov"), ("fxcompress-ort", "ort-static"))


def main() -> None:
    """Every model with every tool, each in its own process; then the table."""
    options = _options()
    if options.one:
        print(json.dumps(row(*options.one)))
    elif options.race:
        print(json.dumps(raced(*options.race, options.runs)))
    else:
        rows = [r for name in options.only or MODELS for pair in PAIRS for r in _pair(name, pair, options.runs)]
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))
        _print(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=MODELS)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--race", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def row(name: str, tool: str, folder: str) -> dict[str, Any]:
    """One model through one tool in this process; the file stays in the folder."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    model, draw = built(name)
    items = [draw(seed) for seed in range(ITEMS)]
    unseen = [draw(1000 + seed) for seed in range(HELD_OUT)]
    with torch.no_grad():
        wanted = [_first(model(**item)) for item in unseen]
    kind, runtime = tool.split("-")
    quantise, to_file, file, size = {"fxcompress": _ours, "nncf": _nncf, "ort": _ort}[kind](model, items, runtime, Path(folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    call = opened(file)
    return {
        "model": name,
        "tool": tool,
        "quantise": quantise,
        "to_file": to_file,
        "sqnr": _sqnr(wanted, [call(item) for item in unseen]),
        "task": _task(name, call),
        "peak_mb": peak,
        "bytes": size,
        "file": str(file),
    }


def raced(name: str, mine: str, theirs: str, runs: int) -> list[float]:
    """Median milliseconds of one call of each file, in turn."""
    item = built(name)[1](1000)
    calls = [opened(Path(file)) for file in (mine, theirs)]
    times: list[list[float]] = [[], []]
    for turn in range(runs + 3):
        for call, taken in zip(calls, times, strict=True):
            start = time.process_time()
            call(item)
            if turn >= 3:
                taken.append(1e3 * (time.process_time() - start))
    return [statistics.median(taken) for taken in times]


def opened(file: Path) -> Callable[[dict[str, Any]], Any]:
    """The file in its runtime, one thread: first output by an item. The last part of its folder's name is the runtime."""
    if file.parent.name.endswith("ov"):
        import openvino as ov

        core = ov.Core()
        return _openvino(core, core.read_model(file))
    return _onnxruntime(file)


def _task(name: str, call: Callable[[dict[str, Any]], Any]) -> float | None:
    if not name.endswith("-trained") or name.startswith("sam-encoder"):
        return None
    if name.startswith("sam-decoder"):
        return _segmented(call)
    from tools.testbeds import fashion, load

    test = load(name.removesuffix("-trained")).test
    batches = list(zip(fashion.pixels(test.images).split(BATCH), test.labels.split(BATCH), strict=True))
    hits = [call({"pixel_values": x}).argmax(-1) == y for x, y in batches if len(x) == BATCH]  # rivals' files are of one batch size
    return float(sum(h.float().sum() for h in hits) / (len(hits) * BATCH))


def _segmented(call: Callable[[dict[str, Any]], Any]) -> float:
    import torch
    import torch.nn.functional as F  # noqa: N812 - as everybody writes it

    from fxcompress.evaluate import mask_iou
    from tools.testbeds import load, scenes

    _, draw = _segmenter("sam-decoder")
    asked = scenes.held_out(load("sam").test, SCENES, seed=1)
    low = [call(draw(1000 + i))[:, :, 0] for i in range(SCENES // SAM_BATCH)]
    found = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False) > 0 for x in low]
    return mask_iou(torch.cat(found), asked.masks).value


def _segmenter(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """The segmenter's encoder, or its decoder on what the encoder gives; items are batches of 8 scenes, to calibrate on of training images."""
    import torch

    from tools.testbeds import fashion, load, scenes

    found = load("sam")
    model, images = found.model, {False: fashion.read("train"), True: found.test}
    drawn = {held: scenes.held_out(images[held], SCENES, seed=int(held)) for held in (False, True)}

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, image_embeddings: Any, input_boxes: Any) -> Any:
            return self.model(image_embeddings=image_embeddings, input_boxes=input_boxes, multimask_output=False).pred_masks

    def draw(seed: int) -> dict[str, Any]:
        start = SAM_BATCH * (seed % 1000)
        rows = slice(start, start + SAM_BATCH)
        pixels = {"pixel_values": 2 * drawn[seed >= 1000].images[rows]}
        if name == "sam-encoder":
            return pixels
        with torch.no_grad():
            return {"image_embeddings": model.vision_encoder(**pixels).last_hidden_state, "input_boxes": drawn[seed >= 1000].boxes[rows]}

    return (model.vision_encoder if name == "sam-encoder" else Decoder()).eval(), draw


def built(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """The model in eval mode and what draws one item of its inputs from a seed."""
    import torch
    import transformers as t
    from diffusers import DiTTransformer2DModel, UNet2DModel

    torch.manual_seed(0)
    if name.endswith("-trained"):
        return _trained(name.removesuffix("-trained"))
    image = {"pixel_values": (3, 64, 64)}
    noisy = {"sample": (3, 32, 32)}
    if name == "resnet":
        return _drawn(
            t.ResNetForImageClassification(t.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 256], depths=[2, 2, 2, 2])), image
        )
    if name == "vit":
        config = t.ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=64, patch_size=8)
        return _drawn(t.ViTForImageClassification(config), image)
    if name == "bert":
        config = t.BertConfig(hidden_size=192, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768, vocab_size=1000)
        return _drawn(t.BertModel(config), {}, ids=1000)
    if name == "unet":
        down, up = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        model = UNet2DModel(32, 3, 3, block_out_channels=(64, 128), down_block_types=down, up_block_types=up, layers_per_block=1)
        return _drawn(model, noisy, timestep=True)
    if name == "dit":
        config_ = {"num_attention_heads": 4, "attention_head_dim": 48, "in_channels": 3, "num_layers": 4, "sample_size": 32, "patch_size": 2}
        model = DiTTransformer2DModel(**config_, num_embeds_ada_norm=10)
        return _drawn(model, {"hidden_states": (3, 32, 32)}, timestep=True, labels=True)
    config = t.LlamaConfig(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, vocab_size=1000, use_cache=False)
    return _drawn(t.LlamaForCausalLM(config), {}, ids=1000)


def _trained(name: str) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """A testbed; its items are batches of 32 images, those to calibrate on from the training split."""
    from tools.testbeds import fashion, load

    if name.startswith("sam"):
        return _segmenter(name)
    found = load(name)
    images = {False: fashion.pixels(fashion.read("train").images), True: fashion.pixels(found.test.images)}

    def draw(seed: int) -> dict[str, Any]:
        start = BATCH * (seed % 1000)
        return {"pixel_values": images[seed >= 1000][start : start + BATCH]}

    return found.model, draw


def _drawn(
    model: Any, shapes: dict[str, tuple[int, ...]], ids: int = 0, timestep: bool = False, labels: bool = False
) -> tuple[Any, Callable[[int], dict[str, Any]]]:
    """Gains, biases and running statistics drawn too, so that nothing is degenerate."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point() and value.dim() == 1:
                value.mul_(1 + 0.2 * torch.randn(value.shape, generator=generator).clamp(-2, 2)).add_(
                    0.1 * torch.rand(value.shape, generator=generator)
                )
        for name, value in model.named_parameters():
            if name.endswith("linear.weight") and not value.any():
                value.copy_(0.02 * torch.randn(value.shape, generator=generator))

    def draw(seed: int) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        item: dict[str, Any] = {k: torch.randn(2, *shape, generator=g) for k, shape in shapes.items()}
        if ids:
            item["input_ids"] = torch.randint(0, ids, (2, 32), generator=g)
        if timestep:
            item["timestep"] = torch.randint(0, 1000, (2,), generator=g)
        if labels:
            item["class_labels"] = torch.randint(0, 10, (2,), generator=g)
        return item

    return model.eval(), draw


Made = tuple[float, float, Path, int]  # CPU seconds to quantise, and to the file; the file; its bytes with all it needs


def _ours(model: Any, items: Sequence[dict[str, Any]], runtime: str, folder: Path) -> Made:
    import fxcompress as fxc
    from fxcompress.registry import find_backend

    backend = {"ort": "onnxruntime", "ov": "openvino"}[runtime]
    find_backend(backend)  # imported before the clock starts, as the rivals are
    start = time.process_time()
    compiled = fxc.compile(model, "int8", example_inputs=items[0], calibration=items, backend=backend, threads=1, dynamic={})
    to_file = time.process_time() - start
    quantise = sum(p.cpu_seconds for p in compiled.report.passes)
    path = compiled.save(folder / f"ours-{runtime}")
    return quantise, to_file, path / "model.onnx", sum((path / file).stat().st_size for file in ("model.onnx", "weights.bin"))


def _exported(model: Any, item: dict[str, Any], path: Path) -> None:
    import torch

    names = list(item)

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Any) -> Any:
            return _first(self.model(**dict(zip(names, values, strict=True))))

    with torch.no_grad():
        torch.onnx.export(
            Positional().eval(), tuple(item.values()), str(path), dynamo=True, input_names=names, opset_version=18, external_data=False
        )


def _nncf(model: Any, items: Sequence[dict[str, Any]], runtime: str, folder: Path) -> Made:
    import nncf
    import openvino as ov

    start = time.process_time()
    _exported(model, items[0], folder / "float.onnx")
    core = ov.Core()
    feeds = [{k: v.numpy() for k, v in item.items()} for item in items]
    exported = time.process_time() - start
    best: tuple[float, float, Any] | None = None
    for preset in (nncf.QuantizationPreset.MIXED, nncf.QuantizationPreset.PERFORMANCE):
        for kind in (None, nncf.ModelType.TRANSFORMER):
            begun = time.process_time()
            quantised = nncf.quantize(core.read_model(folder / "float.onnx"), nncf.Dataset(feeds), preset=preset, model_type=kind)
            took = time.process_time() - begun
            call = _openvino(core, quantised)
            found = _sqnr([_float(model, i) for i in items], [call(i) for i in items])
            if best is None or found > best[0]:
                best = found, took, quantised
    assert best is not None
    (folder / "nncf-ov").mkdir()
    file = folder / "nncf-ov" / "model.xml"
    ov.save_model(best[2], file)
    return best[1], exported + best[1], file, file.stat().st_size + file.with_suffix(".bin").stat().st_size


def _openvino(core: Any, model: Any) -> Callable[[dict[str, Any]], Any]:
    import torch

    compiled = core.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"})
    return lambda item: torch.from_numpy(compiled([v.numpy() for v in item.values()])[0].copy())


def _ort(model: Any, items: Sequence[dict[str, Any]], runtime: str, folder: Path) -> Made:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    start = time.process_time()
    _exported(model, items[0], folder / "float.onnx")
    quant_pre_process(str(folder / "float.onnx"), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
    exported = time.process_time() - start
    best: tuple[float, float, Path] | None = None
    for number, method in enumerate((CalibrationMethod.MinMax, CalibrationMethod.Percentile)):
        path = folder / f"ort{number}.onnx"
        begun = time.process_time()
        quantize_static(
            str(folder / "prepared.onnx"),
            str(path),
            _Reader(items),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=method,
        )
        took = time.process_time() - begun
        call = _onnxruntime(path)
        found = _sqnr([_float(model, i) for i in items], [call(i) for i in items])
        if best is None or found > best[0]:
            best = found, took, path
    assert best is not None
    return best[1], exported + best[1], best[2], best[2].stat().st_size


class _Reader:
    """onnxruntime's form of a feed."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self.items = iter(items)

    def get_next(self) -> dict[str, Any] | None:
        item = next(self.items, None)
        return None if item is None else {k: v.numpy() for k, v in item.items()}


def _onnxruntime(path: Path) -> Callable[[dict[str, Any]], Any]:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda item: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in item.items()})[0])


def _float(model: Any, item: dict[str, Any]) -> Any:
    import torch

    with torch.no_grad():
        return _first(model(**item))


def _first(result: Any) -> Any:
    import torch

    if isinstance(result, torch.Tensor):
        return result
    return next(v for v in (result.values() if isinstance(result, dict) else result) if isinstance(v, torch.Tensor))


def _sqnr(wanted: Sequence[Any], outputs: Sequence[Any]) -> float:
    import torch

    from fxcompress.numerics.noise import sqnr

    return sqnr(torch.stack([w.float() for w in wanted]), torch.stack([o.float() for o in outputs]))


def _pair(name: str, pair: tuple[str, str], runs: int) -> list[dict[str, Any]]:
    """The rows of both tools with their latencies."""
    with tempfile.TemporaryDirectory() as folder:
        rows = [_asked("--one", name, tool, folder) for tool in pair]
        if not any("failed" in r for r in rows):
            times = _asked("--race", name, *(r["file"] for r in rows), runs=runs)
            rows = [{**r, "latency_ms": t} for r, t in zip(rows, times, strict=True)]
    return [{"model": name, "tool": tool, **r} for tool, r in zip(pair, rows, strict=True)]


def _asked(*question: str, runs: int = 1) -> Any:
    command = [sys.executable, "-m", "tools.bench.compare", *question, "--runs", str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def _pairs(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    found = {(r["model"], r["tool"]): r for r in rows}
    for name in dict.fromkeys(r["model"] for r in rows):
        for mine, theirs in PAIRS:
            yield found[name, mine], found[name, theirs]


def _print(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("model", "against", "quantise", "to file", "latency", "SQNR, dB", "task, %", "peak MB", "bytes", "losses")
    for mine, theirs in _pairs(rows):
        if "failed" in mine or "failed" in theirs:
            table.add_row(mine["model"], theirs["tool"], *[""] * 7, f"{mine.get('failed', '')} | {theirs.get('failed', '')}")
            continue
        ratio = {k: mine[k] / theirs[k] for k in ("quantise", "to_file", "latency_ms", "peak_mb", "bytes")}
        losses = [k for k, limit in (("quantise", 0.5), ("to_file", 1.0), ("latency_ms", 1.05), ("peak_mb", 1.0)) if ratio[k] > limit]
        losses += ["sqnr"] if mine["sqnr"] < theirs["sqnr"] - 0.2 else []
        table.add_row(
            mine["model"],
            theirs["tool"],
            *(f"{ratio[k]:.2f}" for k in ("quantise", "to_file", "latency_ms")),
            f"{mine['sqnr']:.1f} / {theirs['sqnr']:.1f}",
            "" if mine["task"] is None else f"{100 * mine['task']:.2f} / {100 * theirs['task']:.2f}",
            f"{ratio['peak_mb']:.2f}",
            f"{ratio['bytes']:.2f}",
            ", ".join(losses),
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
