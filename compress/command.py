"""The command line: `compress train`, `evaluate`, `report`, `compare`, `cache`; train.py and evaluate.py call it."""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

import compress
from compress.errors import UserError
from compress.install import CONF, format_command
from compress.planning import chain
from compress.planning.advice import report_user_errors
from compress.planning.recorded import resume_words
from compress.planning.words import arrange_words, quote_value
from compress.quiet import escape_unencodable_output
from compress.sweeping import sweeper  # noqa: F401  registers the sweepers, after the chain has had Hydra find its own


def run_train_job(cfg: DictConfig) -> None:
    from compress.running import job  # not at the top: --help, --cfg job and Tab need no torch

    if "technique" not in cfg:
        sys.exit(f"The config has no technique. Set --config-name to one for {format_command('train')}.")
    exit_if_failed(job.main(cfg))


def run_evaluate_job(cfg: DictConfig) -> None:
    from compress.running import evaluate  # not at the top either

    if "where" not in cfg:
        sys.exit("The config has no artifact to measure. Remove --config-name.")
    exit_if_failed(evaluate.main(cfg))


def exit_if_failed(status: int) -> None:
    """Exit with the status of a single run. In a sweep the other jobs go on, and its report exits with 1."""
    if status and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(status)


def train(words: list[str] | None = None) -> None:
    """Run `train.py` with the words of its command line, or those in ``sys.argv``."""
    with report_user_errors():
        check_system()
        words = arrange_words(resume_words(sys.argv[1:] if words is None else words))
        run_hydra("train", run_train_job, chain.prepare_overrides(words))


def evaluate(words: list[str] | None = None) -> None:
    """Run `evaluate.py` with the words of its command line, or those in ``sys.argv``."""
    with report_user_errors():
        check_system()
        words = arrange_words(sys.argv[1:] if words is None else words)
        # The artifact names its own task, whose settings the config has not read yet.
        run_hydra("evaluate", run_evaluate_job, [re.sub(r"^(?=task\.)", "++", word) for word in words])


def check_system() -> None:
    """Raise UserError on Windows, whose Python lacks modules that every run needs."""
    if find_spec("fcntl") is None:
        raise UserError(f"{platform.system()} is not supported; expected Linux or macOS. Use WSL: wsl --install")


def run_hydra(name: str, task: Callable[[DictConfig], None], words: list[str]) -> None:
    """Run the task with the config ``name`` and the words, which Hydra and a training's processes read in argv."""
    escape_unencodable_output()
    sys.argv = [sys.argv[0], *words]
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()


def write_report_again(words: list[str]) -> None:
    """Run `compress report`."""
    keys = ("model", "task", "method", "seed")
    parser = argparse.ArgumentParser("compress report", description="Write the report of runs or sweeps again.")
    parser.add_argument("folder", nargs="+", help="a run or a sweep: multirun/DATE/TIME")
    for key in keys:
        parser.add_argument(f"--{key}", nargs="+", metavar="VALUE", help=f"keep the rows of these values of {key}")
    given = vars(parser.parse_args(words))
    chosen = [f"where.{key}={quote_value(given[key])}" for key in keys if given[key]]
    evaluate([f"report={quote_value(given['folder'])}", *chosen])


def compare_sweeps(words: list[str]) -> None:
    """Run `compress compare`."""
    parser = argparse.ArgumentParser(
        "compress compare", description="Say what changed between two runs or sweeps, and which of it is not chance."
    )
    parser.add_argument("before", help="a run or a sweep: multirun/DATE/TIME")
    parser.add_argument("after", help="another one")
    given = parser.parse_args(words)
    evaluate([f"compare={quote_value([given.before, given.after])}"])


def manage_cache(words: list[str]) -> None:
    """Run `compress cache`."""
    from compress.cache.__main__ import main as manage

    manage(words, "compress cache")


COMMANDS = {
    "train": (train, "fine-tune, compress by a chain of techniques, measure"),
    "evaluate": (evaluate, "measure an artifact or a Hugging Face folder again"),
    "report": (write_report_again, "write the report of runs or sweeps again"),
    "compare": (compare_sweeps, "say what changed between two runs or sweeps"),
    "cache": (manage_cache, "report on the cache of finished stages, or shrink it"),
}


def main(words: list[str] | None = None) -> None:
    """Run the subcommand that the first word names."""
    words = sys.argv[1:] if words is None else words
    commands = "\n".join(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        "compress",
        usage="compress COMMAND ...",
        description=f"{compress.__doc__}\n\ncommands:\n{commands}",
        epilog="Each command has its own --help: compress train --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"compress {compress.__version__}")
    given = parser.parse_args(words[:1] or ["--help"])
    COMMANDS[given.command][0](words[1:])
