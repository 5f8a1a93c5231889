"""`technique=a+b`: what a chain composes to, and what it refuses."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.bash_completion import BashCompletion
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from compress.errors import UserError
from compress.planning.chain import (
    LONGEST_SLUG,
    ChainSearchPath,
    ChainSource,
    drop_unused_settings,
    expand_jobs,
    make_slug,
    prepare_overrides,
    read_stages,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def technique():
    """Yield a function: `technique("technique=prune")` returns `cfg.technique`."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield lambda *overrides: compose("train", list(overrides)).technique


@pytest.fixture
def tab(technique, monkeypatch, capsys):
    """Return a function: `tab("technique=p")` returns the shell's completions."""

    def press(line):
        monkeypatch.setenv("COMP_LINE", f"python train.py {line}")
        BashCompletion(GlobalHydra.instance().config_loader()).query("train")
        return capsys.readouterr().out.split()

    return press


def keys(node):
    return [stage.key for stage in read_stages(node)]


def test_a_chain_keeps_its_order(technique):
    assert keys(technique("technique=prune+gptq")) == ["prune", "gptq"]
    assert keys(technique("technique=gptq+prune")) == ["gptq", "prune"]
    assert technique("technique=gptq+prune").name == "gptq+prune"


def test_one_stage_is_a_chain_and_none_is_no_stage(technique):
    (stage,) = read_stages(technique("technique=prune"))
    assert (stage.key, stage.name, stage.node.criterion) == ("prune", "prune", "magnitude")
    assert read_stages(technique()) == read_stages(technique("technique=none")) == []


def test_a_stage_may_come_again(technique):
    node = technique("technique=prune+gptq+prune", "technique.prune_2.sparsity=0.5")
    assert [(stage.key, stage.name) for stage in read_stages(node)] == [
        ("prune", "prune"),
        ("gptq", "gptq"),
        ("prune_2", "prune"),
    ]
    assert node.prune.sparsity != 0.5 and node.prune_2.sparsity == 0.5


def test_a_stage_reads_the_rest_of_the_config(technique):
    assert technique("technique=prune", "model.learning_rate=0.25").prune.train.learning_rate == 0.25


def test_a_stage_steps_on_as_many_texts_as_the_baseline(technique):
    chain = "distill+drop_layers+finetune+prune+qat+structured"
    node = technique(f"technique={chain}", "baseline.batch_size=4", "baseline.accumulate=8", "baseline.warmup=0.5")
    assert all((node[key].train.batch_size, node[key].train.accumulate) == (4, 8) for key in keys(node))
    assert all(node[key].train.warmup == 0.5 for key in keys(node))


@pytest.mark.parametrize(
    "chain, advice",
    [
        ("prunne", "unknown stage `prunne`: did you mean `prune`?"),
        ("gptq+prunne+gptq", "did you mean `gptq+prune+gptq`?"),
        ("prune+zzz", "unknown stage `zzz`.\nStages: "),
        ("prune+", "empty stage name. Type `technique=prune`"),
        ("+prune", "empty stage name. Type `technique=prune`"),
        ("prune++gptq", "empty stage name. Type `technique=prune+gptq`"),
        ("", "empty stage name. Type `technique=none`"),
        ("none+prune", "`none` means no stage at all. Type `technique=prune`"),
        ("prune+none+gptq", "`none` means no stage at all. Type `technique=prune+gptq`"),
    ],
)
def test_what_is_no_chain_is_refused_with_advice(technique, chain, advice):
    with pytest.raises(ConfigCompositionException) as error:
        technique(f"technique={chain}")
    assert f"`technique={chain}` has" in str(error.value) and advice in str(error.value)


def test_a_value_of_a_stage_outside_the_chain_is_refused(technique):
    with pytest.raises(ConfigCompositionException, match="Could not override 'technique.prune.sparsity'"):
        technique("technique=gptq", "technique.prune.sparsity=0.5")


@pytest.mark.parametrize(
    "overrides, ghost, example",
    [
        (["technique=gptq", "++technique.prune.sparsity=0.5"], "prune", "prune+gptq"),
        (["technique=none", "++technique.prune.sparsity=0.5"], "prune", "prune"),
        (["technique=prune", "++technique.prune_2.sparsity=0.5"], "prune_2", "prune+prune"),
        (["technique=[prune,gptq]"], "prune", "prune+gptq"),
    ],
)
def test_a_stage_set_outside_the_chain_is_refused(technique, overrides, ghost, example):
    with pytest.raises(UserError) as error:
        read_stages(technique(*overrides))
    assert f"`technique.{ghost}` is set but the chain" in str(error.value)
    assert f"e.g. `technique={example}`" in str(error.value)


