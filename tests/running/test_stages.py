"""What the baseline starts from."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file
from test_conf import CONF
from test_experiment import SMALL

from compress.artifacts.artifact import Description, read_description, write_artifact
from compress.models.matrices import matrices
from compress.running.experiment import prepare_experiment
from compress.running.stages import write_baseline
from compress.tiny_models import make_bert, make_tokenizer


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_the_zeros_of_a_pruned_checkpoint_are_kept_when_it_is_trained(tmp_path, share):
    model = make_bert()
    for layer in matrices(model).values():
        layer.weight.data[: int(share * len(layer.weight))] = 0
    write_artifact(tmp_path / "model", model, make_tokenizer(), Description("multiclass", "m", "t"))
    words = ["model=pretrained", f"model.path={tmp_path}/model", "baseline.epochs=1", f"cache.dir={tmp_path}/cache"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        planned, splits, _ = prepare_experiment(compose("train", [*SMALL, *words]))
    (tmp_path / "baseline").mkdir()
    write_baseline(planned, splits, tmp_path / "baseline")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "baseline"))
    pruned = [f"{name}.weight" for name in matrices(model)]
    assert all(torch.equal(before[name] == 0, after[name] == 0) for name in pruned)
    assert not any(torch.equal(before[name], after[name]) for name in pruned)
    limits = read_description(tmp_path / "baseline").limits
    zeros = f"50% to 50% zeros in {len(pruned)} layers"
    assert limits == ((f"baseline: the model was pruned before ({zeros}), and its zeros are kept",) if share else ())
