"""Measure an artifact or any Hugging Face folder as a run does, or report and compare finished runs and sweeps."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from transformers import AutoConfig
from yaml import YAMLError

from compress.artifacts import artifact
from compress.artifacts.artifact import Artifact, load_artifact, read_description
from compress.artifacts.moving import move_artifact
from compress.cache.files import write_atomically
from compress.errors import UserError
from compress.measuring.bench import list_texts
from compress.measuring.measure import measure_artifacts
from compress.models.backbone import has_task_labels, is_decoder
from compress.models.loading import from_pretrained
from compress.planning.settings import find_strings, parse_values, read_settings, to_plain
from compress.quiet import silence_libraries
from compress.reporting import jobs, report
from compress.reporting.compare import describe_changes
from compress.reporting.curves import write_curves
from compress.reporting.escaping import escape_markdown, make_rows_printable
from compress.reporting.folder import ARTIFACT, PAGE, SWEEP, RunFolder
from compress.reporting.jobs import gather_rows, read_seed
from compress.reporting.report import record_failure, write_result
from compress.reporting.rows import Job, Outcome, Row, collect_rows, drop_repeated_baselines
from compress.running.experiment import make_split_bench
from compress.running.job import run_guarded
from compress.tasks.kinds import KINDS
from compress.tasks.splits import load_splits
from compress.tasks.task import Task


def main(cfg: DictConfig) -> int:
    """Do what the command line asks and write the results. Return 1, after logging the reason, if it failed."""
    silence_libraries()
    hydra = HydraConfig.get()
    run = RunFolder(Path(hydra.runtime.output_dir))
    owned = done = False

    def work() -> None:
        nonlocal owned, done
        run.claim()
        if ARTIFACT in run.state.made:
            raise UserError(
                f"hydra.run.dir is {run.path}, which holds the results of a run, and those of an evaluation would "
                "replace them. Set hydra.run.dir=... to another folder."
            )
        owned = True
        if cfg.compare:
            folders = read_two_folders(cfg)
            before, after = (make_rows_printable(gather_rows(find_results_folder(path))) for path in folders)
            lines = describe_changes(before, after)
            run.register(["comparison.md"])
            write_atomically(run.path / "comparison.md", "".join(f"- {escape_markdown(line)}\n" for line in lines))
            print(*lines, sep="\n")
        elif cfg.report:
            rows = choose_rows(cfg)
            run.register(SWEEP)
            report.publish_report(run.path, rows)
            write_curves(run.path, rows)
        else:
            rows = evaluate_artifact(cfg, run.begin(), home=run.path)
            write_result(run.new, rows)
            run.commit("evaluated")
            done = True
            if hydra.mode == RunMode.RUN:
                run.register([PAGE])
                report.publish_report(run.path, rows)

    def fail(reason: str) -> None:
        name = OmegaConf.select(cfg, "artifact", default="", throw_on_resolution_failure=False)
        if owned and not done:
            record_failure(run, Job(str(name), "", "", read_seed(cfg)), reason)

    return run_guarded(work, fail)


def choose_rows(cfg: DictConfig) -> list[Row]:
    """Return the rows of the runs and sweeps in ``cfg.report`` that ``cfg.where`` selects.

    Raises:
        UserError: a folder holds no results, or no row is left.
    """
    rows = [row for folder in read_folders(cfg, "report") for row in gather_rows(find_results_folder(folder))]
    if not isinstance(where := to_plain(cfg.where), dict):
        raise UserError(
            f"where is {where!r}; a value for model, task, method or seed is expected. Set where.method=NAME."
        )
    chosen = {key: to_strings(value) for key, value in where.items() if value is not None}
    left = [row for row in rows if all(str(row[key]) in values for key, values in chosen.items())]
    if not left:
        known = {key: ", ".join(sorted({str(row[key]) for row in rows})) for key in chosen}
        allowed = "; ".join(f"where.{key} can be {values}" for key, values in known.items())
        raise UserError(f"where selects none of the {len(rows)} rows; {allowed}.")
    return drop_repeated_baselines(left)


def to_strings(value: Any) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]


def read_folders(cfg: DictConfig, key: str) -> list[str]:
    """Return the folders that the setting ``key`` names: one, a list of them, or none.

    Raises:
        UserError: it names something else.
    """
    value = to_plain(cfg[key])
    folders = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(folder, str | int | float) and str(folder) for folder in folders):
        raise UserError(f"{key} is {value!r}; a folder is expected. Set {key}=FOLDER.")
    return [str(folder) for folder in folders]  # a folder named 2026 is read as a number


def read_two_folders(cfg: DictConfig) -> list[str]:
    folders = read_folders(cfg, "compare")
    if len(folders) != 2:
        raise UserError(
            f"compare is {cfg.compare}; expected two folders of runs or sweeps. Set compare=[before,after]."
        )
    return folders


def find_results_folder(folder: str) -> Path:
    """Return the folder of a run or a sweep; for a run's artifact, the run's folder."""
    path = Path(folder)
    if (path / artifact.DESCRIPTION).is_file():
        path = path.parent
    if not (path / jobs.RESULT).is_file() and not any(path.glob("*/.hydra")):
        raise UserError(f"{folder} holds no results; expected the folder of a run or a sweep, multirun/DATE/TIME.")
    return path


def evaluate_artifact(cfg: DictConfig, folder: Path, home: Path | None = None) -> list[Row]:
    """Return a row for ``cfg.artifact``, after a row for ``cfg.baseline`` if it is set; save predictions in ``folder``,
    from where they will be moved to ``home``.

    Raises:
        UserError: there is no such folder, or its model does not fit the task.
    """
    # 1) Load the data and the artifacts
    if OmegaConf.is_missing(cfg, "artifact"):
        raise UserError("artifact is not set; expected the `artifact` folder of a run. Set artifact=FOLDER.")
    chosen = {key: read_folders(cfg, key) for key in ("baseline", "artifact")}
    for key, paths in chosen.items():
        if len(paths) != 1 and (paths or key == "artifact"):
            raise UserError(f"{key} is {cfg[key]}; one folder is expected. Set {key}=FOLDER.")
    folders = [Path(path) for paths in chosen.values() for path in paths]
    read_description(folders[-1], kind="")  # reports a missing folder before anything else
    own = read_own_config(folders[-1])
    seed = own.get("seed", 0) if cfg.seed is None else cfg.seed
    settings = read_settings(OmegaConf.create({**cfg, "seed": seed}))
    task = parse_values(Task, read_task(cfg, own), "task")
    if KINDS[task.kind].in_harness:
        for path in folders:
            check_generates(path, task)
        if settings.split != "test":
            raise UserError(f"split is {settings.split}; the questions of task `{task.name}` are test. Set split=test.")
    splits = load_splits(task, settings.seed)
    loaded = [load_artifact(path, task.kind) for path in folders]

    # 2) Check that they fit the task, and each other
    for path, each in zip(folders, loaded):
        check_labels(path, each, splits.task)
    vocabularies = {json.dumps(each.tokenizer.get_vocab(), sort_keys=True) for each in loaded}
    kind = KINDS[task.kind]
    if kind.generates and not kind.in_harness and len(vocabularies) > 1:  # the harness's likelihoods are of whole texts
        raise UserError(
            "baseline and artifact have different vocabularies, so their perplexities cannot be compared. "
            "Set baseline=null."
        )

    # 3) Measure them, on another runtime if it is set
    names = name_artifacts(folders, loaded)
    benches = {name: make_split_bench(splits, path, each, settings) for name, path, each in zip(names, folders, loaded)}
    hardware = settings.hardware
    with ExitStack() as stack:
        for name, ready in benches.items() if hardware.runtime else ():
            graph = Path(stack.enter_context(TemporaryDirectory()))
            moved = move_artifact(ready.artifact, str(hardware.runtime), ready.texts[0], graph)
            benches[name] = replace(ready, artifact=moved)
        # Memory is measured in a process that loads the folder itself, on its own runtime.
        latency = replace(hardware.latency, memory=False) if hardware.runtime else hardware.latency
        measurements, predictions = measure_artifacts(benches, splits.task, latency, hardware.serving_device)

    # 4) Collect their rows
    descriptions = {name: each.description for name, each in zip(names, loaded)}
    outcome = Outcome(
        splits.task.primary,
        descriptions,
        measurements,
        predictions=predictions,
        data=splits.fingerprint,
        texts=list_texts(next(iter(benches.values()))),
    )
    model = loaded[-1].description.model
    return collect_rows(folder, Job("", model, task.name, settings.seed), outcome, home)


def name_artifacts(folders: list[Path], loaded: list[Artifact]) -> list[str]:
    """Return distinct names: the methods, else the folders. An artifact against itself is measured twice."""
    methods = [
        each.description.method if each.description.history else path.name for path, each in zip(folders, loaded)
    ]
    if len(set(folders)) < len(folders):
        return [methods[0], f"{methods[0]} (again)"]
    return methods if len(set(methods)) == len(methods) else [str(path) for path in folders]


def read_own_config(folder: Path) -> DictConfig:
    """Return the config of the run that wrote the artifact, maybe a stranger's; an empty one for another folder.

    Raises:
        UserError: the file is no config of a run, or has an interpolation, which would be resolved in our environment.
    """
    file = folder / "config.yaml"
    try:
        own: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False) if file.is_file() else {}
        if not isinstance(own, dict):
            raise TypeError("a mapping is expected")
    except (OSError, ValueError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(
            f"{file} is no config of a run ({type(error).__name__}). Remove it, and set task=NAME."
        ) from None
    if interpolations := [text for text in find_strings(own) if "${" in text]:
        raise UserError(
            f"{file} holds {interpolations[0]}; a run stores plain values. Write the value there, or remove the file "
            "and set task=NAME."
        )
    return OmegaConf.create(own)


def read_task(cfg: DictConfig, own: DictConfig) -> dict:
    """Return the artifact's task with the settings of the command line (``task.path=...``), or the task set there."""
    given = cfg.get("task") or {}
    if "name" not in given and "task" in own:
        given = OmegaConf.merge(own.task, given)
    if "name" not in given:
        raise UserError(f"task is not set and {cfg.artifact} does not name its own. Set task=sst2 or another task.")
    return to_plain(OmegaConf.create(given))


