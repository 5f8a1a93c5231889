"""An artifact may be a stranger's, of a later version or damaged: none of its code runs, and a sentence says why."""

import json
import sys

import pytest
import tiny
from transformers import AutoTokenizer

from compress import __version__
from compress.artifacts.artifact import Description, Done, load_artifact, read_description, write_artifact
from compress.errors import UserError
from compress.models.loading import TRUST
from compress.running.evaluate import read_own_config
from compress.tiny_models import make_tokenizer

STEP = {"name": "baseline", "settings": {}, "seconds": 1.5, "trained": True}
GOOD = {"kind": "multiclass", "model": "m", "task": "t", "history": [STEP]}


def describe(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "compress.json").write_text(json.dumps({**GOOD, **values}))
    return folder


def test_a_description_is_read_as_it_was_written(tmp_path):
    written = Description("multiclass", "m", "t", limits=("a",), history=(Done("prune", {"x": [1]}, 2.0, False),))
    write_artifact(tmp_path, tiny.bert(), make_tokenizer(), written)
    assert read_description(tmp_path) == written and written.version == __version__


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"later": 1}, "later is 1; unexpected keyword argument"),
        ({"model": None}, "model is None; input should be a valid string"),
        ({"history": [{"name": "baseline"}]}, "history.0.settings is not set"),
        ({"history": [{**STEP, "seconds": "long"}]}, "history.0.seconds is 'long'; input should be a valid number"),
        ({"history": [{**STEP, "later": 2}]}, "history.0.later is 2; unexpected keyword argument"),
        ({"history": 3}, "history is 3; input should be a valid tuple"),
        ({"kind": "poem"}, "kind is 'poem'; expected one of multiclass, "),
        ({"runtime": "this"}, "runtime is 'this'; input should be 'llama_cpp', 'onnxruntime', 'openvino' or 'torch'"),
        ({"runtime": "processor"}, "runtime is 'processor'; input should be"),
        ({"runtime": "torch_compile"}, "runtime is 'torch_compile'; input should be"),
    ],
)
def test_what_is_wrong_with_a_description_is_said_before_anything_is_imported(tmp_path, values, sentence):
    with pytest.raises(UserError) as error:
        load_artifact(describe(tmp_path, **values))
    assert str(error.value).startswith(f"{tmp_path / 'compress.json'}: {sentence}")
    assert "this" not in sys.modules


def test_a_description_of_a_later_version_says_so(tmp_path):
    with pytest.raises(UserError, match=rf"It was written by compress 99\.0; this is {__version__}\. Set artifact to"):
        read_description(describe(tmp_path, version="99.0", later=1))


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "{}", "\udcff"])
def test_a_description_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "compress.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"compress\.json: .*Set artifact to a folder"):
        read_description(tmp_path)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_runtime_that_is_not_installed_is_named_with_the_command_that_installs_it(monkeypatch, tmp_path, runtime):
    tiny.bert().config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("compress.runtimes.runtime.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"needs .*{runtime}, which is not installed\. Type pip install "):
        load_artifact(describe(tmp_path, runtime=runtime))


@pytest.mark.parametrize(
    ("runtime", "files", "sentence"),
    [
        ("onnxruntime", {}, "holds no model.onnx"),
        ("onnxruntime", {"model.onnx": "no graph"}, "model.onnx cannot be read"),
        ("openvino", {"openvino_model.xml": ""}, "holds no compile.json"),
        ("openvino", {"openvino_model.xml": "", "compile.json": "{"}, "openvino_model.xml cannot be read"),
        (
            "openvino",
            {"openvino_model.xml": "", "compile.json": '{"CACHE_DIR": "/"}'},
            r"cannot be read \(compile.json sets CACHE_DIR\)",
        ),
    ],
)
def test_a_graph_that_is_missing_or_damaged_is_named(tmp_path, runtime, files, sentence):
    pytest.importorskip(runtime)
    tiny.bert().config.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        load_artifact(describe(tmp_path, runtime=runtime))


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model's folder whose tokenizer comes with Python code, which leaves a file when it runs."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked in the terminal"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", sys.path[:])
    folder = describe(tmp_path / "folder")
    tiny.bert().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "tokenization_own.py").write_text(
        f"open({str(tmp_path / 'it ran')!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **own}))
    return folder


def test_code_that_comes_with_a_tokenizer_does_not_run(with_code, monkeypatch, tmp_path, caplog):
    monkeypatch.delenv(TRUST, raising=False)
    assert type(load_artifact(with_code).tokenizer).__name__ != "OwnTokenizer"
    assert f"{with_code} has Python code of its own" in caplog.text and f"Set {TRUST}=1" in caplog.text
    assert not (tmp_path / "it ran").exists()


def test_code_that_is_trusted_runs(with_code, monkeypatch, tmp_path):
    monkeypatch.setenv(TRUST, "1")
    assert type(load_artifact(with_code).tokenizer).__name__ == "OwnTokenizer" and (tmp_path / "it ran").exists()


def test_code_that_comes_with_an_architecture_does_not_run(with_code, monkeypatch, tmp_path):
    make_tokenizer().save_pretrained(with_code)
    config = json.loads((with_code / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "tokenization_own.OwnConfig"}}
    (with_code / "config.json").write_text(json.dumps({**config, **own}))
    monkeypatch.delenv(TRUST, raising=False)
    with pytest.raises(UserError, match=f"needs Python code of its own, .* set {TRUST}=1 in the environment"):
        load_artifact(with_code)
    assert not (tmp_path / "it ran").exists()


def test_weights_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    write_artifact(tmp_path, tiny.bert(), make_tokenizer(), Description("multiclass", "m", "t"))
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "blobs" / "1")
    (tmp_path / "model.safetensors").symlink_to("blobs/1")
    assert isinstance(load_artifact(tmp_path).tokenizer, type(AutoTokenizer.from_pretrained(tmp_path)))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("task: {name: t, hub: {id: '${oc.env:MY_SECRET}'}}", r"holds \$\{oc.env:MY_SECRET\}; a run stores plain"),
        ("task: [", "is no config of a run"),
        ("- 1", "is no config of a run"),
    ],
)
def test_a_config_is_not_resolved_against_our_environment(tmp_path, monkeypatch, config, sentence):
    monkeypatch.setenv("MY_SECRET", "s3cr3t")
    (tmp_path / "config.yaml").write_text(config)
    with pytest.raises(UserError, match=sentence) as error:
        read_own_config(tmp_path)
    assert "s3cr3t" not in str(error.value)
