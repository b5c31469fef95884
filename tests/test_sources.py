import contextlib
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.export.pt2_archive import PT2ArchiveWriter

from fxcompress.errors import CaptureError
from fxcompress.signature import Inputs
from fxcompress.sources import resolve
from fxcompress.sources.pt2 import inspect_pt2
from fxcompress.sources.pt2_text import faults, identifier, operator, plain, size, tree_spec

GGUF = Path(__file__).parents[1] / ".cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS, CONSTANTS = "data/weights/model_weights_config.json", "data/constants/model_constants_config.json"
GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
EXPORT_AGAIN = "  do    export the model again with plain tensors: torch.export.save(torch.export.export(model, args), 'model.pt2')"

Entries = dict[str, bytes]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.offset = torch.tensor([1.0, 2.0])

    def forward(self, x: Tensor, shift: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": self.linear(x) * self.offset + shift["by"], "rows": x.new_zeros(2 * x.shape[0])}


def make_small() -> Small:
    return Small()


def make_with_example() -> tuple[Small, dict[str, Tensor]]:
    return Small(), {"x": torch.ones(1, 3)}


def make_nothing() -> int:
    return 7


SMALL = Small()
EXAMPLE = (torch.arange(12.0).view(4, 3), {"by": torch.ones(2)})


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "small.pt2"
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)}, {"by": None})
    torch.export.save(torch.export.export(SMALL, EXAMPLE, dynamic_shapes=dynamic), path)
    return path


def crafted(exported: Path, target: Path, change: Callable[[Entries], None]) -> Path:
    """A copy of the archive, written by torch's own writer, with some entries changed."""
    with zipfile.ZipFile(exported) as archive:
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    entries = {name: data for name, data in entries.items() if not name.startswith(".data") and name != "byteorder"}
    change(entries)
    with PT2ArchiveWriter(str(target)) as writer:
        for name, data in entries.items():
            writer.write_bytes(name, data)
    return target


def edited(entries: Entries, entry: str, old: str, new: str) -> None:
    text = entries[entry].decode()
    assert old in text, f"{old} is not in {entry}: the attack would be none"
    entries[entry] = text.replace(old, new).encode()


