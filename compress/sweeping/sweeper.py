"""`python train.py -m search=latency`: Hydra's sweep over the chains that a search proposes, one job a trial.

The trials lie in the sweep's folder `trials`, a sweep of its own that is measured on the validation split. The sweep
itself are the chains of the Pareto front, measured on the test split once the choice is made. Importing this module is
cheap, as every start of `train.py` does so.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from omegaconf import DictConfig, OmegaConf, open_dict

from compress.cache.digests import compute_digest, digest_environment
from compress.cache.files import remove_path, write_atomically
from compress.errors import UserError
from compress.install import format_install
from compress.planning import chain
from compress.planning.advice import explain_hydra_error
from compress.planning.chain import PACKAGE, drop_unused_settings, expand_jobs, read_chain_name
from compress.reporting import findings
from compress.reporting.jobs import gather_rows, job_number, read_job_rows
from compress.reporting.report import write_report
from compress.reporting.rows import (
    Job,
    Row,
    build_failed_row,
    drop_repeated_baselines,
    is_faster,
    is_smaller,
    quality_drop,
)
from compress.reporting.tables import describe_size_ratio, describe_speedup, format_figures

if TYPE_CHECKING:
    from hydra.plugins.launcher import Launcher
    from hydra.types import HydraContext, TaskFunction

    from compress.sweeping.search import Result, Search, Settings


log = logging.getLogger(__name__)
TRIALS = "trials"
STUDY = "study.log"
ALIKE = 3
"""Failures in a row for one reason, after which no more trials are started: a full disk, say."""


class ChainSweeper(BasicSweeper):
    """Hydra's own, the jobs of which take the settings of their own stages alone."""

    def sweep(self, arguments: list[str]) -> Any:
        try:
            return super().sweep(arguments)
        except UserError as error:
            sys.exit(str(error))

    def split_arguments(  # type: ignore[override]
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        return list(
            self.split_overrides_to_chunks(expand_jobs(overrides, read_chain_name(self.config)), max_batch_size)
        )


class SearchSweeper(Sweeper):
    """Launches batches of trials until the budget is spent, and then what is to be chosen among."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.cfg, self.context, self.task = config, hydra_context, task_function

    def sweep(self, arguments: list[str]) -> None:
        try:
            self._run_search(arguments)
        except UserError as error:
            sys.exit(str(error))

    def _run_search(self, arguments: list[str]) -> None:
        settings, given = self._parse_settings(), self._read_shared_words(arguments)
        search = self._open_search(settings, given)
        folder = Path(self.cfg.hydra.sweep.dir)
        self._begin_folder(self.cfg)
        trials = self._run_trials(settings, search, given)
        front = search.find_front()
        log.info(f"On the test split, of {len(search.finished_trials)} trials those that could be chosen:")
        jobs = [[*given, *one.words] for one in front] or [[*given, "technique=none"]]
        self._make_launcher(self.cfg).launch(jobs, initial_job_idx=0)
        lines = list_conclusions(settings, search, trials, folder)
        write_atomically(folder / findings.CONCLUSIONS, "".join(f"{line}\n" for line in lines))

    def _parse_settings(self) -> Settings:
        from compress.planning.settings import parse_values, to_plain
        from compress.quiet import silence_libraries
        from compress.sweeping.search import Settings

        silence_libraries()
        if not find_spec("optuna"):
            raise UserError(f"A search needs optuna, which is not installed: {format_install('search')}")
        return parse_values(Settings, to_plain(self.cfg.get("search")), "search")

    def _read_shared_words(self, arguments: list[str]) -> list[str]:
        """The words of the command line that all jobs share."""
        given = []
        for one in OverridesParser.create().parse_overrides(arguments):
            key, word = one.key_or_group, str(one.input_line)
            if key.partition(".")[0] == "search":
                continue
            if key.partition(".")[0] == chain.GROUP:
                raise UserError(
                    f"`{word}` sets a technique, which the search chooses: name stages in search.slots, and their "
                    "values in search.settings (+search.settings.prune.criterion=[wanda])."
                )
            if one.is_sweep_override():
                raise UserError(f"`{word}` names several and a search is for one: start a search for each.")
            given.append(word)
        return given

    def _open_search(self, settings: Settings, given: list[str]) -> Search:
        """The search, with its stages and their settings found, that an earlier process may have begun."""
        from compress.planning.plan import make_plan
        from compress.planning.settings import to_plain
        from compress.sweeping.search import Search, flatten_settings

        names = [*settings.stages, *settings.recovery]
        for name in names:
            self._compose_config([*given, f"technique={name}"], "search.slots")
        for key, _ in flatten_settings(settings.settings):
            if (name := key.partition(".")[0]) in names:
                self._compose_config([*given, f"technique={name}", f"technique.{key}=null"], f"search.settings.{key}")
        planned = make_plan(self._compose_config([*given, "technique=none"], "search"))
        decides = {**to_plain(settings), "minutes": None, "trials": None, "jobs": None}
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        return Search(
            settings,
            read_sizes(planned.backbone.skeleton(planned.task)),
            lambda words: self._explain_fault([*given, *words]),
            planned.settings.seed,
            folder / STUDY,
            compute_digest([decides, given, digest_environment()]),
        )

    def _compose_config(self, words: list[str], key: str) -> DictConfig:
        """The config of a job."""
        try:
            config = self.context.config_loader.load_sweep_config(self.cfg, words)
        except HydraException as error:
            raise UserError(f"{key} cannot be used: {explain_hydra_error(error)}") from error
        with open_dict(config):
            config.pop("hydra")
            config.pop("search", None)
        drop_unused_settings(config.technique, words)
        return config

    def _explain_fault(self, words: list[str]) -> str:
        """Why a chain cannot work; empty where it can."""
        from compress.planning.plan import make_plan

        try:
            make_plan(self._compose_config(words, "search.settings"))
        except UserError as error:
            return str(error)
        return ""

    def _begin_folder(self, config: DictConfig) -> Path:
        """The folder of a sweep, as Hydra's own sweeper begins one."""
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        return folder

    def _make_launcher(self, config: DictConfig) -> Launcher:
        return Plugins.instance().instantiate_launcher(self.context, self.task, config)

    def _run_trials(self, settings: Settings, search: Search, given: list[str]) -> Path:
        """Try chains until the budget is spent; the folder of the trials."""
        from compress.sweeping.search import name_chain

        config = copy.deepcopy(self.cfg)
        with open_dict(config):
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / TRIALS)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{config.hydra.sweep.dir}'")
        folder, launcher = self._begin_folder(config), self._make_launcher(config)
        before, begin = search.seconds, time.monotonic()

        def minutes() -> float:
            return (before + time.monotonic() - begin) / 60

        number = 1 + max((one.job for one in search.finished_trials), default=-1)
        if number:
            log.info(f"The search goes on after {number} trials and {minutes():.0f} minutes.")
        failures: list[str] = []
        while True:
            batch: list[Any] = []
            while len(batch) < settings.jobs and not settings.over(minutes(), len(search.finished_trials) + len(batch)):
                if (trial := search.ask(minutes())) is None:
                    break
                batch.append(trial)
            if not batch:
                break
            words = [[*given, "split=validation", *trial.user_attrs["words"]] for trial in batch]
            for stopped in (path for job in range(number, number + len(batch)) for path in folder.glob(f"{job}_*")):
                remove_path(stopped)
            try:
                launcher.launch(words, initial_job_idx=number)
            except Exception as error:  # a cluster lost a job, say: what the others found is there
                log.error(f"{type(error).__name__}: {error}")
            for job, trial in enumerate(batch, number):
                row = read_job_row(folder, job)
                failures.append(row["reason"])
                search.tell(trial, read_result(row, settings.objective), job)
                log.info(
                    f"trial {job}: {name_chain(trial.user_attrs['words'])}: {describe_outcome(row, settings.objective)}"
                )
                remove_path(Path(row["folder"]) / "artifact")  # which the cache makes again
            number += len(batch)
            search.seconds = 60 * minutes()
            last = failures[-ALIKE:]
            if len(last) == ALIKE and last[0] and len(set(last)) == 1:
                raise UserError(
                    f"The last {ALIKE} trials failed for one reason, so the search was stopped: {last[0]} The same "
                    f"command with hydra.sweep.dir={self.cfg.hydra.sweep.dir} goes on with it."
                )
        if not search.finished_trials:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in search.left_out.items())
            raise UserError(f"No chain of search.slots can work here: {reasons or 'name other stages.'}")
        for name, reason in search.left_out.items():
            log.info(f"{name} was left out: {reason}")
        jobs = {one.job for one in search.finished_trials}  # and not those of another search into the folder
        rows = [row for row in gather_rows(folder) if job_number(Path(row["folder"]))[0] in jobs]
        write_report(folder, drop_repeated_baselines(rows))
        return folder


