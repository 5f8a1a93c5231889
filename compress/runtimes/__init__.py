"""What runs an artifact, one module each: ``load(folder, kind) -> Model`` of that runtime."""
