import subprocess
import sys
from multiprocessing import spawn
from types import ModuleType, SimpleNamespace

import pytest
import tiny
import torch
from transformers import BertConfig, BertForSequenceClassification

from compress.measuring import meters
from compress.measuring.meters import find_energy_meter, hide_main_module, measure_memory, measure_work

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"[PAD]": 0}, "[PAD]")))
    made = {}
    for vocabulary in (1_000, 1_000_000):
        folder = made[vocabulary] = tmp_path_factory.mktemp(str(vocabulary))
        shape = {**tiny.SHAPE, "vocab_size": vocabulary}
        BertForSequenceClassification(BertConfig(**shape)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return made


def test_a_separate_process_reports_the_peak_memory_of_each_model(folders):
    text = [{"input_ids": torch.ones(1, 8, dtype=torch.long)}]
    large, small = (measure_memory(folders[size], "multiclass", text, CPU) for size in (1_000_000, 1_000))
    table = 4 * 1_000_000 * tiny.SHAPE["hidden_size"]
    assert table < large.model_bytes - small.model_bytes < 3 * table
    assert small.libraries_bytes == pytest.approx(large.libraries_bytes, rel=0.05) and small.gpu_bytes is None


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime", "openvino"])
def test_loading_an_artifact_imports_no_training_library(runtime):
    modules = f"compress.measuring.meters, compress.runtimes.{runtime}"
    script = f"import sys, {modules}; sys.exit('pytorch_lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_a_process_that_dies_leaves_no_figure_but_a_warning(folders, caplog):
    (folders[1_000] / "model.safetensors").rename(folders[1_000] / "lost")
    assert measure_memory(folders[1_000], "multiclass", [], CPU) is None
    assert "memory of" in caplog.text and "is not measured" in caplog.text


def test_a_new_process_does_not_run_the_users_script(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    sys.modules["__main__"].__file__ = "script_without_a_guard.py"
    assert "init_main_from_path" in spawn.get_preparation_data("child")
    with hide_main_module():
        assert not [key for key in spawn.get_preparation_data("child") if key.startswith("init_main")]
    assert "init_main_from_path" in spawn.get_preparation_data("child")


def test_the_energy_counter_continues_after_it_wraps(tmp_path):
    for number, joules in enumerate((9.5, 1.0)):
        folder = tmp_path / f"intel-rapl:{number}"
        folder.mkdir()
        (folder / "max_energy_range_uj").write_text("9999999\n")
        (folder / "energy_uj").write_text(f"{joules * 1e6:.0f}\n")
    part = tmp_path / "intel-rapl:0:0"  # a part of the package, included in its counter
    part.mkdir()
    read = find_energy_meter(CPU, tmp_path)
    assert read() == 0
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("500000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("3000000\n")
    assert read() == pytest.approx(1.0 + 2.0)
    assert find_energy_meter(CPU, tmp_path / "none") is None


def test_work_is_averaged_over_the_texts_of_all_calls(monkeypatch):
    calls = []
    clocks = SimpleNamespace(perf_counter=lambda: 0.004 * len(calls), process_time=lambda: 0.002 * len(calls))
    monkeypatch.setattr(meters, "time", clocks)
    found = measure_work(calls.append, 3, 4, 0.013, CPU, lambda: 5.0 * len(calls))
    assert calls == [0, 1, 2, 0, 1, 2]  # one cycle takes 12 ms, and there are only whole ones
    assert found.cpu_ms == pytest.approx(2 / 4) and found.energy_j == 5.0 / 4 and found.gpu_ms is None


def test_gpu_time_is_measured_by_its_events(monkeypatch):
    class Event:
        clock = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = Event.clock

        def synchronize(self):
            assert Event.clock == self.at

        def elapsed_time(self, end):
            return end.at - self.at

    def call(i):
        Event.clock += 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = measure_work(call, 2, 3, 0.0, torch.device("cuda"), None)
    assert (found.gpu_ms, found.energy_j) == (2.0, None)
