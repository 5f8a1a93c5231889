"""Sweep over the chains that a search proposes, one job a trial: `python train.py -m search=latency`.

The trials are a sweep of their own in the sweep's folder `trials`, measured on the validation split. The sweep itself
holds the chains of the Pareto front, measured on the test split after the choice. Importing this module is cheap,
because every start of `train.py` imports it.
"""

from __future__ import annotations

import copy
import logging
import math
import shlex
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
from compress.cache.sources import digest_package
from compress.errors import UserError
from compress.install import format_install
from compress.planning import chain
from compress.planning.advice import explain_hydra_error
from compress.planning.chain import PACKAGE, drop_unused_settings, expand_jobs, read_chain_name
from compress.planning.words import quote_value
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

    from compress.sweeping.search import Result, Search
    from compress.sweeping.space import Settings


log = logging.getLogger(__name__)
TRIALS = "trials"
STUDY = "study.log"
ALIKE = 3
"""Failures in a row for the same reason that end the search, e.g. on a full disk."""


class ChainSweeper(BasicSweeper):
    """Hydra's own sweeper, except that a job takes only the settings of its own stages."""

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
    """Launches batches of trials until the budget is spent, and then the chains to choose from."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.cfg, self.context, self.task = config, hydra_context, task_function

    def sweep(self, arguments: list[str]) -> None:
        try:
            self._run_search(arguments)
        except UserError as error:
            sys.exit(str(error))

    def _run_search(self, arguments: list[str]) -> None:
        settings, shared = self._parse_settings(), self._read_shared_words(arguments)
        search = self._open_search(settings, shared)
        folder = Path(self.cfg.hydra.sweep.dir)
        self._begin_folder(self.cfg)
        trials = self._run_trials(settings, search, shared)
        front = search.find_front()
        log.info(f"The best of {len(search.finished_trials)} trials, on the test split:")
        jobs = [[*shared, *tried.words] for tried in front] or [[*shared, "technique=none"]]
        self._make_launcher(self.cfg).launch(jobs, initial_job_idx=0)
        lines = list_conclusions(settings, search, trials, folder)
        write_atomically(folder / findings.CONCLUSIONS, "".join(f"{line}\n" for line in lines))

    def _parse_settings(self) -> Settings:
        from compress.planning.settings import parse_values, to_plain
        from compress.quiet import silence_libraries
        from compress.sweeping.space import Settings

        silence_libraries()
        if not find_spec("optuna"):
            raise UserError(f"search needs optuna, which is not installed. Type {format_install('search')}")
        return parse_values(Settings, to_plain(self.cfg.get("search")), "search")

    def _read_shared_words(self, arguments: list[str]) -> list[str]:
        """Return the words of the command line that all jobs share."""
        shared = []
        for override in OverridesParser.create().parse_overrides(arguments):
            key, word = override.key_or_group, str(override.input_line)
            if key.partition(".")[0] == "search":
                continue
            if key.partition(".")[0] == chain.GROUP:
                raise UserError(
                    f"`{word}` sets a technique, which the search chooses. Set stages in search.slots and their "
                    "values in search.settings (+search.settings.prune.criterion=[wanda])."
                )
            if override.is_sweep_override():
                raise UserError(f"`{word}` has several values; a search takes one. Start a search for each value.")
            shared.append(word)
        return shared

    def _open_search(self, settings: Settings, shared: list[str]) -> Search:
        """Check the stages and settings of the search, and return it with the trials of earlier processes."""
        from compress.planning.plan import make_plan
        from compress.planning.settings import to_plain
        from compress.sweeping.search import Search
        from compress.sweeping.space import flatten_settings

        names = [*settings.stages, *settings.recovery]
        for name in names:
            self._compose_config([*shared, f"technique={name}"], "search.slots")
        for key, _ in flatten_settings(settings.settings):
            if (name := key.partition(".")[0]) in names:
                self._compose_config([*shared, f"technique={name}", f"technique.{key}=null"], f"search.settings.{key}")
        planned = make_plan(self._compose_config([*shared, "technique=none"], "search"))
        decides = {**to_plain(settings), "minutes": None, "trials": None, "jobs": None}
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        return Search(
            settings,
            read_sizes(planned.backbone.skeleton(planned.task)),
            lambda words: self._explain_fault([*shared, *words]),
            planned.settings.seed,
            folder / STUDY,
            compute_digest([decides, shared, digest_environment(), digest_package()]),
        )

    def _compose_config(self, words: list[str], key: str) -> DictConfig:
        """Return the config of a job."""
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
        """Return why a chain cannot work; empty if it can."""
        from compress.planning.plan import make_plan

        try:
            make_plan(self._compose_config(words, "search.settings"))
        except UserError as error:
            return str(error)
        return ""

    def _begin_folder(self, config: DictConfig) -> Path:
        """Make the folder of a sweep as Hydra's own sweeper does."""
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        return folder

    def _make_launcher(self, config: DictConfig) -> Launcher:
        return Plugins.instance().instantiate_launcher(self.context, self.task, config)

    def _run_trials(self, settings: Settings, search: Search, shared: list[str]) -> Path:
        """Try chains until the budget is spent. Return the folder of the trials."""
        from compress.sweeping.space import name_chain

        # 1) Begin a sweep for the trials, or resume it
        config = copy.deepcopy(self.cfg)
        with open_dict(config):
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / TRIALS)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quote_value(config.hydra.sweep.dir)}")
        folder, launcher = self._begin_folder(config), self._make_launcher(config)
        before, begin = search.seconds, time.monotonic()

        def minutes() -> float:
            return (before + time.monotonic() - begin) / 60

        number = 1 + max((tried.job for tried in search.finished_trials), default=-1)
        if number:
            log.info(f"The search resumes after {number} trials and {minutes():.0f} minutes.")
        failures: list[str] = []
        while True:
            # 2) Propose a batch of trials
            batch: list[Any] = []
            while len(batch) < settings.jobs and not settings.over(minutes(), len(search.finished_trials) + len(batch)):
                if (trial := search.ask(minutes())) is None:
                    break
                batch.append(trial)
            if not batch:
                break

            # 3) Run the batch
            words = [[*shared, "split=validation", *trial.user_attrs["words"]] for trial in batch]
            for stopped in (path for job in range(number, number + len(batch)) for path in folder.glob(f"{job}_*")):
                remove_path(stopped)
            try:
                launcher.launch(words, initial_job_idx=number)
            except Exception as error:  # e.g. a cluster lost a job; the other jobs have written their rows
                log.error(f"{type(error).__name__}: {error}")

            # 4) Report the results to the search
            for job, trial in enumerate(batch, number):
                row = read_job_row(folder, job)
                failures.append(row["reason"])
                search.tell(trial, read_result(row, settings.objective), job)
                log.info(
                    f"trial {job}: {name_chain(trial.user_attrs['words'])}: {describe_outcome(row, settings.objective)}"
                )
                remove_path(Path(row["folder"]) / "artifact")  # the cache can restore it
            number += len(batch)
            search.seconds = 60 * minutes()
            last = failures[-ALIKE:]
            if len(last) == ALIKE and last[0] and len(set(last)) == 1:
                raise UserError(
                    f"The search was stopped because the last {ALIKE} trials failed for the same reason: {last[0]} "
                    f"Type {shlex.quote(f'resume={self.cfg.hydra.sweep.dir}')} to continue it."
                )

        # 5) Write the report of the trials
        if not search.finished_trials:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in search.left_out.items())
            raise UserError(f"No chain of search.slots can work here: {reasons or 'set other stages.'}")
        for name, reason in search.left_out.items():
            log.info(f"{name} was left out: {reason}")
        jobs = {tried.job for tried in search.finished_trials}  # the folder may hold another search's jobs too
        rows = [row for row in gather_rows(folder) if job_number(Path(row["folder"]))[0] in jobs]
        write_report(folder, drop_repeated_baselines(rows))
        return folder


