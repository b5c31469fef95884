"""A language model with 4-bit weights on ONNX Runtime: compile, save, load, generate. Needs the weights (make model).

python -m examples.language_int4
"""

from pathlib import Path

import fxcompress as fxc
from fxcompress.sources import resolve

MODEL = Path(".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def main(out: Path = Path("out/language-int4")) -> str:
    """Returns what the compiled model says."""
    source = resolve(MODEL)
    fxc.compile(source.model, "int4-weight-only", source.example).save(out)
    tokenizer = source.tokenizer()
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    model = fxc.load(out)
    ids = model.as_module().generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{model.report.float_bytes / 1e6:.0f} MB of weights are now {model.report.weight_bytes / 1e6:.0f} MB, and say: {answer}")
    return answer


if __name__ == "__main__":
    main()
