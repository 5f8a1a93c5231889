"""Compresses a language model and measures what it cost: `python train.py --help`."""

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

import compress.planning.chain  # makes technique=a+b a choice
import compress.sweeping.sweeper
from compress.planning.advice import report_user_errors


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg):
    from compress.running import job  # not at the top: --help, --cfg job and Tab need no torch

    failed = job.main(cfg)
    # In a sweep the other jobs go on, and its report exits with 1.
    if failed and HydraConfig.get().mode == RunMode.RUN:
        sys.exit(failed)


if __name__ == "__main__":
    with report_user_errors():
        sys.argv[1:] = compress.planning.chain.prepare_overrides(sys.argv[1:])
        main()
