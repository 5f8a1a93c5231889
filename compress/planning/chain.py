"""Compose a chain of stages from one choice of the config group `technique`, such as `technique=prune+gptq`.

The stages are the files of `conf/technique/stage`. A chain has no file: `ChainSource` makes its config when Hydra loads
it, a defaults list with one entry for each stage. The command line, experiments, sweepers, the compose API and Tab
completion all use it. Importing this module registers it, and is cheap because it does not import torch.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain as flatten
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict

from compress.errors import UserError
from compress.install import CONF, format_command
from compress.planning.words import list_words, read_override

GROUP = "technique"
STAGES = "technique/stage"
NONE = "none"  # the chain without a stage
Names = list[str]  # inside ChainSource, the method `list` hides the built-in
SETTING = re.compile(rf"({GROUP}\.(\w+)[\w.]*)=(.+)", re.DOTALL)
LONGEST_SLUG = 100  # file systems stop at 255 bytes; a listing is readable up to here


@dataclass(frozen=True)
class Stage:
    """One stage of a chain: `key` is `prune_2` for the second `prune`, `node` its config."""

    key: str
    name: str
    node: DictConfig


def read_stages(technique: DictConfig) -> list[Stage]:
    """Return the stages of `cfg.technique` in the order in which they run; `technique=none` has no stages.

    Raises:
        UserError: a stage is set but not in the chain, or has no `_target_`.
    """
    chain = technique.name
    names = [] if chain == NONE else chain.split("+")
    keyed = _assign_keys(names)
    for key in map(str, technique):
        if key != "name" and key not in keyed:
            raise UserError(explain_missing_stage(chain, key))
    for key, name in keyed.items():
        node = technique.get(key)
        if not isinstance(node, DictConfig) or not node.get("_target_"):
            raise UserError(
                f"Stage `{GROUP}.{key}` has no `_target_`, the class that runs it. "
                f"Set it in `conf/{STAGES}/{name}.yaml`, e.g. `_target_: compress.techniques.prune.Prune`."
            )
    return [Stage(key, name, technique[key]) for key, name in keyed.items()]


def read_chain_name(config: Any) -> str:
    """Return the name of a config's chain; `none` for the config of an evaluation."""
    return str(OmegaConf.select(config, f"{GROUP}.name", default=NONE))


def explain_missing_stage(chain: str, key: str) -> str:
    """Return an error message for a setting of a stage that the chain lacks."""
    name = re.sub(r"_\d+$", "", key)
    example = name if chain == NONE else f"{name}+{chain}"
    return (
        f"`{GROUP}.{key}` is set but the chain `{chain}` has no stage `{key}`. "
        f"Remove the setting, or add the stage to the chain, e.g. `{GROUP}={example}`."
    )


def prepare_overrides(words: list[str]) -> list[str]:
    """Return the words of a command line as Hydra accepts them. The settings of a sweep's stages become choices of one
    value: Hydra leaves choices to the jobs, and the sweep itself has no stages.

    Raises:
        UserError: a stage is set that the chain of a single run lacks.
    """
    groups = {word.partition("=")[0] for word in words}
    if "search" in groups:
        return words
    if {"-m", "--multirun"} & groups:
        single = {word for word in words if SETTING.fullmatch(word) and not read_override(word).is_sweep_override()}
        return [SETTING.sub(r"\1=choice(\3)", word) if word in single else word for word in words]
    elsewhere = {"experiment", "--config-name"} & groups
    chain = _find_chain(words, "" if elsewhere else NONE)
    for setting in filter(None, map(SETTING.fullmatch, words)):
        if chain and "," not in chain and not _has_stage(chain, setting[2]):
            raise UserError(explain_missing_stage(chain, setting[2]))
    return words


def expand_jobs(overrides: list[Override], chain: str) -> list[list[str]]:
    """Return the words of every job of a sweep, without duplicate jobs. A job keeps only the settings of stages of its
    own chain, which is ``chain`` if its words name none.

    Raises:
        UserError: a stage is set that no chain of the sweep has, or a word has no value.
    """
    for override in overrides:
        _make_exact(override.value())
        if override.is_discrete_sweep() and not any(True for _ in override.sweep_iterator()):  # null is a value
            raise UserError(f"`{override.input_line}` has no value; expected one or more. Type --help for the choices.")
    jobs = BasicSweeper.split_arguments(overrides, None)[0]
    chains = [_find_chain(words, chain) for words in jobs]

    def applies(word: str, chain: str) -> bool:
        setting = re.match(rf"[+~]*{GROUP}\.(\w+)", word)
        if setting and not any(_has_stage(other, setting[1]) for other in chains):
            raise UserError(explain_missing_stage(chain, setting[1]))
        return not setting or _has_stage(chain, setting[1])

    kept = [tuple(word for word in words if applies(word, chain)) for words, chain in zip(jobs, chains)]
    return [list(words) for words in dict.fromkeys(kept)]


