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

from compress.cache import files
from compress.cache.digests import digest, environment
from compress.cache.files import remove
from compress.errors import UserError
from compress.planning import chain
from compress.planning.advice import advised
from compress.planning.chain import PACKAGE
from compress.reporting import findings, report, tables
from compress.reporting import jobs as jobs_reporting
from compress.reporting import rows as results
from compress.reporting import rows as rows_reporting

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
        return list(self.split_overrides_to_chunks(chain.jobs(overrides, chain.name(self.config)), max_batch_size))


class SearchSweeper(Sweeper):
    """Launches batches of trials until the budget is spent, and then what is to be chosen among."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.cfg, self.context, self.task = config, hydra_context, task_function

    def sweep(self, arguments: list[str]) -> None:
        try:
            self._sweep(arguments)
        except UserError as error:
            sys.exit(str(error))

    def _sweep(self, arguments: list[str]) -> None:
        settings, given = self._settings(), self._given(arguments)
        search = self._search(settings, given)
        folder = Path(self.cfg.hydra.sweep.dir)
        self._begin(self.cfg)
        trials = self._trials(settings, search, given)
        front = search.front()
        log.info(f"On the test split, of {len(search.tried)} trials those that could be chosen:")
        jobs = [[*given, *one.words] for one in front] or [[*given, "technique=none"]]
        self._launcher(self.cfg).launch(jobs, initial_job_idx=0)
        lines = conclusions(settings, search, trials, folder)
        files.write_whole(folder / findings.CONCLUSIONS, "".join(f"{line}\n" for line in lines))

    def _settings(self) -> Settings:
        from compress.planning import settings as settings_planning
        from compress.quiet import hush
        from compress.sweeping.search import Settings

        hush()
        if not find_spec("optuna"):
            raise UserError("A search needs optuna, which is not installed: pip install -e '.[search]'")
        return settings_planning.parse(Settings, settings_planning.plain(self.cfg.get("search")), "search")

    def _given(self, arguments: list[str]) -> list[str]:
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

    def _search(self, settings: Settings, given: list[str]) -> Search:
        """The search, with its stages and their settings found, that an earlier process may have begun."""
        from compress.planning import plan
        from compress.planning import settings as settings_planning
        from compress.sweeping.search import Search, flat

        names = [*settings.stages, *settings.recovery]
        for name in names:
            self._composed([*given, f"technique={name}"], "search.slots")
        for key, _ in flat(settings.settings):
            if (name := key.partition(".")[0]) in names:
                self._composed([*given, f"technique={name}", f"technique.{key}=null"], f"search.settings.{key}")
        planned = plan.check(self._composed([*given, "technique=none"], "search"))
        decides = {**settings_planning.plain(settings), "minutes": None, "trials": None, "jobs": None}
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        return Search(
            settings,
            sizes(planned.backbone.skeleton(planned.task)),
            lambda words: self._wrong([*given, *words]),
            planned.settings.seed,
            folder / STUDY,
            digest([decides, given, environment()]),
        )

    def _composed(self, words: list[str], key: str) -> DictConfig:
        """The config of a job."""
        try:
            config = self.context.config_loader.load_sweep_config(self.cfg, words)
        except HydraException as error:
            raise UserError(f"{key} cannot be used: {advised(error)}") from error
        with open_dict(config):
            config.pop("hydra")
            config.pop("search", None)
        chain.leave_out(config.technique, words)
        return config

    def _wrong(self, words: list[str]) -> str:
        """Why a chain cannot work; empty where it can."""
        from compress.planning import plan

        try:
            plan.check(self._composed(words, "search.settings"))
        except UserError as error:
            return str(error)
        return ""

    def _begin(self, config: DictConfig) -> Path:
        """The folder of a sweep, as Hydra's own sweeper begins one."""
        folder = Path(config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "multirun.yaml")
        return folder

    def _launcher(self, config: DictConfig) -> Launcher:
        return Plugins.instance().instantiate_launcher(self.context, self.task, config)

    def _trials(self, settings: Settings, search: Search, given: list[str]) -> Path:
        """Try chains until the budget is spent; the folder of the trials."""
        from compress.sweeping.search import named

        config = copy.deepcopy(self.cfg)
        with open_dict(config):
            config.hydra.sweep.dir = str(Path(config.hydra.sweep.dir) / TRIALS)
            config.hydra.overrides.hydra.append(f"hydra.sweep.dir='{config.hydra.sweep.dir}'")
        folder, launcher = self._begin(config), self._launcher(config)
        before, begin = search.seconds, time.monotonic()

        def minutes() -> float:
            return (before + time.monotonic() - begin) / 60

        number = 1 + max((one.job for one in search.tried), default=-1)
        if number:
            log.info(f"The search goes on after {number} trials and {minutes():.0f} minutes.")
        failures: list[str] = []
        while True:
            batch: list[Any] = []
            while len(batch) < settings.jobs and not settings.over(minutes(), len(search.tried) + len(batch)):
                if (trial := search.ask(minutes())) is None:
                    break
                batch.append(trial)
            if not batch:
                break
            words = [[*given, "split=validation", *trial.user_attrs["words"]] for trial in batch]
            for stopped in (path for job in range(number, number + len(batch)) for path in folder.glob(f"{job}_*")):
                remove(stopped)
            try:
                launcher.launch(words, initial_job_idx=number)
            except Exception as error:  # a cluster lost a job, say: what the others found is there
                log.error(f"{type(error).__name__}: {error}")
            for job, trial in enumerate(batch, number):
                row = row_of(folder, job)
                failures.append(row["reason"])
                search.tell(trial, result(row, settings.objective), job)
                log.info(f"trial {job}: {named(trial.user_attrs['words'])}: {figures(row, settings.objective)}")
                remove(Path(row["folder"]) / "artifact")  # which the cache makes again
            number += len(batch)
            search.seconds = 60 * minutes()
            last = failures[-ALIKE:]
            if len(last) == ALIKE and last[0] and len(set(last)) == 1:
                raise UserError(
                    f"The last {ALIKE} trials failed for one reason, so the search was stopped: {last[0]} The same "
                    f"command with hydra.sweep.dir={self.cfg.hydra.sweep.dir} goes on with it."
                )
        if not search.tried:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in search.left_out.items())
            raise UserError(f"No chain of search.slots can work here: {reasons or 'name other stages.'}")
        for name, reason in search.left_out.items():
            log.info(f"{name} was left out: {reason}")
        jobs = {one.job for one in search.tried}  # and not those of another search into the folder
        rows = [
            row for row in jobs_reporting.gather(folder) if jobs_reporting.job_number(Path(row["folder"]))[0] in jobs
        ]
        report.record(folder, results.without_repeated_baselines(rows))
        return folder