def read_sizes(skeleton: Any) -> dict[str, int]:
    """Return the sizes of a model that a search takes shares of."""
    from compress.models.families import find_conventions

    config = skeleton.config
    ffn = getattr(config, find_conventions(config).ffn_size, 0)
    return {
        "heads": config.num_attention_heads,
        "ffn": 4 * config.hidden_size if ffn is None else ffn,  # None is GPT-2's default
        "layers": config.num_hidden_layers,
    }


def read_job_row(folder: Path, job: int) -> Row:
    """Return the row of a job's chain; of several jobs with its number, the last to begin counts."""
    begun = sorted(folder.glob(f"{job}_*/.hydra/config.yaml"), key=lambda path: path.stat().st_mtime)
    if begun:
        return read_job_rows(begun[-1].parents[1])[-1]
    lost = build_failed_row(Job("", "", "", 0), f"it left no result; see {folder}")
    return {**lost, "folder": str(folder / str(job))}


def read_result(row: Row, objective: str) -> Result | None:
    """Return the result of a trial from its row; None if the trial failed or its metric is undefined."""
    from compress.sweeping.search import Result

    if row["status"] != "completed" or math.isnan(quality_drop(row)):
        return None
    cost = row["speedup"] if objective == "latency_ms" else row["compression_ratio"]
    cheaper = is_faster(row) if objective == "latency_ms" else is_smaller(row)
    return Result(1 / cost, quality_drop(row), cheaper)


def describe_outcome(row: Row, objective: str) -> str:
    """Return the gain and the change of quality of a chain, or why it failed."""
    if row["status"] != "completed":
        return f"failed: {row['reason']}"
    gain = describe_speedup(row) if objective == "latency_ms" else describe_size_ratio(row)
    return f"{gain}, {row['metric']} {format_figures(row)['change']}"


def list_conclusions(settings: Settings, search: Search, trials: Path, folder: Path) -> list[str]:
    """Return the choice and its basis, a line each."""
    from compress.sweeping.space import name_chain

    failed = sum(tried.result is None for tried in search.finished_trials)
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
        f"all rows are on the Pareto front of the validation split, measured once on the test split; {made}: {trials}",
    ]


ConfigStore.instance().store(  # replaces Hydra's own sweeper
    group="hydra/sweeper",
    name="basic",
    node={"_target_": f"{PACKAGE}.ChainSweeper", "max_batch_size": None, "params": None},
    provider="compress",
)
for plugin in (ChainSweeper, SearchSweeper):
    Plugins.instance().register(plugin)
    Plugins.instance().class_name_to_class[f"{PACKAGE}.{plugin.__name__}"] = plugin
