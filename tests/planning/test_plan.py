"""A mistake is reported on one line, before anything is loaded or trained."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from test_conf import CONF
from transformers import BertConfig

import compress
from compress.errors import UserError
from compress.planning import plan
from compress.runtimes import processor


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the check loaded something")

    monkeypatch.setattr("compress.tasks.splits.read_tables", refuse)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)


def check(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plan.make_plan(compose("train", list(overrides)))


def test_a_chain_becomes_steps_in_its_order():
    planned = check("technique=prune+finetune+prune+gptq", "technique.prune_2.sparsity=0.6")
    assert [step.key for step in planned.steps] == ["prune", "finetune", "prune_2", "gptq"]
    assert planned.steps[2].arguments["sparsity"] == 0.6 and planned.steps[0].arguments["sparsity"] == 0.2
    assert planned.steps[1].training.epochs == 1


def test_what_is_in_a_file_that_a_stage_names_decides_its_result(tmp_path):
    def address(rows):
        (tmp_path / "mask.json").write_text(rows)
        return (
            check("technique=structured", f"technique.structured.head_mask={tmp_path / 'mask.json'}").steps[0].address
        )

    first = address("[[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]")
    assert first == address("[[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]]")
    assert first != address("[[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]")


def test_an_adapter_and_the_version_of_its_library_decide_a_result(monkeypatch):
    pytest.importorskip("peft", reason="pip install -e '.[peft]'")

    def address(adapter):
        settings = [f"{key}.adapter={adapter}" for key in ("baseline", "technique.finetune")]
        return check("technique=finetune", *settings).compute_addresses("data")[1:]

    adapters = ("null", "{kind: perp}", "{kind: lora}", "{kind: lora, rank: 8}")
    before = {adapter: address(adapter) for adapter in adapters}
    for place in zip(*before.values()):
        assert all(place.count(each) == 1 for each in place)
    monkeypatch.setattr("compress.cache.digests.version", lambda package: "0")
    assert address("{kind: perp}") == before["{kind: perp}"]
    assert all(new != old for new, old in zip(address("{kind: lora}"), before["{kind: lora}"]))


@pytest.mark.parametrize("export", ["onnx", "openvino"])
def test_an_export_refuses_groups_of_weights_whose_inputs_are_rounded(export):
    settings = ("technique.w8a8.dynamic=false", "technique.w8a8.group_size=32")
    with pytest.raises(UserError, match=r"technique.w8a8.group_size is 32.* Set technique.w8a8.group_size=-1"):
        check(f"technique=w8a8+{export}", *settings)


def test_only_a_latency_makes_a_result_depend_on_the_machine(monkeypatch):
    def address(target):
        return check("technique=structured", f"technique.structured.target={target}").steps[0].address

    before = {target: address(target) for target in ("{latency: 0.5}", "{latency_ms: 1.5}", "{macs: 0.5}")}
    monkeypatch.setattr(processor, "read_processor", lambda: {"model name": "another"})
    changed = {target: address(target) != known for target, known in before.items()}
    assert changed == {"{latency: 0.5}": True, "{latency_ms: 1.5}": True, "{macs: 0.5}": False}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["technique=gptq+distill", "technique.distill.student.layers=1"],
            r"student sets another model and the chain's model is quantized already. Distil first",
        ),
        (
            ["technique=gptq+finetune", "technique.finetune.adapter={kind: lora}"],
            r"adapter is lora, which is merged into floats, .* Set .*=\{kind: perp\}, or move `finetune` before",
        ),
        (["technique=nf4+finetune", "technique.finetune.adapter={kind: lora}"], r"nf4.* Set technique=finetune\+nf4"),
        (
            ["technique=finetune", "technique.finetune.adapter={kind: loar}"],
            r"adapter.kind is 'loar'; .*'dora' or 'perp'",
        ),
        (["technique=finetune", "technique.finetune.adapter={kind: lora, r: 8}"], r"adapter.r is no setting"),
        (["baseline.adapter={kind: dora, rank: 0}"], r"baseline.adapter.rank is 0; .* greater than or equal to 1"),
        (["baseline.adapter={kind: dora, rank: 500}"], r"baseline.adapter.rank is 500 and `.*` has 128 outputs"),
        (["baseline.adapter=lora"], r"baseline.adapter is 'lora'; a group of settings is expected, {key: value}"),
        (["baseline.adapter={rank: 8}"], r"baseline.adapter.kind is not set; a value is expected"),
        (
            ["baseline.adapter={kind: lora}", "baseline.epochs=0"],
            r"baseline.adapter is set and baseline.epochs is 0, .*",
        ),
        (
            ["technique=distill", "technique.distill.adapter={kind: lora}", "technique.distill.student.hidden_size=64"],
            r"distill.student.hidden_size makes random weights. Set technique.distill.adapter=null",
        ),
        (["technique=nf4+distill"], r"`distill` works on float or packed weights.*distill\+nf4"),
        (
            ["technique=gptq+onnx", "technique.onnx.precision=int8_dynamic"],
            r"onnx.precision is int8_dynamic, which would quantize weights .*precision=null",
        ),
        (
            ["technique=gptq+onnx", "technique.gptq.group_size=8"],
            r"technique.gptq.group_size is 8; .* technique.gptq.group_size=32, or .*onnx.precision=fp32",
        ),
        (
            ["technique=mixed+onnx", "technique.mixed.group_size=8", "technique.mixed.average_bits=8"],
            r"technique.mixed.group_size is 8; ONNX Runtime can keep",
        ),
        (
            ["technique=nf4+onnx", "technique.nf4.blocksize=512", "model.config.hidden_size=512"],
            r"technique.nf4.blocksize is 512; .*, 256 weights a scale",
        ),
        (
            ["technique=gptq+onnx", "technique.gptq.format=gptq", "model=tiny_llama", "task=toy_lm"],
            r"gptq.format is gptq, which `onnx` does not read. Set technique.gptq.format=compressed-tensors",
        ),
        (
            ["hardware=cpu", "hardware.precision=16-mixed"],
            r"16-mixed, .*\. Set hardware.precision=bf16-mixed or 32-true",
        ),
        (["technique=nf4+onnx", "technique.onnx.precision=int8_static"], r"would quantize weights"),
        (["technique=gptq+openvino", "technique.openvino.precision=int4_weights"], r"already .*precision=null"),
        (["technique=prune+nf4+openvino"], r"Set .* technique=prune\+openvino .*openvino.precision=int4_weights\.$"),
        (
            ["technique=openvino", "technique.openvino.max_drop=1"],
            r"max_drop limits .*precision is null. Set technique.openvino.precision=int8",
        ),
        (["technique=qat+onnx", "technique.onnx.precision=int8_static"], r"would discard the .*precision=null to keep"),
        (["technique=w8a8+openvino"], r"technique.w8a8.dynamic is true, a range for every token; .*dynamic=false"),
        (
            ["technique=qat+onnx", "technique.qat.group_size=32"],
            r"qat.group_size is 32; .*group_size=-1",
        ),
        (["technique=prune+qat+gptq"], r"leaves integer weights. Set technique=prune\+qat or technique=prune\+gptq"),
        (["technique=gptq+prune"], r"`prune` works on float weights and `gptq` .* leaves packed weights.*prune\+gptq"),
        (
            ["technique=onnx+prune"],
            r"`prune` works on float .* leaves onnx weights. Set technique=prune\+onnx",
        ),
        (["technique=onnx", "technique.onnx.precision=int3"], r"technique.onnx.precision is 'int3'; .*'fp32', 'fp16'"),
        (["technique=onnx", "technique.onnx.skip=[*qery]"], r"onnx.skip has the pattern `\*qery`, which matches"),
        (["technique=onnx+openvino"], r"`openvino` works on float .* weights and `onnx` before it leaves onnx"),
        (["technique=gptq+gptq"], r"`gptq_2` works on float weights"),
        (["technique=prune+prune"], r"prune_2.sparsity of 0.2 follows technique.prune.sparsity of 0.2"),
        (["technique=prune", "technique.prune.sparsity=1.5"], r"technique.prune.sparsity is 1.5; .* less than 1"),
        (["technique=prune", "technique.prune.sparsity=lots"], r"technique.prune.sparsity is 'lots'; .* number"),
        (["technique=prune", "+technique.prune.sparsty=0.5"], r"technique.prune.sparsty is no setting .* sparsity"),
        (["technique=prune", "technique.prune.scope=block"], r"scope is 'block'; .*'global', 'layer' or 'row'"),
        (["technique=prune", "technique.prune.train.epochs=-1"], r"technique.prune.train.epochs is -1"),
        (["technique=gptq", "technique.gptq.bits=5"], r"technique.gptq.bits is 5; .* 2, 3, 4 or 8"),
        (
            ["technique=gptq", "technique.gptq.group_size=100"],
            r"group_size is 100, which does not divide the 128 .* Set technique.gptq.group_size=64, which",
        ),
        (["technique=drop_layers", "technique.drop_layers.drop=3"], r"drop is 3 and the model has 3 blocks"),
        (
            ["technique=drop_layers+drop_layers", "technique.drop_layers.drop=2"],
            r"drop is 1 and the model has 1 blocks",
        ),
        (["technique=gptq+prune_vocab"], r"Set technique=prune_vocab\+gptq"),
        (["technique=prune_vocab", "+technique.prune_vocab.train.epochs=1"], r"set technique=prune_vocab\+finetune"),
        (
            ["technique=prune_vocab", "technique.prune_vocab.keep_file=nowhere"],
            r"keep_file is 'nowhere'; path does not",
        ),
        (["technique=gptq", "technique.gptq._target_=compress.techniques.gptq.Nothing"], r"cannot be imported"),
        (["technique=sensitivity", "technique.sensitivity.sparsities=[]"], r"sparsities is \[\]; .*at least 1 item"),
        (
            ["technique=sensitivity", "technique.sensitivity.sparsities=[0.5,1.5]"],
            r"sparsities.1 is 1.5; .*than 1",
        ),
        (["technique=sensitivity", "technique.sensitivity.sparsities=[0.5,0.5]"], r"\[0.5, 0.5\] and repeats a value"),
        (["+baseline.momentum=1"], r"baseline.momentum is no setting of `baseline`; expected one of epochs"),
        (["task.epochs=-3"], r"task.epochs is -3"),
        (["task.primary=matthews"], r"task.primary is matthews, which task `toy` does not measure"),
        (["model=tiny", "task=toy_lm"], r"`bert` is an encoder. Choose a decoder"),
        (
            ["model.path=/models/bert"],
            r"model.path is /models/bert; `tiny` has random .* Set model=pretrained model.path=/models/bert\.$",
        ),
        (["model=pretrained"], r"`pretrained` has neither weights nor an architecture. Set model.path"),
        (["model.dtype=int8"], r"model.dtype is 'int8'"),
        (["hardware.accelerator=tpu"], r"hardware.accelerator is 'tpu'; .*'auto', 'cpu' or 'gpu'"),
        (["hardware.threads=two"], r"hardware.threads is 'two'"),
        (["hardware.runtime=openvino"], r"python evaluate.py artifact=FOLDER hardware.runtime=.*end the chain on"),
        (["hardware.precision=foo"], r"hardware.precision is 'foo'"),
        (["hardware.latency.seconds=0"], r"hardware.latency.seconds is 0"),
        (["+hardware.foo=1"], r"hardware.foo is no setting of `hardware`"),
        (["hardware.latency=null"], r"hardware.latency is None"),
        (["seed=abc"], r"seed is 'abc'"),
        (["cache.dir=null"], r"cache.dir is None"),
        (["baseline=null"], r"`baseline` is not set"),
        (["~technique"], r"`technique` is not set"),
        (["+foo=1"], r"`foo` is no setting; expected one of model, "),
        (["++task.columns.txt=a"], r"task.columns.txt is no setting of `task.columns`"),
        (["model.config.hidden_size=130"], r"model.config"),
    ],
)
def test_a_mistake_is_reported_with_its_key(overrides, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        check(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["technique=qat", "baseline.epochs=0", "technique.qat.train.epochs=2"], "technique.qat"),
        (["technique=none", "baseline.epochs=2"], "baseline"),
        (
            ["technique=distill+gptq", "baseline.epochs=0", "technique.distill.train.epochs=2"],
            r"technique\.distill\.tr",
        ),
    ],
)
def test_float16_weights_are_not_trained(overrides, key):
    with pytest.raises(UserError, match=rf"model.dtype is float16 and {key}.*epochs is 2; .* Set model.dtype=bfloat16"):
        check("model.dtype=float16", *overrides)
    check("model.dtype=bfloat16", *overrides)
    check("model.dtype=float16", "baseline.epochs=0", "technique=gptq")


def test_a_missing_extra_is_reported_with_its_command(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"`gptq` needs compressed_tensors.*pip install -e '\.\[gptq\]'"):
        check("technique=gptq")


def test_a_missing_gpu_is_reported(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA GPU here. Set hardware=cpu"):
        check("hardware=gpu")


@pytest.mark.parametrize("there", [True, False])
def test_auto_trains_on_a_gpu_as_gpu_does_and_on_a_cpu_as_cpu_does(monkeypatch, there):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    same = "gpu" if there else "cpu"
    auto, named = (check(f"hardware={choice}").settings.hardware for choice in ("auto", same))
    assert replace(auto, accelerator=same) == named and auto.device == named.device
    assert auto.precision == ("bf16-mixed" if there else "32-true")


def test_a_pretrained_model_is_named_after_its_folder(tmp_path):
    folder = tmp_path / "mine"
    BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8).save_pretrained(folder)
    backbone = check("model=pretrained", f"model.path={folder}").backbone
    assert (backbone.name, backbone.path) == ("mine", str(folder))


def test_too_little_calibration_text_is_reported_before_training():
    planned = check("technique=gptq", "technique.gptq.samples=1000")
    with pytest.raises(UserError, match=r"samples is 1000 and task `toy` has 3 training texts. .*samples=3"):
        plan.check_data(planned, SimpleNamespace(train=range(3), validation=range(3)))


def test_calibration_text_is_a_file_or_a_task_and_part_of_the_address(tmp_path):
    file = tmp_path / "text.txt"

    def address(text):
        file.write_text(text)
        return check("technique=gptq", f"technique.gptq.calibration={file}").steps[0].read(0).address

    assert address("one text\nand another") == address("one text\nand another") != address("one text")
    settings = f"{{task: wikitext, path: {tmp_path}}}"
    planned = check("technique=gptq", f"technique.gptq.calibration={settings}")
    assert planned.steps[0].calibration.source.path == str(tmp_path)


@pytest.mark.parametrize(
    ("calibration", "advice"),
    [
        (
            "wikitxt",
            r"gptq.calibration is wikitxt, which is neither a text file nor a task \(did you mean `wikitext`\?",
        ),
        ("{path: /nowhere}", "neither a text file nor a task"),
        ("{task: wikitext, pth: x}", "technique.gptq.calibration.pth is no setting"),
    ],
)
def test_what_is_no_calibration_text_is_refused(calibration, advice):
    with pytest.raises(UserError, match=advice):
        check("technique=gptq", f"technique.gptq.calibration={calibration}")


@pytest.mark.parametrize("model", ["bert", "roberta", "roberta_large", "distilbert", "minilm", "tinyllama", "llama"])
def test_every_model_can_be_planned_from_its_architecture(model):
    check(f"model={model}", "model.path=null", "technique=prune+gptq")


def test_a_file_that_a_stage_reads_is_part_of_its_address(tmp_path):
    file = tmp_path / "keep.txt"

    def address(text):
        file.write_text(text)
        return check("technique=prune_vocab", f"technique.prune_vocab.keep_file={file}").steps[0].address

    assert address("one") == address("one") != address("another")


def test_the_place_of_the_data_is_no_part_of_the_address():
    here, there = (check("task=sst2", f"task.path={path}").address("same rows") for path in ("here", "there"))
    assert here == there != check("task=sst2", "task.path=here", "seed=1").address("same rows")


def test_what_only_measuring_reads_trains_no_baseline(monkeypatch):
    """Nor do limits, given the fingerprint of the rows, or defaults, given the settings that they became."""
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)
    settings = (
        *("hardware.threads=2", "task.limit.test=10", "task.limit.train=10", "task.metrics=[accuracy,matthews]"),
        *("model.learning_rate=1", "task.epochs=9", "split=validation", "hardware.latency.seconds=9"),
    )
    fixed = ("technique=prune", "baseline.learning_rate=0.001", "baseline.epochs=1")
    assert check(*fixed).compute_addresses("rows") == check(*fixed, *settings).compute_addresses("rows")


@pytest.fixture(scope="module")
def plain_addresses():
    return check("technique=prune").compute_addresses("rows")


@pytest.mark.parametrize(
    "setting",
    [
        *("seed=1", "task.max_length=16", "task.primary=f1_macro", "baseline.weight_decay=0.1", "model.dtype=bfloat16"),
        *("hardware.precision=bf16-mixed", "hardware.batch_size=auto", "technique.prune.sparsity=0.3"),
    ],
)
def test_what_training_reads_is_part_of_the_addresses(plain_addresses, setting):
    assert plain_addresses != check("technique=prune", setting).compute_addresses("rows")


def test_a_word_that_is_no_file_reads_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "head").mkdir()

    def address():
        words = ['technique.prune_vocab.keep=[".","~ 5 dollars"]', "technique.gptq.skip=[embeddings,head]"]
        return [step.address for step in check("technique=prune_vocab+gptq", *words).steps]

    before = address()
    (tmp_path / "head" / "file").write_text("new")
    assert address() == before


def test_every_file_that_a_stage_names_is_one_of_its_settings():
    for name in ("Prune", "PruneVocab", "Structured", "Distill"):
        technique = getattr(compress, name)
        settings = {setting.partition(".")[0] for setting in technique.files}
        assert settings and settings <= {*inspect.signature(technique).parameters}


def test_a_mistake_in_a_second_stage_of_a_name_is_reported_with_its_own_key():
    with pytest.raises(UserError, match=r"technique.prune_2.scope=row"):
        check("technique=prune+prune", "technique.prune_2.criterion=wanda", "technique.prune_2.scope=global")


def test_a_mistake_inside_a_value_of_several_types_is_reported_with_its_key():
    with pytest.raises(UserError, match=r"technique.prune.ratios.\*attention\* is 1.3; input should be less than 1"):
        check("technique=prune", "technique.prune.ratios={*attention*:1.3}")
