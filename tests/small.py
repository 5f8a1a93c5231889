"""Settings with which a whole run on the built-in model and data takes seconds."""

SMALL = [
    "hardware=cpu",
    "task.limit.train=256",
    "task.limit.validation=64",
    "task.limit.test=128",
    "baseline.epochs=1",
    "hardware.latency.seconds=0.05",
    "hardware.latency.block_s=0.01",
    "hardware.latency.batch_sizes=[1,4]",
    "hardware.latency.memory=false",
]
