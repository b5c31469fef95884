"""Peak memory and CPU time of one int4 compile of SmolLM2, as ratios to the model's fp32 bytes.

    python tools/bench/compile_memory.py [RECIPE]

Linux only: the peak is the kernel's high-water mark of resident memory, reset once the model is loaded and captured. "in all" counts the
model itself and everything the compile held, less what the process held before the model was loaded.
"""

from __future__ import annotations

import re
import sys
import time
import warnings
from pathlib import Path

import torch

import fxcompress as fxc
import fxcompress.backends.onnx.onnxruntime
from fxcompress.sources import resolve

MODEL = Path(__file__).parents[2] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    """Load, capture, compile; print megabytes and ratios."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    import transformers.models.llama.modeling_llama  # noqa: F401 - so that its memory counts as the process's own

    before = _status("VmRSS")
    model = resolve(MODEL).model
    program = fxc.capture(model, {"input_ids": torch.arange(32).view(1, -1)})
    weights = sum(t.numel() * t.element_size() for t in program.constants.values()) / 1e6
    loaded = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    start = time.process_time()
    fxc.compile(program, sys.argv[1] if len(sys.argv) > 1 else "int4-weight-only", threads=1)
    peak = _status("VmHWM")
    print(f"fp32 bytes {weights:.0f} MB; resident before the model {before:.0f}, model captured {loaded:.0f}, peak of compile {peak:.0f} MB")
    print(f"in all {(peak - before) / weights:.2f} x fp32 bytes; compile alone {(peak - loaded) / weights:.2f} x")
    print(f"CPU seconds of compile {time.process_time() - start:.1f}")


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    return int(re.search(rf"{field}:\s+(\d+) kB", text)[1]) / 1e3  # type: ignore[index]


if __name__ == "__main__":
    main()
