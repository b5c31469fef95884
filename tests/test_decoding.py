"""Language models with a key/value cache: captured as one program for prompts and single tokens, and `generate` as in transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress as fxc
from fxcompress import cached, store
from fxcompress.api import program_of
from fxcompress.calibrate.feed import FlatItems, as_feed
from fxcompress.dynamic import at_sizes
from fxcompress.interpret import run
from fxcompress.measure import relative_error
from fxcompress.sources import resolve
from tests.zoo import VOCAB, transformers

SIZES = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
ROTARY = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": None, "bos_token_id": None}
WINDOWED = {**ROTARY, "head_dim": 16, "sliding_window": 6}
GPT = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "eos_token_id": None, "bos_token_id": None}
MODELS = {
    "llama": ("LlamaForCausalLM", {**ROTARY, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2ForCausalLM", {**ROTARY, "tie_word_embeddings": False}),
    "gpt2": ("GPT2LMHeadModel", {**GPT, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2ForCausalLM", {**WINDOWED, "tie_word_embeddings": False}),
}
NOTHING = {"name": "nothing", "passes": ["tidy.fold_constants"]}
GGUF = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 20
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}


def ids(rows: int = 2, length: int = 12, seed: int = 3) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def built(name: str, **config: Any) -> nn.Module:
    """A model whose greedy text isn't one token repeated."""
    kind, entries = MODELS[name]
    model, _ = transformers(kind, lambda: {"input_ids": ids()}, **{**entries, **config})()
    with torch.no_grad():
        for parameter in model.get_output_embeddings().parameters():
            parameter.mul_(3)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return built("llama")


@pytest.fixture(scope="module")
def program(model: nn.Module) -> fxc.Program:
    return fxc.capture(model, {"input_ids": ids()})


@pytest.fixture(scope="module")
def compiled(program: fxc.Program) -> fxc.CompiledModel:
    return fxc.compile(program, NOTHING, backend="reference")