def read_sizes(skeleton: Any) -> dict[str, int]:
    """What shares of a model are of."""
    from compress.models.families import find_conventions

    config = skeleton.config
    return {
        "heads": config.num_attention_heads,
        "ffn": getattr(config, find_conventions(config).ffn_size, 0),
        "layers": config.num_hidden_layers,
    }


def read_job_row(folder: Path, job: int) -> Row:
    """What a job found out of its chain; of several of its number the one that began last."""
    begun = sorted(folder.glob(f"{job}_*/.hydra/config.yaml"), key=lambda path: path.stat().st_mtime)
    if begun:
        return read_job_rows(begun[-1].parents[1])[-1]
    lost = build_failed_row(Job("", "", "", 0), f"it left no result: see {folder}")
    return {**lost, "folder": str(folder / str(job))}


def read_result(row: Row, objective: str) -> Result | None:
    """What the search wants to know of a row; None where the trial failed."""
    from compress.sweeping.search import Result

    if row["status"] != "completed":
        return None
    cost = row["speedup"] if objective == "latency_ms" else row["compression_ratio"]
    cheaper = is_faster(row) if objective == "latency_ms" else is_smaller(row)
    return Result(1 / cost, quality_drop(row), cheaper)


def describe_outcome(row: Row, objective: str) -> str:
    """What a chain is worth, or why it failed."""
    if row["status"] != "completed":
        return f"failed: {row['reason']}"
    gain = describe_speedup(row) if objective == "latency_ms" else describe_size_ratio(row)
    return f"{gain}, {row['metric']} {format_figures(row)['change']}"