@pytest.mark.parametrize("lost", ["~technique.prune", "~technique.prune._target_", "technique.prune=null"])
def test_a_stage_without_its_target_is_refused(technique, lost):
    with pytest.raises(UserError, match="`technique.prune` has no `_target_`.* `conf/technique/stage/prune.yaml`"):
        read_stages(technique("technique=gptq+prune", lost))


def test_tab_completes_stages(tab):
    assert {"technique=none", "technique=prune", "technique=gptq"} <= set(tab("technique="))
    assert tab("technique=prun") == ["technique=prune", "technique=prune_vocab"]


def test_tab_completes_chains_and_sweeps(tab):
    after_plus = tab("technique=gptq+prune+")
    assert "technique=gptq+prune+gptq" in after_plus and "technique=gptq+prune+none" not in after_plus
    assert tab("technique=gptq+prun") == ["technique=gptq+prune", "technique=gptq+prune_vocab"]
    assert tab("-m technique=none,prune+gpt") == ["technique=none,prune+gptq"]


def test_a_fragment_of_configs_is_no_choice(technique, tab):
    for group in ("hardware", "model", "task", "technique"):
        offered = tab(f"{group}=")
        assert offered and not any(word.startswith(f"{group}=_") for word in offered)
    with pytest.raises(ConfigCompositionException, match="unknown stage `_train`"):
        technique("technique=_train")


def test_tab_offers_no_stage_group(tab):
    assert "technique=" in tab("tech")
    assert tab("technique/") == []


def test_registering_again_changes_nothing(technique):
    Plugins.instance().register(ChainSource)
    Plugins.instance().register(ChainSearchPath)
    assert Plugins.instance().discover(SearchPathPlugin).count(ChainSearchPath) == 1
    search_path = GlobalHydra.instance().config_loader().get_search_path()
    before = [element.path for element in search_path.get_path()]
    ChainSearchPath().manipulate_search_path(search_path)
    assert [element.path for element in search_path.get_path()] == before
    assert sum(path.startswith("chain://") for path in before) == 1


def test_a_launcher_can_pickle_it(technique):
    loader = pickle.dumps(GlobalHydra.instance().config_loader())
    child = (  # imports compress only by unpickling
        "import pickle, sys; from hydra.core.utils import setup_globals; from hydra.types import RunMode\n"
        "setup_globals(); loader = pickle.load(sys.stdin.buffer)\n"
        "cfg = loader.load_configuration('train', ['technique=gptq+prune'], RunMode.RUN)\n"
        "cfg.hydra.job.num = 4; print(cfg.technique.name, cfg.hydra.sweep.subdir)"
    )
    done = subprocess.run([sys.executable, "-c", child], cwd=ROOT, input=loader, capture_output=True, check=True)
    assert done.stdout.decode().split() == ["gptq+prune", "4_technique-gptq+prune"]


def test_another_programs_config_folder_is_left_unchanged(tmp_path):
    (tmp_path / "technique").mkdir()
    (tmp_path / "technique" / "a+b.yaml").write_text("x: 1\n")
    (tmp_path / "main.yaml").write_text("defaults: [{technique: a+b}]\n")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("main") == {"technique": {"x": 1}}


def test_a_slug_is_the_number_and_the_overrides():
    assert make_slug(0, "technique=prune+gptq") == "0_technique-prune+gptq"
    assert make_slug(3, "") == "3"
    assert OmegaConf.create({"s": "${slug:1,'seed=2'}"}).s == "1_seed-2"


@pytest.mark.parametrize("odd", ["model.path=/a/b", "x='a b'", "model.path=../../etc", "task=ä", "x=" + "y" * 300])
def test_a_slug_of_odd_overrides_is_one_short_folder_of_its_own(odd, tmp_path):
    name = make_slug(0, odd)
    assert "/" not in name and len(name) <= LONGEST_SLUG and name.isascii()
    assert name != make_slug(0, odd + "z")
    assert name[-9] == "-" and int(name[-8:], 16) >= 0
    (tmp_path / name).mkdir()


