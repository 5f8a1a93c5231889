"""Measures an artifact, or any Hugging Face folder, again: `python evaluate.py --help`."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

import compress.planning.chain  # noqa: F401  sweeps name their folders by it
from compress.planning.advice import report_user_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
def main(cfg):
    from compress.running import evaluate  # not at the top: --help, --cfg job and Tab need no torch

    failed = evaluate.main(cfg)
    # In a sweep the other jobs go on.
    if failed and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(failed)


if __name__ == "__main__":
    with report_user_errors():
        main()