class Bomb:
    """Unpickling it creates the file: what an attacker's code would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


# ---- the attacks: each creates `mark` when torch alone reads the file, or when the program is then used


def pickled_weight(entries: Entries, mark: Path) -> None:
    edited(entries, WEIGHTS, '"use_pickle": false', '"use_pickle": true')
    entries["data/weights/weight_0"] = saved(Bomb(mark))


def pickled_constant(entries: Entries, mark: Path) -> None:
    edited(entries, CONSTANTS, '"use_pickle": false', '"use_pickle": true')
    entries["data/constants/tensor_0"] = saved(Bomb(mark))


def opaque_constant(entries: Entries, mark: Path) -> None:
    edited(entries, CONSTANTS, '"tensor_0"', '"opaque_obj_0"')
    edited(entries, CONSTANTS, '"use_pickle": false', '"use_pickle": true')
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Bomb(mark))


def pickled_samples(entries: Entries, mark: Path) -> None:
    entries[SAMPLES] = saved(((Bomb(mark),), {}))


def older_layout(entries: Entries, mark: Path) -> None:
    entries["data/weights/model.pt"] = saved({"linear.weight": Bomb(mark)})


def evaluated_size(entries: Entries, mark: Path) -> None:
    document = json.loads(entries[GRAPH])
    (size_of_x,) = (s for s in document["graph_module"]["graph"]["tensor_values"]["x"]["sizes"] if "as_expr" in s)
    size_of_x["as_expr"]["expr_str"] = f"open({str(mark)!r}, 'w')"
    entries[GRAPH] = json.dumps(document).encode()


def executed_name(entries: Entries, mark: Path) -> None:
    edited(entries, GRAPH, '"shift_by"', json.dumps(f"shift_by=open({str(mark)!r}, 'w')"))


def executed_guard(entries: Entries, mark: Path) -> None:
    document = json.loads(entries[GRAPH])
    document["guards_code"] = [f"open({str(mark)!r}, 'w').closed or True"]
    entries[GRAPH] = json.dumps(document).encode()


def file_operator(entries: Entries, mark: Path) -> None:
    document = json.loads(entries[GRAPH])
    node = document["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.ops.aten.from_file.default"
    arguments = {"filename": {"as_string": str(mark)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
    node["inputs"] = [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()]
    entries[GRAPH] = json.dumps(document).encode()


READING = (pickled_weight, pickled_constant, opaque_constant, pickled_samples, older_layout, evaluated_size, executed_name)
REASONS = {
    pickled_weight: (WEIGHTS, "'linear.weight' is flagged use_pickle, and a pickle runs code while it is read"),
    pickled_constant: (CONSTANTS, "'offset' is flagged use_pickle, and a pickle runs code while it is read"),
    opaque_constant: ("data/constants/opaque_obj_0", "torch.export.save writes no such entry for one program"),
    pickled_samples: (SAMPLES, "the sample inputs hold more than tensors, numbers, texts, tuples, lists and dicts"),
    older_layout: ("data/weights/model.pt", "torch.export.save writes no such entry for one program"),
    evaluated_size: (GRAPH, "\"open('mark', 'w')\" is not a symbolic size, and torch evaluates it as Python"),
    executed_name: (GRAPH, "\"shift_by=open('mark', 'w')\" is not a name, and torch writes it into source that it runs"),
    file_operator: (GRAPH, "'torch.ops.aten.from_file.default' reads or writes a file"),
}


@pytest.mark.parametrize("attack", READING, ids=lambda f: f.__name__)
def test_the_attack_is_real(attack, exported, tmp_path):
    mark = tmp_path / "mark"
    path = crafted(exported, tmp_path / "bad.pt2", lambda entries: attack(entries, mark))
    with contextlib.suppress(Exception):  # the file need not load: by then its code has run
        torch.export.load(path)
    assert mark.exists()


@pytest.mark.parametrize("attack", REASONS, ids=lambda f: f.__name__)
def test_a_file_that_would_run_code_is_refused(attack, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # so that the mark has a short name and the whole text can be written down
    mark = Path("mark")
    path = crafted(exported, tmp_path / "bad.pt2", lambda entries: attack(entries, mark))
    entry, why = REASONS[attack]
    with pytest.raises(CaptureError) as refused:
        resolve(path)
    assert str(refused.value) == "\n".join(
        [
            "the exported program isn't safe to load",
            f"  where bad.pt2: {entry}",
            f"  why   {why}",
            "  state nothing in the file has been run",
            EXPORT_AGAIN,
        ]
    )
    assert not mark.exists()


@pytest.mark.parametrize("attack", [executed_guard, file_operator], ids=lambda f: f.__name__)
def test_the_attack_is_real_when_the_program_is_used(attack, exported, tmp_path):
    mark = tmp_path / "mark"
    with contextlib.suppress(Exception):
        torch.export.load(crafted(exported, tmp_path / "bad.pt2", lambda entries: attack(entries, mark))).module()(*EXAMPLE)
    assert mark.exists()


def test_guards_are_dropped(exported, tmp_path):
    mark = tmp_path / "mark"
    program = resolve(crafted(exported, tmp_path / "bad.pt2", lambda entries: executed_guard(entries, mark))).model
    assert torch.equal(program.module()(*EXAMPLE)["y"], SMALL(*EXAMPLE)["y"])
    assert not mark.exists()


@pytest.mark.parametrize(
    ("entry", "old", "new", "why"),
    [
        (GRAPH, '"name": "linear"', '"name": "x;print(1)"', "'x;print(1)' is not a name, and torch writes it into source that it runs"),
        (GRAPH, "builtins.dict", "collections.defaultdict(", "holds characters that no name or option has"),
        (WEIGHTS, '"weight_0"', '"tensor_0"', "'linear.weight' is stored in 'tensor_0', which is no plain tensor"),
        (WEIGHTS, '"linear.weight"', '"a\\"); print(1)"', "holds characters that no name or option has"),
        (WEIGHTS, '"use_pickle": false', '"use_pickle": 0', "'linear.weight' is flagged use_pickle"),
    ],
)
def test_other_crafted_texts_are_refused(entry, old, new, why, exported, tmp_path):
    path = crafted(exported, tmp_path / "bad.pt2", lambda entries: edited(entries, entry, old, new))
    with pytest.raises(CaptureError) as refused:
        inspect_pt2(path)
    assert why in refused.value.why
    assert refused.value.where == f"bad.pt2: {entry}"


def test_a_compiled_library_is_refused(exported, tmp_path):
    def add(entries: Entries) -> None:
        entries["data/aotinductor/model/model.so"] = b"\x7fELF"

    with pytest.raises(CaptureError, match="isn't safe") as refused:
        resolve(crafted(exported, tmp_path / "bad.pt2", add))
    assert refused.value.where == "bad.pt2: data/aotinductor/model/model.so"


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Mul(Integer(2), Symbol('s0'))",
        "FloorDiv(Symbol('s0'), Integer(-3))",
        "Float('0.5', precision=53)",
    ],
)
def test_symbolic_sizes_stay(text):
    assert size(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        "open('f', 'w')",
        "Symbol('s0').__class__",
        "Add('open(1)', 1)",
        "Symbol('open(1)')",
        "(lambda: 1)()",
        "[1 for x in y]",
        "Symbol('s0', positive=open('f'))",
        "Symbol(*[1])",
        "Integer(**{})",
        "s0",
        "'open(1)'",
        "FloorDiv",
        "Add(FloorDiv, 1)",
        "1 if x else 2",
        "",
        "(" * 300 + ")" * 300,
    ],
)
def test_anything_else_is_no_size(text):
    assert size(text) == "is not a symbolic size, and torch evaluates it as Python"


def test_texts_of_the_graph_by_kind():
    assert identifier("p_linear_weight") == plain("bhqd,bhkd->bhqk") == plain("block@1.weight") == operator("_operator.mul") == ""
    assert operator("torch.ops.aten.add.Tensor") == operator("torch.sym_max") == ""
    for target in (
        "torch.os.system",
        "torch.ops.aten.__class__.__init__",
        "_operator.methodcaller",
        "torch.ops.higher_order.print",
        "#ns:op",
        "math.exp",
    ):
        assert operator(target).startswith("is not a registered operator")
    assert operator("torch.ops.aten.save.default") != ""
    assert tree_spec('[1, {"type": "builtins.dict", "context": "[\\"by\\", \\"to\\"]", "children_spec": []}]') == ""
    for hidden in ('{"__enum__": true, "fqn": "os:system"}', '{"default_factory_module": "os"}'):
        assert tree_spec(json.dumps([1, {"type": "builtins.dict", "context": hidden}])) == "holds a container that makes torch import a module"
    assert tree_spec(json.dumps([1, {"context": json.dumps(["'] or open(1)"])}])) != ""


def test_a_tensor_named_like_free_text_hides_nothing():
    size_inside = {"sizes": [{"as_expr": {"expr_str": "open(1)"}}]}
    assert list(faults({"tensor_values": {"metadata": size_inside}})) != []
    assert list(faults({"tensor_values": {"stack_trace": size_inside}})) != []
    assert list(faults({"nodes": [{"metadata": {"stack_trace": "open('f')"}}]})) == []


def test_an_exported_program_comes_back(exported):
    loaded = resolve(str(exported))
    x, shift = torch.randn(7, 3), {"by": torch.randn(2)}
    assert torch.equal(loaded.model.module()(x, shift)["y"], SMALL(x, shift)["y"])
    assert isinstance(loaded.example, Inputs)
    assert torch.equal(loaded.example.args[0], EXAMPLE[0])
    assert loaded.origin == f"exported program {exported}"


def test_a_truncated_file_is_no_program(exported, tmp_path):
    bad = tmp_path / "bad.pt2"
    bad.write_bytes(exported.read_bytes()[:-100])
    with pytest.raises(CaptureError, match="can't be read"):
        resolve(bad)


def test_an_archive_without_its_graph_is_no_program(exported, tmp_path):
    with pytest.raises(CaptureError) as refused:
        resolve(crafted(exported, tmp_path / "bad.pt2", lambda entries: entries.__delitem__(GRAPH)))
    assert (refused.value.what, refused.value.why) == ("the exported program can't be read", "it has no models/model.json")


# ---- transformers


@pytest.fixture
def llama(tmp_path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def change_config(folder: Path, **entries: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_transformers_folder(llama):
    loaded = resolve(llama)
    stored = load_file(llama / "model.safetensors")
    assert torch.equal(loaded.model.state_dict()["lm_head.weight"], stored["lm_head.weight"])
    assert not loaded.model.training
    assert loaded.origin == f"transformers LlamaForCausalLM from {llama}"
    assert loaded.example["input_ids"].tolist() == [list(range(16)), [*range(16, 32)]]
    assert loaded.tokenizer is None


def test_the_stored_dtype_is_kept_unless_told(llama, tmp_path):
    resolve(llama).model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in resolve(tmp_path / "half").model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in resolve(tmp_path / "half", dtype=torch.float32).model.parameters()} == {torch.float32}


def test_missing_weights_are_not_made_up(llama):
    weights = load_file(llama / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError) as refused:
        resolve(llama)
    assert refused.value.why == "1 missing or of another shape, which would be random numbers: model.norm.weight"


def test_pickled_weights_are_refused(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CaptureError) as refused:
        resolve(llama)
    assert str(refused.value) == "\n".join(
        [
            "the weights are stored in a format that isn't read",
            f"  where {llama}",
            "  why   found pytorch_model.bin and no .safetensors; a pickle runs code while it is read",
            "  do    convert them where you trust them: model.save_pretrained(folder, safe_serialization=True)",
        ]
    )


def test_code_in_the_folder_is_not_run(llama, tmp_path):
    (llama / "modeling_mine.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Mine: pass")
    change_config(llama, architectures=["Mine"], auto_map={"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"})
    with pytest.raises(CaptureError, match="has no model class 'Mine'"):
        resolve(llama)
    change_config(llama, architectures=["LlamaForCausalLM"])
    resolve(llama)
    assert not (tmp_path / "mark").exists()


def test_kernels_are_not_downloaded(llama):
    change_config(llama, text_config={"attn_implementation": "kernels-community/flash"})
    with pytest.raises(CaptureError, match="asks for code to be downloaded") as refused:
        resolve(llama)
    assert refused.value.why == "attn_implementation: kernels-community/flash; hubs are never contacted"


def test_a_config_without_architecture(llama):
    change_config(llama, architectures=None)
    with pytest.raises(CaptureError, match="names no model class"):
        resolve(llama)


# ---- diffusers


@pytest.fixture
def pipeline(tmp_path) -> Path:
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    return tmp_path / "pipe"


def test_component_of_a_pipeline(pipeline):
    loaded = resolve(pipeline, component="unet")
    stored = load_file(pipeline / "unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(loaded.model.state_dict()["conv_in.weight"], stored["conv_in.weight"])
    assert not loaded.model.training
    assert loaded.roles == {"timestep": "timestep"}
    assert torch.equal(resolve(pipeline / "unet").model.conv_in.weight, loaded.model.conv_in.weight)


def test_component_keeps_the_stored_dtype(pipeline, tmp_path):
    resolve(pipeline, component="unet").model.to(torch.float16).save_pretrained(tmp_path / "half")
    assert {p.dtype for p in resolve(tmp_path / "half").model.parameters()} == {torch.float16}
    assert {p.dtype for p in resolve(tmp_path / "half", dtype=torch.float32).model.parameters()} == {torch.float32}


def test_missing_component_weights_are_not_made_up(pipeline):
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CaptureError, match=r"conv_in\.weight"):
        resolve(pipeline, component="unet")


@pytest.mark.parametrize(
    ("component", "what"), [(None, "a pipeline is compiled one component at a time"), ("scheduler", "the pipeline has no model 'scheduler'")]
)
def test_component_must_be_a_model(pipeline, component, what):
    with pytest.raises(CaptureError) as refused:
        resolve(pipeline, component=component)
    assert (refused.value.what, refused.value.do) == (what, 'component="unet"')


def test_unknown_component_class(pipeline):
    change_config(pipeline / "unet", _class_name="DDPMScheduler")
    with pytest.raises(CaptureError, match=f"diffusers {diffusers.__version__} has no model class 'DDPMScheduler'"):
        resolve(pipeline / "unet")


# ---- everything else


def test_models_are_returned_as_they_are():
    program = torch.export.export(SMALL, EXAMPLE)
    assert resolve(SMALL).model is SMALL
    assert resolve(program).model is program
    assert torch.equal(resolve(program).example.args[0], EXAMPLE[0])


def test_a_function_by_name():
    assert isinstance(resolve(f"{__name__}:make_small").model, Small)
    loaded = resolve(f"{__name__}:make_with_example")
    assert (type(loaded.model), loaded.origin) == (Small, f"{__name__}:make_with_example")
    assert loaded.example["x"].shape == (1, 3)
    assert resolve(f"{__name__}:SMALL").model is SMALL


@pytest.mark.parametrize(
    ("model", "what", "do"),
    [
        ("org/some-model", "there is no file or folder 'org/some-model'", "download the model first and pass its folder"),
        ("make_small", "there is no file or folder 'make_small'", '"package.module:make_small"'),
        ("nowhere.at_all:make", "the module 'nowhere.at_all' can't be imported", "set PYTHONPATH to the folder it is in"),
        (f"{__name__}:absent", f"{__name__} has no 'absent'", "check the name after the colon"),
        (
            f"{__name__}:make_nothing",
            "the function returns no model",
            "return an nn.Module or an ExportedProgram, or one of them and example inputs as a pair",
        ),
    ],
)
def test_names_that_lead_nowhere(model, what, do):
    with pytest.raises(CaptureError) as refused:
        resolve(model)
    assert (refused.value.what, refused.value.do) == (what, do)


FORMS = "pass an nn.Module, an ExportedProgram, a .pt2 or .gguf file, a diffusers or transformers folder, or 'package.module:function'"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.bin", "it may be a pickle, which runs code while it is read"),
        ("model.safetensors", "weights alone have no graph"),
        ("model.tflite", "unknown file type '.tflite'"),
    ],
)
def test_files_that_hold_no_model(name, why, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CaptureError) as refused:
        resolve(tmp_path / name)
    assert str(refused.value) == f"this file holds no model that can be loaded\n  where {tmp_path / name}\n  why   {why}\n  do    {FORMS}"


def test_a_folder_without_config(tmp_path):
    with pytest.raises(CaptureError, match="the folder holds no model"):
        resolve(tmp_path)


def test_a_config_that_is_no_json(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CaptureError, match="a config file can't be read"):
        resolve(tmp_path)


def test_a_folder_without_weights(llama):
    (llama / "model.safetensors").unlink()
    with pytest.raises(CaptureError, match="the folder has no weights"):
        resolve(llama)


def test_what_is_no_model():
    with pytest.raises(CaptureError) as refused:
        resolve(7)
    assert str(refused.value) == f"this is not a model\n  why   got int\n  do    {FORMS}"


def test_component_needs_a_pipeline():
    with pytest.raises(CaptureError, match="component='unet' has no meaning here"):
        resolve(SMALL, component="unet")


@pytest.mark.slow
@pytest.mark.skipif(not GGUF.exists(), reason="make model")
def test_gguf_answers():
    loaded = resolve(GGUF)
    tokenizer = loaded.tokenizer()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        answer = loaded.model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(answer) == " Paris"
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.example["input_ids"].shape == (2, 16)