def list_conclusions(settings: Settings, search: Search, trials: Path, folder: Path) -> list[str]:
    """The choice, and what it was made from."""
    from compress.sweeping.search import name_chain

    failed = sum(one.result is None for one in search.finished_trials)
    failures = f"{failed} of which failed, " if failed else ""
    made = f"{len(search.finished_trials)} trials, {failures}in {search.seconds / 60:.0f} min"
    word = "fastest" if settings.objective == "latency_ms" else "smallest"
    within = (
        f"within {settings.max_drop:g} point{'s' * (settings.max_drop != 1)} of the baseline on the validation split"
    )
    chosen = search.chosen()
    if chosen is None:
        return [f"chosen: none, the baseline: of {made}, no chain was {word[:-3]}er {within} (see {trials})"]
    there, here = (
        describe_outcome(read_job_row(*place), settings.objective) for place in ((trials, chosen.job), (folder, 0))
    )
    return [
        f"chosen: {name_chain(chosen.words)}, the {word} {within}: {there} there; on the test split: {here}",
        f"every row is on the Pareto front by validation, and was measured on the test split once; {made}: {trials}",
    ]


ConfigStore.instance().store(  # in place of Hydra's own
    group="hydra/sweeper",
    name="basic",
    node={"_target_": f"{PACKAGE}.ChainSweeper", "max_batch_size": None, "params": None},
    provider="compress",
)
for plugin in (ChainSweeper, SearchSweeper):
    Plugins.instance().register(plugin)
    Plugins.instance().class_name_to_class[f"{PACKAGE}.{plugin.__name__}"] = plugin