def _make_exact(value: Any) -> None:
    """Have Hydra add the numbers of a range as they were typed: ``range(0.1,0.4,0.1)`` is 0.1, 0.2 and 0.3, and in
    binary fractions also 0.30000000000000004 and 0.4."""
    if isinstance(value, RangeSweep):
        for name in ("start", "stop", "step"):
            if isinstance(number := getattr(value, name), float):
                setattr(value, name, Decimal(str(number)))


def _find_chain(words: Sequence[str], default: str) -> str:
    """Return the chain that the words of a run or job name."""
    return next((word.partition("=")[2] for word in words if word.startswith(f"{GROUP}=")), default)


def _has_stage(chain: str, key: str) -> bool:
    """Return whether a chain has settings under `key`."""
    return key in ("name", *_assign_keys(chain.split("+")))


def drop_unused_settings(technique: DictConfig, typed: Iterable[str]) -> None:
    """Drop an experiment's settings of stages that this chain of its sweep lacks. Settings ``typed`` with a `+` on the
    command line, and names that are no stages, remain and are refused by :func:`read_stages`."""
    keyed, typed = _assign_keys(technique.name.split("+")), list_words(typed)
    for key in [str(key) for key in technique if key != "name" and key not in keyed]:
        is_stage = re.sub(r"_[0-9]+$", "", key) in list_choices(STAGES)
        if is_stage and not any(re.match(rf"\+\+?{GROUP}\.{key}\b", override) for override in typed):
            with open_dict(technique):
                del technique[key]


def list_config_folders() -> list[Path]:
    """Return the config folders of this run, with that of ``--config-dir`` first; outside of a run, our own."""
    if not HydraConfig.initialized():
        return [CONF]
    schemes = ("file", ChainSource.scheme())
    sources = HydraConfig.get().runtime.config_sources
    return [Path(source.path.removeprefix("file://")) for source in sources if source.schema in schemes]


def list_choices(group: str) -> Names:
    """Return the names of a group's YAMLs in the config folders, without fragments, which begin with an underscore."""
    return sorted({file.stem for folder in list_config_folders() for file in (folder / group).glob("[!_]*.yaml")})


def format_choices(group: str) -> str:
    """Return the names of a group's YAMLs for a help text."""
    return ", ".join(list_choices(group))


def make_slug(number: int, overrides: str) -> str:
    """Return the name of a sweep job's folder: `0_technique-prune+gptq`; long or unusual overrides end in a hash.

    The name has no `=` and no `,`, because a user types it as `artifact=FOLDER` and Hydra allows neither in a value.
    """
    full = (f"{number}_{overrides}" if overrides else str(number)).replace("=", "-").replace(",", "_")
    safe = re.sub(r"[^\w+.-]+", "-", full, flags=re.ASCII)
    if safe == full and len(full) <= LONGEST_SLUG:
        return full
    return f"{safe[: LONGEST_SLUG - 9]}-{hashlib.sha256(full.encode()).hexdigest()[:8]}"


def choose_by_scale(full: Any, small: Any, *, _root_: DictConfig) -> Any:
    """Return one of two values of an experiment, chosen by `scale`: `epochs: ${scaled:5,1}`."""
    return {"full": full, "small": small}[_root_.scale]


def name_model(path: str | None) -> str:
    """Return the name of the model at a path: `bert-tiny` for `prajjwal1/bert-tiny`."""
    return Path(path).name if path else "pretrained"