def test_an_experiment_sets_stages_that_not_every_chain_of_its_sweep_has(technique):
    typed = ["experiment=distill_sst2", "technique.distill.temperature=2.0"]
    students = {chain: technique(*typed, f"technique={chain}") for chain in ("drop_layers", "distill")}
    for chain, node in students.items():
        drop_unused_settings(node, typed)
        assert keys(node) == [chain]
    assert students["drop_layers"].drop_layers.train.epochs == 20
    assert students["distill"].distill.temperature == 2.0


@pytest.mark.parametrize("typed", ["+technique.prune.sparsity=0.5", "++technique.prunne.sparsity=0.5"])
def test_what_is_added_by_hand_or_no_stage_is_not_left_out(technique, typed):
    node = technique("technique=gptq", typed)
    drop_unused_settings(node, [typed])
    with pytest.raises(UserError, match="is set but the chain"):
        read_stages(node)


def split(words, chain="none"):
    return expand_jobs(OverridesParser.create().parse_overrides(words), chain)


def test_the_jobs_of_a_sweep_take_the_settings_of_their_own_stages():
    words = ["technique=none,prune,prune+gptq", "technique.prune.sparsity=0.2,0.5", "+technique.gptq.bits=3", "seed=1"]
    assert split(words) == [
        ["technique=none", "seed=1"],  # once, whatever the sparsity
        ["technique=prune", "technique.prune.sparsity=0.2", "seed=1"],
        ["technique=prune", "technique.prune.sparsity=0.5", "seed=1"],
        ["technique=prune+gptq", "technique.prune.sparsity=0.2", "+technique.gptq.bits=3", "seed=1"],
        ["technique=prune+gptq", "technique.prune.sparsity=0.5", "+technique.gptq.bits=3", "seed=1"],
    ]
    assert split(["technique.prune.sparsity=0.2,0.5"], "prune") == [
        ["technique.prune.sparsity=0.2"],
        ["technique.prune.sparsity=0.5"],
    ]


def test_a_range_of_fractions_is_what_was_typed():
    assert split(["baseline.warmup=range(0.1,0.4,0.1)"]) == [[f"baseline.warmup={x}"] for x in (0.1, 0.2, 0.3)]
    assert split(["seed=range(3)", "baseline.warmup=range(1,0,-0.5)"])[-1] == ["seed=2", "baseline.warmup=0.5"]


def test_a_sweep_over_nothing_is_refused():
    with pytest.raises(UserError, match=r"`seed=range\(2,2\)` has no value; expected one or more"):
        split(["seed=range(2,2)"])


def test_a_sweep_may_begin_with_null():
    assert split(["cache.max_gb=null,1"]) == [["cache.max_gb=null"], ["cache.max_gb=1"]]


def test_a_setting_of_a_stage_that_no_chain_of_a_sweep_has_is_refused():
    with pytest.raises(
        UserError, match="the chain `none` has no stage `awq`. Remove the setting, or .* `technique=awq`"
    ):
        split(["technique=none,prune", "technique.awq.bits=3"])


def test_a_sweep_leaves_the_settings_of_stages_to_its_jobs():
    words = ["-m", "technique=none,prune", "seed=1", "technique.prune.layers=[a,b]", "technique.prune.sparsity=0.2,0.5"]
    taken = ["technique.prune.layers=choice([a,b])", "technique.prune.sparsity=0.2,0.5"]
    assert prepare_overrides(words) == [*words[:3], *taken]
    assert split(prepare_overrides(words)[1:])[1][-2:] == [
        "technique.prune.layers=[a,b]",
        "technique.prune.sparsity=0.2",
    ]


@pytest.mark.parametrize("words", [["technique=gptq"], []])
def test_a_setting_of_a_stage_that_a_single_run_lacks_is_refused(words):
    with pytest.raises(UserError, match=f"the chain `{'gptq' if words else 'none'}` has no stage `prune`"):
        prepare_overrides([*words, "technique.prune.sparsity=0.5"])


@pytest.mark.parametrize("word", ["experiment=x", "--config-name=x", "technique=none,prune", "technique=gptq+prune"])
def test_a_setting_of_a_stage_that_a_single_run_may_have_is_left_to_hydra(word):
    assert prepare_overrides([word, "technique.prune.sparsity=0.5"]) == [word, "technique.prune.sparsity=0.5"]
