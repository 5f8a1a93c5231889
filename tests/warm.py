"""What every command imports and computes first, done once in the server that the tests' commands are forked from."""

import gc

import tiny  # noqa: F401  (with transformers' classes of models)
import torch.utils.tensorboard  # noqa: F401

import compress.running.job  # noqa: F401
from compress.cache.sources import digest_source
from compress.tasks.toy import generate_labels

generate_labels()
digest_source("compress.running.stages", "compress.techniques.prune", "compress.techniques.gptq")
gc.collect()
gc.freeze()  # a command collects garbage after every stage
