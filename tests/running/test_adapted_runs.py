"""A baseline and stages that train an adapter, in whole runs; the artifact has no trace of it."""

import csv
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compress.artifacts.artifact import load_artifact, read_description
from compress.models.matrices import find_pruned_layers, matrices, measure_sparsity

PRUNE = ("technique=prune+finetune", "technique.prune.sparsity=0.5")
LORA = "{kind: lora, rank: 4}"


def read_report(folder, stage):
    (row,) = csv.DictReader((folder / "report" / stage / "adapter.csv").open())
    return row


def test_lora_recovers_a_pruned_model_and_leaves_a_plain_one(carry_out, tmp_path):
    pytest.importorskip("peft", reason="pip install -e '.[peft]'")
    carry_out(*PRUNE, f"technique.finetune.adapter={LORA}")
    folder = tmp_path / "artifact"
    names = load_file(folder / "model.safetensors").keys()
    assert not any("lora" in name or "base_layer" in name for name in names) and not list(folder.glob("adapter*"))

    model, tokenizer, description = load_artifact(folder)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)("a text", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(theirs(**batch).logits, model(**batch).logits)
    assert find_pruned_layers(model, least=0.3).keys() == matrices(model).keys()
    assert measure_sparsity(m.weight for m in matrices(model).values()) == pytest.approx(0.5, abs=1e-3)

    trained = int(read_report(tmp_path, "2_finetune")["trained_parameters"])
    assert [done.trained_parameters for done in description.history] == [None, None, trained]
    assert f"trained_parameters={trained} |" in (folder / "README.md").read_text()


def test_a_baseline_is_trained_by_an_adapter_and_recovered_by_perp(carry_out, tmp_path):
    pytest.importorskip("peft", reason="pip install -e '.[peft]'")
    carry_out(*PRUNE, "baseline.adapter={kind: dora, rank: 4}", "technique.finetune.adapter={kind: perp}")
    baseline, finetune = read_report(tmp_path, "0_baseline"), read_report(tmp_path, "2_finetune")
    assert (baseline["kind"], finetune["kind"]) == ("dora", "perp")
    assert float(finetune["share"]) < float(baseline["share"]) < 0.3
    description = read_description(tmp_path / "artifact")
    history = description.history
    assert "its random weights stay as they are, because only an adapter was trained" in " ".join(description.limits)
    assert history[0].settings["adapter"]["rank"] == 4 and history[2].settings["adapter"] == {"kind": "perp"}
    assert "adapter" in json.loads((tmp_path / "artifact" / "compress.json").read_text())["history"][0]["settings"]
    assert find_pruned_layers(load_artifact(tmp_path / "artifact").model, least=0.3)


def test_perp_trains_beside_integers(carry_out, tmp_path):
    pytest.importorskip("compressed_tensors", reason="pip install -e '.[gptq]'")
    carry_out("technique=gptq+finetune", "technique.gptq.group_size=32", "technique.finetune.adapter={kind: perp}")
    description = read_description(tmp_path / "artifact")
    assert description.weights == "packed" and description.history[2].trained_parameters
