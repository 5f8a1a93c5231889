"""The story of a run: check the whole chain, fine-tune a baseline, apply stage after stage, measure, report."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from compress import artifact, card, chain, live, plan, report, results, together
from compress.artifact import Artifact
from compress.cache import BEGAN, MANIFEST, Cache, digest, environment, flush, prune, remove
from compress.errors import PostconditionError, UserError, causes, told
from compress.exchange import agreed
from compress.measure import Bench, bench, measure
from compress.plan import Plan, Settings
from compress.predictions import FILE
from compress.quiet import hush
from compress.stages import apply, start, task_data
from compress.sweeper import TARGET
from compress.tasks import Splits
from compress.together import Team

log = logging.getLogger(__name__)

FINISHED = "finished"
"""The file of a finished job: what was asked for and what it was made of, so that it is not done again."""


def main(cfg: DictConfig) -> int:
    """Run one job of the command line, write what came of it; 1 where it failed, with the reason told. A job that an
    earlier run into the same folder finished with the same config, data, models and code is left as it is."""
    hush()
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    job = results.asked(cfg, hydra.overrides.task)

    with open_dict(cfg):
        search = cfg.pop("search", None)
    finished, asked = folder / FINISHED, digest([resolved(cfg), environment()])
    lock = FileLock(folder / ".job.lock", timeout=0)
    done = finished.is_file() and finished.read_text().startswith(asked)  # and stays until it has to be done again
    mine = os.environ.get("SLURM_PROCID", "0") == "0"

    def work() -> None:
        nonlocal done, mine
        if search is not None and (hydra.mode == RunMode.RUN or hydra.sweeper._target_ != TARGET):
            raise UserError("A search tries many chains, a job each: python train.py -m search=latency ...")
        if mine:
            try:
                lock.acquire()
            except Timeout:
                mine = False
                raise UserError(f"Another process is at work on this job: wait for its end ({folder}).") from None
        chain.leave_out(cfg.technique, hydra.overrides.task)
        with together.gathered(cfg, plan.settings(cfg).hardware, follow) as team:
            if team and team.rank:
                return follow(cfg, team)
            planned, splits, addresses = prepared(cfg, team)
            key = f"{asked} {digest(addresses)}"
            if finished.is_file() and finished.read_text() == key:
                log.info(f"finished before: {folder}")
                rows = json.loads((folder / results.RESULT).read_text())["rows"]
                live.took_no_time(folder)
            else:
                done = False
                for earlier in (FINISHED, results.RESULT, "tensorboard", "report", "predictions"):
                    remove(folder / earlier)
                rows = report.finish(folder, job, carry_out(cfg, planned, splits, addresses, folder, begun(hydra)))
                flush(folder)
                results.write_whole(finished, key)
                done = True
                remove(folder / live.STAGE)
        if hydra.mode == RunMode.RUN:  # a sweep shows one table of all its jobs at the end
            report.publish(folder, rows)
        return None

    def fail(reason: str) -> None:
        if done:
            log.info(f"What the job found before is kept: {folder}")
        elif mine:
            for half in (finished, folder / "artifact"):
                remove(half)
            report.fail(folder, job, reason)

    try:
        return guarded(work, fail)
    finally:
        lock.release()


def begun(hydra: Any) -> float:
    """When the sweep of this job began, or else this process, in seconds since 1970."""
    sweep = Path(hydra.sweep.dir) / "multirun.yaml"
    return sweep.stat().st_mtime if hydra.mode == RunMode.MULTIRUN and sweep.is_file() else BEGAN


def resolved(cfg: DictConfig) -> Any:
    """What decides the result of a job; None where a value is missing, which the job will tell."""
    try:
        return {key: plan.plain(cfg[key]) for key in cfg if key != "cache"}
    except OmegaConfBaseException:
        return None


def guarded(work: Callable[[], None], fail: Callable[[str], None]) -> int:
    """0, or 1 where ``work`` raised: one sentence for what a user can put right, a traceback for what is our fault.

    Raises:
        SystemExit: the process was asked to stop, or what came of the work could not be written.
    """
    stop: BaseException | None = None
    try:
        with interruptible():
            work()
        return 0
    except (UserError, PostconditionError) as error:
        reason = str(error)
        log.error(reason)
    except Exception as error:
        sentence = told(error)
        reason = sentence or f"{type(error).__name__}: {error}"
        (log.error if sentence else log.exception)(reason)
    except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes the second of the first
        kinds = tuple(map(type, causes(error)))
        by = "SIGTERM" if Terminated in kinds else "Ctrl-C" if KeyboardInterrupt in kinds else "a signal"
        reason = f"stopped by {by}: the same command into the same folder goes on with it"
        log.error(reason)
        stop = SystemExit(130) if by != "a signal" else error  # that of a cluster's handler
    try:
        fail(reason)
    except OSError as error:
        sys.exit(f"What came of the job could not be written. {told(error) or error}")
    if stop:
        raise stop
    return 1


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody else has a use for it."""


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGTERM ends the work as Ctrl-C does, so that it is told; a cluster's own handler stays."""

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def run(cfg: DictConfig, folder: Path) -> results.Outcome:
    """Carry out the experiment that ``cfg`` describes; its artifact and figures are written to ``folder``.

    Raises:
        UserError: something in ``cfg`` cannot work, told before anything is loaded or trained.
        PostconditionError: a stage did not do what it says.
    """
    return carry_out(cfg, *prepared(cfg), folder)


