"""Trains one testbed: `python -m tools.testbeds.train NAME [--data FOLDER] [--minutes N]`. Started again, it goes on where it stopped.

Each step draws from a seed of its own, so a run that was interrupted gives the weights of one that wasn't. It trains on a GPU where there is
one, from the same first weights but with that device's random numbers; the card says so. Minutes are CPU time of one thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.testbeds import TESTBEDS, Plan, Testbed, fashion, weights
from tools.testbeds.fashion import Split

EVERY = 300  # seconds between checkpoints


class Run:
    """The state of one training run: everything that a checkpoint holds."""

    def __init__(self, testbed: Testbed) -> None:
        self.testbed, self.plan = testbed, testbed.plan
        torch.manual_seed(self.plan.seed)
        with torch.device("cpu"):
            model = testbed.build()
        form = torch.channels_last if self.plan.channels_last else torch.contiguous_format
        self.model = model.train().to(torch.get_default_device(), memory_format=form)
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.optimizers = _optimizers(self.model, self.plan)
        self.step, self.seconds, self.made_by = 0, 0.0, _made_by()

    def advance(self, data: Split) -> float:
        """One step; gives the loss."""
        torch.manual_seed(self.plan.seed * 1_000_003 + self.step + 1)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * self._share()
        loss = self.testbed.loss(self.model, data, self.plan.batch)
        self.model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        with torch.no_grad():
            decay = min(self.plan.ema, self.step / (self.step + 10))
            torch._foreach_lerp_(list(self.average.values()), list(self.model.parameters()), 1 - decay)
        return loss.item()

    def _share(self) -> float:
        return min(1.0, (self.step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * self.step / self.plan.steps))

    def save(self, path: Path) -> None:
        """Under its name only once it is whole."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        content = {"model": self.model.state_dict(), "average": self.average, "optimizers": optimizers}
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(content | {"step": self.step, "seconds": self.seconds, "made_by": self.made_by, "plan": asdict(self.plan)}, part)
        part.rename(path)

    def restore(self, path: Path) -> None:
        """SystemExit for a checkpoint of another plan."""
        content = torch.load(path, weights_only=True, map_location=torch.get_default_device())
        if content["plan"] != asdict(self.plan):
            raise SystemExit(f"{path} was trained by another plan: {content['plan']}; remove it")
        self.model.load_state_dict(content["model"])
        self.average = content["average"]
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.seconds, self.made_by = content["step"], content["seconds"], content["made_by"]


def _optimizers(model: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    """AdamW, and before it Muon for the weights of linear layers if the plan has a rate for it."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad] if plan.muon else []
    rest = [p for p in model.parameters() if not any(p is weight for weight in linear)]
    decayed, others = [p for p in rest if p.dim() > 1], [p for p in rest if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=plan.lr, betas=(0.9, 0.99))
    if not linear:
        return [adamw]
    return [torch.optim.Muon(linear, lr=plan.muon, weight_decay=plan.weight_decay, adjust_lr_fn="match_rms_adamw"), adamw]


def _made_by() -> dict[str, str]:
    device = torch.get_default_device()
    return {"device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU", "torch": str(torch.__version__)}


def train(run: Run, data: Split, checkpoint: Path, minutes: float) -> None:
    """Steps until the plan is done. SystemExit, with everything kept, once the CPU minutes are spent."""
    if checkpoint.exists():
        run.restore(checkpoint)
    before, saved = time.process_time() - run.seconds, time.monotonic()
    while run.step < run.plan.steps:
        loss = run.advance(data)
        run.seconds = time.process_time() - before
        if run.step % 100 == 0:
            print(f"step {run.step}/{run.plan.steps}  loss {loss:.4f}  {run.seconds / 60:.2f} CPU min", flush=True)
        if time.monotonic() - saved > EVERY or run.step == run.plan.steps:
            run.save(checkpoint)
            saved = time.monotonic()
        if run.seconds > 60 * minutes:
            run.save(checkpoint)
            raise SystemExit(f"{minutes} CPU minutes are spent after {run.step} steps")


def publish(name: str, run: Run, folder: Path) -> dict[str, Any]:
    """Weights in half precision and their card; the figures are those of the weights as they are on disk."""
    train_split, test = (fashion.read(split, folder) for split in ("train", "t10k"))
    run.model.load_state_dict(run.average, strict=False)
    run.model.cpu()
    run.testbed.finish(run.model, train_split)
    weights.save(run.model, name)
    model = weights.read(run.testbed.build(), name)
    card = {
        "model": f"{type(model).__name__} of {type(model).__module__.partition('.')[0]}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": run.testbed.source.words,
        "data_sha256": {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.glob("*.gz"))},
        **({"note": run.testbed.note} if run.testbed.note else {}),
        "licence": f"of the data: {run.testbed.source.licence}; of the weights: Apache-2.0",
        "command": f"python -m tools.testbeds.train {name}",
        "plan": asdict(run.plan),
        "cpu_minutes": round(run.seconds / 60, 1),
        **run.made_by,
        "metrics": {key: round(value, 4) for key, value in run.testbed.metrics(model, train_split, test).items()},
    }
    (weights.FOLDER / f"{name}.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    return card


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=TESTBEDS)
    parser.add_argument("--data", type=Path, help="the folder of the four idx .gz files, if it isn't where Debian's package puts it")
    parser.add_argument("--checkpoints", type=Path, default=Path(".cache/testbeds"))
    parser.add_argument("--minutes", type=float, default=45.0, help="CPU minutes after which it stops, to go on later")
    options = parser.parse_args()
    torch.set_num_threads(1)
    testbed = TESTBEDS[options.name]
    folder = options.data or testbed.source.whole
    data = fashion.read("train", folder)
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(testbed)
    train(run, data.to(torch.get_default_device()), options.checkpoints / f"{options.name}.pt", options.minutes)
    torch.set_default_device("cpu")
    print(json.dumps(publish(options.name, run, folder)["metrics"]))


if __name__ == "__main__":
    main()