class ChainSource(ConfigSource):
    """The config folder, with every chain of its stages as a choice of `technique`."""

    def __init__(self, provider: str, path: str):
        super().__init__(provider, path)  # chain:///x/conf, chain://file:///x/conf, chain://pkg://x.conf
        scheme = self.path.split("://")[0] if "://" in self.path else "file"
        self.folder = SourcesRegistry.instance().resolve(scheme)(provider, self.path)
        # Without stages it is the config folder of a program that imports us, which stays unchanged.
        self.has_stages = self.folder.is_group(STAGES)
        self.sources: Sequence[ConfigSource] = [self.folder]

    @staticmethod
    def scheme() -> str:
        return "chain"

    def available(self) -> bool:
        return self.folder.available()

    def is_group(self, config_path: str) -> bool:
        return self.folder.is_group(config_path)

    def is_config(self, config_path: str) -> bool:
        # Every name counts as a choice, so that a misspelt name gets our advice instead of Hydra's search path.
        return self._parse_choice(config_path) is not None or self.folder.is_config(config_path)

    def load_config(self, config_path: str) -> ConfigResult:
        chain = self._parse_choice(config_path)
        if chain is None:
            return self.folder.load_config(config_path)
        keyed = _assign_keys(self._check_names(chain))
        defaults = ["_self_", *(f"stage/{name}@{key}" for key, name in keyed.items())]
        config = OmegaConf.create({"defaults": defaults, "name": chain})
        return ConfigResult(self.provider, self.full_path(), config, header={"package": None})

    def list(self, config_path: str, results_filter: ObjectType | None) -> Names:
        if not self.has_stages:
            return self.folder.list(config_path, results_filter)
        if config_path.strip("/") != GROUP:
            return self._list_choices(config_path, results_filter)
        # No subgroups: `--help` and Tab would offer each stage twice.
        return [] if results_filter == ObjectType.GROUP else [*self._list_stages(), *self._list_completions()]

    def _list_stages(self) -> Names:
        """Return the stages of every source of configs that Hydra reads."""
        if GlobalHydra.instance().is_initialized():  # not so in a launcher's process, which unpickles this source
            self.sources = GlobalHydra.instance().config_loader().get_sources()
        stages = (source.list(STAGES, ObjectType.CONFIG) for source in self.sources if source.is_group(STAGES))
        return sorted(name for name in set(flatten.from_iterable(stages)) if not name.startswith("_"))

    def _list_choices(self, config_path: str, results_filter: ObjectType | None) -> Names:
        """Return a folder's choices, without fragments for defaults lists, whose names begin with an underscore."""
        return [name for name in self.folder.list(config_path, results_filter) if not name.startswith("_")]

    def _parse_choice(self, config_path: str) -> str | None:
        """Return the chain of a config path: `prune+gptq` of `technique/prune+gptq`; None outside of `technique`."""
        group, _, chain = config_path.lstrip("/").rpartition("/")
        return chain.removesuffix(".yaml") if self.has_stages and group == GROUP else None

    def _check_names(self, chain: str) -> Names:
        """Return the stages' names in `chain`.

        Raises:
            ConfigCompositionException: `chain` has an empty or unknown name.
        """
        known, names = self._list_stages(), chain.split("+")
        choices = f"Stages: {', '.join(known)}; chain them with '+'."
        if chain == NONE:
            return []
        if "" in names:
            kept = "+".join(filter(None, names)) or NONE
            raise ConfigCompositionException(
                f"`{GROUP}={chain}` has an empty stage name. Type `{GROUP}={kept}`, or name the stage.\n{choices}"
            )
        for name in names:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                meant = f"did you mean `{'+'.join(near[0] if n == name else n for n in names)}`?" if near else ""
                raise ConfigCompositionException(
                    f"`{GROUP}={chain}` has an unknown stage `{name}`{': ' if near else '.'}{meant}\n{choices}"
                )
        if NONE in names:
            kept = "+".join(n for n in names if n != NONE) or NONE
            raise ConfigCompositionException(
                f"`{GROUP}={chain}` has `{NONE}` inside a chain, but `{NONE}` means no stage at all. "
                f"Type `{GROUP}={kept}`."
            )
        return names

    def _list_completions(self) -> Names:
        """Return the completions of `technique=a+` or `technique=a,` for the shell, whose line is in COMP_LINE."""
        typed = re.search(rf"(?:^|\s){GROUP}=(\S*[+,])[^\s+,]*$", os.environ.get("COMP_LINE", ""))
        if not typed:
            return []
        inside = typed[1].endswith("+")
        return [typed[1] + name for name in self._list_stages() if not (inside and name == NONE)]


class ChainSearchPath(SearchPathPlugin):
    """Replace the program's config folder by a `ChainSource`."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for element in search_path.get_path():
            if element.provider == "main" and not element.path.startswith("chain://"):
                element.path = f"chain://{element.path}"


def _assign_keys(names: list[str]) -> dict[str, str]:
    """Return the stages' names by key, in order: the second `prune` of a chain has the key `prune_2`."""
    keyed = {}
    for i, name in enumerate(names):
        nth = names[: i + 1].count(name)
        keyed[name if nth == 1 else f"{name}_{nth}"] = name
    return keyed


Plugins.instance().register(ChainSource)
Plugins.instance().register(ChainSearchPath)
OmegaConf.register_new_resolver("choices", format_choices, replace=True)
OmegaConf.register_new_resolver("command", format_command, replace=True)
OmegaConf.register_new_resolver("slug", make_slug, replace=True)
OmegaConf.register_new_resolver("model_name", name_model, replace=True)
OmegaConf.register_new_resolver("scaled", choose_by_scale, replace=True)

PACKAGE = "hydra_plugins.compress"
"""The package in which Hydra expects its plugins."""
TARGET = f"{PACKAGE}.SearchSweeper"
