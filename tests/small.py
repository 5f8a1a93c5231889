"""Settings with which a whole run on the built-in model and data takes seconds."""

SMALL = [
    "hardware=cpu",
    "task.limit.train=256",
    "task.limit.validation=64",
    "task.limit.test=128",
    "baseline.epochs=1",
    "hardware.latency.seconds=0.01",  # on a busy machine it takes three times as long for every artifact
    "hardware.latency.block_s=0.002",
    "hardware.latency.warmup=1",
    "hardware.latency.texts=2",
    "hardware.latency.batch_sizes=[1,4]",
    "hardware.latency.memory=false",
]