def sizes(skeleton: Any) -> dict[str, int]:
    """What shares of a model are of."""
    from compress.models.shapes import FAMILIES

    config = skeleton.config
    ffn = FAMILIES[config.model_type].ffn_size if config.model_type in FAMILIES else "intermediate_size"
    return {
        "heads": config.num_attention_heads,
        "ffn": getattr(config, ffn, 0),
        "layers": config.num_hidden_layers,
    }


def row_of(folder: Path, job: int) -> results.Row:
    """What a job found out of its chain; of several of its number the one that began last."""
    begun = sorted(folder.glob(f"{job}_*/.hydra/config.yaml"), key=lambda path: path.stat().st_mtime)
    if begun:
        return jobs_reporting.left_by(begun[-1].parents[1])[-1]
    lost = results.failed(rows_reporting.Job("", "", "", 0), f"it left no result: see {folder}")
    return {**lost, "folder": str(folder / str(job))}


def result(row: results.Row, objective: str) -> Result | None:
    """What the search wants to know of a row; None where the trial failed."""
    from compress.sweeping.search import Result

    if row["status"] != "completed":
        return None
    cost = row["speedup"] if objective == "latency_ms" else row["compression_ratio"]
    cheaper = results.is_faster(row) if objective == "latency_ms" else results.is_smaller(row)
    return Result(1 / cost, results.drop(row), cheaper)


def figures(row: results.Row, objective: str) -> str:
    """What a chain is worth, or why it failed."""
    if row["status"] != "completed":
        return f"failed: {row['reason']}"
    gain = tables.faster_by(row) if objective == "latency_ms" else tables.smaller_by(row)
    return f"{gain}, {row['metric']} {tables.drawn_figures(row)['change']}"


def conclusions(settings: Settings, search: Search, trials: Path, folder: Path) -> list[str]:
    """The choice, and what it was made from."""
    from compress.sweeping.search import named

    failed = sum(one.result is None for one in search.tried)
    made = (
        f"{len(search.tried)} trials, {f'{failed} of which failed, ' if failed else ''}in {search.seconds / 60:.0f} min"
    )
    word = "fastest" if settings.objective == "latency_ms" else "smallest"
    within = (
        f"within {settings.max_drop:g} point{'s' * (settings.max_drop != 1)} of the baseline on the validation split"
    )
    chosen = search.chosen()
    if chosen is None:
        return [f"chosen: none, the baseline: of {made}, no chain was {word[:-3]}er {within} (see {trials})"]
    there, here = (figures(row_of(*place), settings.objective) for place in ((trials, chosen.job), (folder, 0)))
    return [
        f"chosen: {named(chosen.words)}, the {word} {within}: {there} there; on the test split: {here}",
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