def prepared(cfg: DictConfig, team: Team | None = None) -> tuple[Plan, Splits, list[Any]]:
    """The experiment, checked, its data, and the addresses of its stages. A ``team`` trains with this process, its
    first."""
    planned = plan.check(cfg)
    log.info(f"{planned.backbone.name} on {planned.task.name}: {planned.method}")
    splits = planned.task.load(planned.settings.seed)
    for note in splits.notes:
        log.info(f"  {note}")
    planned = planned.read(splits, team)
    plan.check_data(planned, splits)
    return planned, splits, planned.addresses(splits.fingerprint)


def carry_out(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], folder: Path, begun: float = BEGAN
) -> results.Outcome:
    """The experiment with the cache that it asks for: to refresh it is to take nothing from before ``begun``."""
    kept = planned.settings.cache
    if kept.mode == "off":
        kept = replace(kept, dir=str(folder / "cache"))
        planned = replace(planned, settings=replace(planned.settings, cache=kept))
    with Cache(kept.dir, since=begun if kept.mode == "refresh" else 0.0) as cache:
        outcome = through(cfg, planned, splits, addresses, cache, folder)
    if kept.mode == "off":
        remove(Path(kept.dir))
    elif kept.max_gb is not None:
        prune(Path(kept.dir), kept.max_gb)
    return outcome


def through(
    cfg: DictConfig, planned: Plan, splits: Splits, addresses: list[Any], cache: Cache, folder: Path
) -> results.Outcome:
    """The baseline, stage after stage, and what the artifact is worth."""
    address = addresses[:2]  # of the baseline
    running = partial(results.write_whole, folder / live.STAGE)
    running("baseline")
    baseline = source = cache.get(address, partial(start, planned, splits), "baseline")
    entries = {"baseline": baseline}
    for step, own in zip(planned.steps, addresses[2:]):
        running(step.key)
        address.append(own)
        source = cache.get(address, partial(apply, planned, splits, step, baseline, source), step.key)
        entries[step.key] = source

    into = folder / "artifact"
    shutil.rmtree(into, ignore_errors=True)
    shutil.copytree(source, into, ignore=shutil.ignore_patterns("tensorboard", "report", MANIFEST))
    OmegaConf.save(cfg, into / "config.yaml", resolve=True)
    for number, (name, entry) in enumerate(entries.items()):
        shutil.copytree(entry / "tensorboard", folder / "tensorboard" / f"{number}_{name}", dirs_exist_ok=True)
        if (entry / "report").is_dir():
            shutil.copytree(entry / "report", folder / "report" / f"{number}_{name}", dirs_exist_ok=True)

    teachers = [step.arguments["teacher"] for step in planned.steps if step.arguments.get("teacher")]
    measured = {
        "none": baseline,
        **{"teacher" if len(teachers) == 1 else f"teacher {i}": Path(one) for i, one in enumerate(teachers, 1)},
        **({planned.method: into} if planned.steps else {}),
    }
    running("measuring")
    runtime, graph = artifact.describe(into).runtime, None
    if runtime != "torch":  # before what is measured takes memory
        key = [*addresses[:2], runtime, addresses[-1]["libraries"]]
        graph = cache.get(key, partial(export, planned, splits, baseline, runtime), f"baseline for {runtime}")
    loaded = {name: artifact.load(path, planned.task.kind) for name, path in measured.items()}
    benches = {name: bench_of(splits, measured[name], one, planned.settings) for name, one in loaded.items()}
    exported = artifact.exported(loaded["none"], runtime, graph) if graph else None
    measurements, predictions = measure(
        benches,
        splits.task,
        planned.settings.hardware.latency,
        planned.settings.hardware.device,
        exported,
    )
    outcome = results.Outcome(
        primary=planned.task.primary,
        descriptions={name: one.description for name, one in loaded.items()},
        measurements=measurements,
        baseline=baseline.name,
        predictions=predictions,
        agreements={planned.method: agreement} if (agreement := agreed(source / "report")) else {},
        data=splits.fingerprint,
    )
    predictions[planned.method].save(into / FILE)
    (into / "measurement.json").write_text(json.dumps(asdict(measurements[planned.method]), indent=2))
    card.write(into, outcome, planned.method)
    return outcome


def export(planned: Plan, splits: Splits, baseline: Path, runtime: str, into: Path) -> None:
    """The baseline as another runtime runs it, what a chain that ends there is compared with besides."""
    loaded = artifact.load(baseline, planned.task.kind)
    example = bench_of(splits, baseline, loaded, planned.settings).texts[0]
    artifact.export(loaded, runtime, example, into)


def follow(cfg: DictConfig, team: Team) -> None:
    """Train with the first process of the ``team`` whenever it trains; what comes of it is written by that one."""
    hush()
    logging.disable(logging.WARNING)
    planned = plan.check(cfg)
    splits = planned.task.load(planned.settings.seed)
    planned = planned.read(splits, team)
    steps = {step.key: step for step in planned.steps}
    while call := team.share(None):
        with TemporaryDirectory() as into:
            if call["stage"] == "baseline":
                start(planned, splits, Path(into))
            else:
                apply(planned, splits, steps[call["stage"]], Path(call["baseline"]), Path(call["source"]), Path(into))


def bench_of(splits: Splits, folder: Path, loaded: Artifact, settings: Settings) -> Bench:
    """An artifact with the split that it is measured on in its own tokens."""
    data = task_data(splits, loaded.model, loaded.tokenizer, splits.task.batch_size, settings)
    return bench(folder, loaded, data, settings.hardware.latency, settings.split)