def check_generates(folder: Path, task: Task) -> None:
    """Raise UserError if the model in ``folder`` writes no text; nothing but its config is read."""
    kind = read_description(folder, task.kind).kind
    config = from_pretrained(AutoConfig, str(folder), "Artifact", "artifact")
    if not KINDS[kind].generates or not is_decoder(config):
        what = "an encoder" if not is_decoder(config) else f"a model of kind {kind}"
        raise UserError(
            f"The model in {folder} is {what} (`{config.model_type}`); task `{task.name}` needs one that continues "
            "text. Set artifact to a causal language model."
        )


def check_labels(folder: Path, loaded: Artifact, task: Task) -> None:
    """Raise UserError if the model's head does not fit the task. Set what the task sets of the model's answers."""
    kind, made_for = KINDS[task.kind], KINDS[loaded.description.kind]
    if made_for.auto_class != kind.auto_class:
        raise UserError(
            f"The model in {folder} is of the kind {made_for.name}; task `{task.name}` is {kind.name}. Set task= to a "
            "task that the model's answers are for."
        )
    kind.configure(loaded.model.config, task, exported=loaded.description.runtime != "torch")
    kind.prepare_tokenizer(loaded.tokenizer, loaded.model.config)
    if task.num_labels == 0:
        return
    config = loaded.model.config
    if config.num_labels != task.num_labels:
        raise UserError(
            f"The model in {folder} has {config.num_labels} labels; task `{task.name}` has {task.num_labels}. "
            "Set task= to the task that the model was trained for."
        )
    if not has_task_labels(config, task):
        raise UserError(
            f"The model in {folder} has the labels {', '.join(config.id2label.values())}; task `{task.name}` has "
            f"{', '.join(task.labels or ())}, in this order. Set task= to the task that the model was trained for."
        )