def error(kind: type[Exception], action: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        action()
    return str(caught.value)


# capture


def test_the_cache_becomes_states(model: nn.Module, program: fxc.Program) -> None:
    """Two a layer, grouped heads as they are kept, from past to past + new."""
    names = [f"past_key_values_{layer}_{part}" for layer in range(3) for part in (0, 1)]
    assert [(s.input, s.output) for s in program.states] == [(n, n.replace("past", "present")) for n in names]
    assert [v.name for v in program.inputs] == ["input_ids", "attention_mask", "position_ids", *names]
    assert [v.name for v in program.outputs] == ["logits", *(s.output for s in program.states)]
    inputs = {v.name: v for v in program.inputs}
    assert {inputs[n].shape for n in names} == {("batch", 2, "past", 16)}
    assert {v.role for v in (*program.inputs[3:], *program.outputs[1:])} == {"state"}
    assert inputs["attention_mask"].shape == ("batch", "input_ids_1 + past")
    assert {v.shape for v in program.outputs[1:]} == {("batch", 2, "input_ids_1 + past", 16)}
    assert {n: low for n, (low, _) in program.symbols.items()} == {"batch": 1, "input_ids_1": 1, "past": 0}
    assert not program.notes
    assert program.config is model.config


@pytest.mark.parametrize("past", [0, 1, 9])
@pytest.mark.parametrize("new", [1, 7])
def test_one_program_serves_prompts_and_tokens(past: int, new: int, model: nn.Module, program: fxc.Program) -> None:
    """What the model says of the last tokens when it sees all, the program says when it sees them alone with the cache."""
    sizes = {"batch": 3, "past": 0, "input_ids_1": past + new}
    whole = at_sizes(program.example, [v.shape for v in program.inputs], sizes)
    whole[0], whole[2] = ids(3, past + new), torch.arange(past + new).expand(3, -1)
    wanted = model(whole[0]).logits[:, past:]
    states = run(program, [whole[0][:, :past], whole[1][:, :past], whole[2][:, :past], *whole[3:]])[1:] if past else whole[3:]
    got = run(program, [whole[0][:, past:], whole[1], whole[2][:, past:], *states])
    assert relative_error(wanted, got[0]) < 1e-5
    assert {tuple(t.shape) for t in got[1:]} == {(3, 2, past + new, 16)}


def test_a_forgotten_past_is_seen(model: nn.Module, program: fxc.Program) -> None:
    """The comparison above bites: with the past of another text the numbers are others."""
    flat = [t.clone() for t in program.example]
    right = run(program, flat)[0]
    flat[3:] = [t.flip(0) for t in flat[3:]]  # the other row's
    assert relative_error(right, run(program, flat)[0]) > 1e-2


FAULTS: dict[str, Callable[[list[Tensor]], bool]] = {
    "no past": lambda flat: flat[3].shape[2] == 0,
    "one token": lambda flat: flat[0].shape[1] == 1,
    "a hidden token": lambda flat: not flat[1].all(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_graph_wrong_at_an_extreme_is_no_program(fault: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is captured without its cache then, and says so."""

    def wrong(program: fxc.Program, flat: list[Tensor]) -> list[Any]:
        out = run(program, flat)
        return [out[0] * 1.5, *out[1:]] if program.states and FAULTS[fault](flat) else out

    monkeypatch.setattr(sys.modules["fxcompress.capture"], "run", wrong)
    program = fxc.capture(model, {"input_ids": ids()})
    assert program.states == ()
    assert program.notes[0].startswith("captured without its key/value cache: a float32 tensor")


@pytest.mark.parametrize("call", [{"use_cache": False}, {"output_hidden_states": True, "use_cache": False}], ids=str)
def test_use_cache_false_is_heard(call: dict[str, Any], model: nn.Module) -> None:
    program = fxc.capture(model, {"input_ids": ids(), **call})
    assert (program.states, [v.name for v in program.inputs]) == ((), ["input_ids"])


def test_a_config_without_cache_is_heard() -> None:
    model = built("llama", use_cache=False)
    assert fxc.capture(model, {"input_ids": ids()}).states == ()
    assert len(fxc.capture(model, {"input_ids": ids(), "use_cache": True}).states) == 6


def test_another_kind_of_cache_is_left_out_and_said() -> None:
    sizes = {**ROTARY, "layer_types": ["conv", "full_attention", "conv"]}
    model, _ = transformers("Lfm2ForCausalLM", lambda: {"input_ids": ids()}, **sizes)()
    program = fxc.capture(model, {"input_ids": ids()})
    assert program.states == ()
    assert program.notes == ("captured without its key/value cache: its cache holds a LinearAttentionLayer",)
    assert "holds a LinearAttentionLayer" in error(fxc.CaptureError, lambda: fxc.capture(model, {"input_ids": ids(), "use_cache": True}))


@pytest.mark.parametrize("length", [1, 3, 4])
def test_short_examples(length: int, model: nn.Module) -> None:
    """An example of one token is enough."""
    program = fxc.capture(model, (ids(1, length),))
    assert len(program.states) == 6
    assert min(program.example[3].shape[2], program.example[0].shape[1]) == 2


def test_states_survive_a_file(program: fxc.Program, tmp_path: Path) -> None:
    store.save_program(program, tmp_path)
    again = store.load_program(tmp_path)
    assert again.states == program.states
    assert [v.role for v in again.inputs] == [v.role for v in program.inputs]


# calls


def test_a_call_without_cache_is_what_it_was(model: nn.Module, compiled: fxc.CompiledModel) -> None:
    wanted, got = model(ids(3, 5)), compiled(ids(3, 5))
    assert type(got) is type(wanted)
    assert relative_error(wanted.logits, got.logits) < 1e-5
    assert type(got.past_key_values) is type(wanted.past_key_values)
    assert got.past_key_values.get_seq_length() == 5
    assert torch.equal(compiled(ids(3, 5), return_dict=False)[0], got.logits)
    assert compiled(ids(3, 5), use_cache=False).past_key_values is None
    assert list(compiled(ids(3, 5), use_cache=False)) == ["logits"]


def test_a_cache_is_continued_in_place(model: nn.Module, compiled: fxc.CompiledModel) -> None:
    from transformers import DynamicCache

    tokens, mine, theirs = ids(2, 9), DynamicCache(), DynamicCache()
    for part in (tokens[:, :4], tokens[:, 4:5], tokens[:, 5:]):
        got, wanted = compiled(part, past_key_values=mine), model(part, past_key_values=theirs)
        assert got.past_key_values is mine
        assert relative_error(wanted.logits, got.logits) < 1e-5
        assert relative_error(theirs.layers[2].keys, mine.layers[2].keys) < 1e-5
    assert mine.get_seq_length() == 9


def test_padding_and_positions(model: nn.Module, compiled: fxc.CompiledModel) -> None:
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[0, :3] = 0
    for call in ({"attention_mask": mask}, {"attention_mask": mask.bool(), "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}):
        wanted, got = model(ids(2, 7), **call).logits, compiled(ids(2, 7), **call).logits
        assert relative_error(wanted[mask.bool()], got[mask.bool()]) < 1e-5
    other = ids(2, 7)
    other[0, :3] = 5
    assert relative_error(compiled(other, attention_mask=mask).logits[0, 3:], compiled(ids(2, 7), attention_mask=mask).logits[0, 3:]) == 0
    assert relative_error(compiled(other).logits[0, 3:], compiled(ids(2, 7)).logits[0, 3:]) > 1e-2


OPT = {"vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
COUNTING = {"mask": ("OPTForCausalLM", OPT), "pad tokens": ("RobertaForCausalLM", {**SIZES, "is_decoder": True})}


@pytest.mark.parametrize("kind", COUNTING)
def test_positions_that_the_model_counts_itself(kind: str) -> None:
    """OPT counts along the mask, RoBERTa the tokens that aren't padding: positions that count on from 0 would be others."""
    name, entries = COUNTING[kind]
    model, _ = transformers(name, lambda: {"input_ids": ids()}, **entries)()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    compiled = fxc.compile(model, NOTHING, {"input_ids": ids(), "attention_mask": mask})
    seen = mask.bool()
    for given in ({"attention_mask": mask}, {}):
        wanted = model(ids(), **given).logits
        assert relative_error(wanted[seen], compiled(ids(), **given).logits[seen]) < 1e-4
    first = compiled(ids()[:, :7], attention_mask=mask[:, :7])
    rest = compiled(ids()[:, 7:], attention_mask=mask, past_key_values=first.past_key_values)
    assert relative_error(model(ids(), attention_mask=mask).logits[:, 7:], rest.logits) < 1e-4


def static(compiled: fxc.CompiledModel) -> Any:
    from transformers import StaticCache

    return StaticCache(config=compiled.config, max_cache_len=16)


def windowed(compiled: fxc.CompiledModel) -> Any:
    from transformers import DynamicCache, Gemma2Config

    cache = DynamicCache(config=Gemma2Config(**WINDOWED))
    for layer in range(3):
        cache.update(torch.ones(2, 2, 9, 16), torch.ones(2, 2, 9, 16), layer)
    return cache


BAD: list[tuple[Callable[[fxc.CompiledModel], dict[str, Any]], str]] = [
    (lambda m: {}, "a language model takes token ids"),
    (lambda m: {"input_ids": ids()[0]}, "a language model takes token ids"),
    (lambda m: {"input_ids": ids()[:, :0]}, "axis 1 must be in 1.."),
    (lambda m: {"input_ids": ids() + VOCAB}, f"it indexes a table of {VOCAB} rows"),
    (lambda m: {"input_ids": ids(), "attention_mask": torch.ones(2, 11)}, "0 kept and 12 new tokens in 2 rows need [2, 12]"),
    (lambda m: {"input_ids": ids(), "past_key_values": m(ids()).past_key_values, "attention_mask": torch.ones(2, 12)}, "need [2, 24]"),
    (lambda m: {"input_ids": ids(3), "past_key_values": m(ids()).past_key_values}, "axis 0 is batch"),
    (lambda m: {"input_ids": ids(), "position_ids": torch.arange(5)[None]}, "'position_ids' doesn't fit"),
    (lambda m: {"input_ids": ids(), "past_key_values": static(m)}, "it is a StaticCache"),
    (lambda m: {"input_ids": ids(), "past_key_values": windowed(m)}, "DynamicSlidingWindowLayer"),
    (lambda m: {"input_ids": ids(), "past_key_values": 7}, "past_key_values is no key/value cache of this model"),
    (lambda m: {"input_ids": ids(), "inputs_embeds": torch.ones(2, 12, 64)}, "'inputs_embeds' was not among the example inputs"),
    (lambda m: {"input_ids": ids(), "output_attentions": True}, "'output_attentions' was not among the example inputs"),
]


@pytest.mark.parametrize(("call", "text"), BAD, ids=[t for _, t in BAD])
def test_calls_that_do_not_fit(call: Callable[[fxc.CompiledModel], dict[str, Any]], text: str, compiled: fxc.CompiledModel) -> None:
    assert text in error(fxc.InputError, lambda: compiled(**call(compiled)))


def test_positions_past_the_table() -> None:
    """A model with learned positions ends where its table ends, and the runtime is not asked."""
    compiled = fxc.compile(built("gpt2"), NOTHING, {"input_ids": ids()}, backend="reference")
    cache = compiled(ids(1, 64)).past_key_values
    assert "it indexes a table of 64 rows, values 64..64" in error(fxc.InputError, lambda: compiled(ids(1, 1), past_key_values=cache))


# generate


def equal_text(model: nn.Module, module: Any, **options: Any) -> bool:
    """Whether both say the same on a plain batch, which isn't one token over and over."""
    prompt, settings = ids(), {**GREEDY, **options}
    torch.manual_seed(1)
    wanted = model.generate(prompt, **settings)
    torch.manual_seed(1)
    got = module.generate(prompt, **settings)
    assert wanted.shape[1] == prompt.shape[1] + LENGTH
    assert len(wanted[:, prompt.shape[1] :].unique()) > 5
    return torch.equal(wanted, got)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
@pytest.mark.parametrize("name", MODELS)
def test_generate_is_the_models_own(name: str, backend: str, tmp_path: Path) -> None:
    """Greedy, sampled, by beams, padded; compiled and read back. The windows of Gemma 2 hold 6 tokens of 32."""
    model = built(name)
    small = fxc.compile(model, NOTHING, {"input_ids": ids()}, backend=backend)
    small.save(tmp_path / "out")
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :5] = 0
    for module in (small.as_module(), fxc.load(tmp_path / "out").as_module()):
        assert equal_text(model, module)
        assert equal_text(model, module, attention_mask=mask)
        assert equal_text(model, module, do_sample=True, temperature=2.0)
        assert equal_text(model, module, num_beams=3)


def test_generate_uses_the_cache(model: nn.Module, compiled: fxc.CompiledModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the prompt each call takes one token."""
    lengths = []
    session = compiled.session
    right = session.run
    monkeypatch.setattr(session, "run", lambda inputs: lengths.append((inputs[0].shape[1], inputs[3].shape[2])) or right(inputs))
    assert equal_text(model, compiled.as_module())
    assert lengths == [(12, 0), *((1, 12 + i) for i in range(LENGTH - 1))]


def test_generate_without_cache_and_with_a_streamer(model: nn.Module, compiled: fxc.CompiledModel) -> None:
    class Lines:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens)

        def end(self) -> None:
            self.seen.append(torch.tensor(-1))

    module, lines = compiled.as_module(), Lines()
    assert equal_text(model, module, use_cache=False)
    made = module.generate(ids(1), streamer=lines, **GREEDY)
    assert torch.equal(torch.cat([t.view(-1) for t in lines.seen]), torch.cat([made[0], torch.tensor([-1])]))


def test_generate_may_be_given_a_tokenizer(compiled: fxc.CompiledModel) -> None:
    """Stop strings need one, and transformers passes it on to forward."""
    module = compiled.as_module()
    assert torch.equal(module.generate(ids(), tokenizer=object(), **GREEDY), module.generate(ids(), **GREEDY))


def test_a_conversation_goes_on(model: nn.Module, compiled: fxc.CompiledModel) -> None:
    """The cache that generate gives back serves the next turn."""
    options = {**GREEDY, "return_dict_in_generate": True}
    turns = []
    for speaker in (model, compiled.as_module()):
        first = speaker.generate(ids(), **options)
        said = torch.cat([first.sequences, ids(seed=5)], 1)
        turns.append(speaker.generate(said, past_key_values=first.past_key_values, **options).sequences)
    assert torch.equal(*turns)


def test_the_models_own_generation_config_counts(tmp_path: Path) -> None:
    model = built("llama")
    model.generation_config.max_new_tokens, model.generation_config.eos_token_id = 4, 7
    small = fxc.compile(model, NOTHING, {"input_ids": ids()}, backend="reference")
    small.save(tmp_path / "out")
    for module in (small.as_module(), fxc.load(tmp_path / "out").as_module()):
        assert (module.generation_config.max_new_tokens, module.generation_config.eos_token_id) == (4, 7)
        assert module.generate(ids(), do_sample=False, min_new_tokens=4).shape == (2, 16)
    assert fxc.load(tmp_path / "out").as_module().config.num_key_value_heads == 2


def test_without_a_cache_there_is_no_generate(model: nn.Module) -> None:
    module = fxc.compile(model, NOTHING, {"input_ids": ids(), "use_cache": False}, backend="reference").as_module()
    assert not hasattr(module, "generate")


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason="make model")
def test_smollm2_says_what_it_says() -> None:
    """A real model on ONNX Runtime, from a .gguf file and nothing else, token for token."""
    loaded = resolve(GGUF)
    assert loaded.tokenizer is not None
    prompt = loaded.tokenizer()("The capital of France is", return_tensors="pt")["input_ids"]
    wanted = loaded.model.generate(prompt, **GREEDY)
    small = fxc.compile(loaded.model, NOTHING, loaded.example)
    assert torch.equal(small.as_module().generate(prompt, **GREEDY), wanted)


# passes and feeds


@pytest.mark.slow
def test_quantised_models_decode(model: nn.Module, program: fxc.Program) -> None:
    """Weights are stored once for prompts and tokens; decoding token by token gives what the whole sequence gives."""
    small = fxc.compile(program, "int4-weight-only", backend="onnxruntime", threads=1)
    assert small.report.states == {s.input: s.output for s in program.states}
    assert small.report.backend is not None
    assert (small.report.backend.quantised_share, small.report.backend.parity < 1e-4) == (1.0, True)
    assert small.report.passes[-1].bytes_after < 0.25 * small.report.float_bytes
    files = sum(f.stat().st_size for f in small.folder.iterdir() if f.suffix == ".bin")
    assert files < 1.2 * small.report.weight_bytes
    exact = fxc.compile(
        program, {"passes": ["quant.weight_only", "quant.finalize"], "backend": {"onnxruntime": {"activation_rounding": "off"}}}
    )
    cache = exact(ids()[:, :8]).past_key_values
    steps = [exact(ids()[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
    assert relative_error(exact(ids()).logits[:, 8:], torch.cat(steps, 1)) < 1e-4


def test_a_feed_is_cut_in_two_as_well(program: fxc.Program) -> None:
    """The probe of the contracts is the second half of the last item, with the states that the first half left."""
    probe = FlatItems(as_feed([{"input_ids": ids(1, 6)}, {"input_ids": ids(3, 10)}]), program).probe
    assert [tuple(t.shape) for t in probe[:4]] == [(3, 5), (3, 10), (3, 5), (3, 2, 5, 16)]
    whole = cached.flat_inputs(program.signature, program.inputs, {"input_ids": ids(3, 10)})
    assert relative_error(run(program, whole)[0][:, 5:], run(program, probe)[0]) < 1e-5


def test_sources_keep_the_cache(tmp_path: Path) -> None:
    built("llama").save_pretrained(tmp_path / "llama")
    program = program_of(str(tmp_path / "llama"))
    assert len(program.states) == 6
    assert program.generation_config is not None
