"""Write the JSON schemas of conf/ for editors, from the constructors that read it: `python docs/schema/write.py`.

Any value may be an interpolation. No key is required, since a file has the others from its defaults list.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_type_hints

from hydra import compose, initialize_config_dir
from pydantic import ConfigDict, Field, TypeAdapter, create_model
from pydantic.json_schema import GenerateJsonSchema

from compress.install import CONF
from compress.models.backbone import Backbone
from compress.planning.chain import read_stages
from compress.planning.plan import make_step
from compress.planning.settings import Hardware, Settings
from compress.sweeping.space import Settings as Search
from compress.tasks.task import Task
from compress.technique import Baseline, Training

STRICT = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Lenient(GenerateJsonSchema):
    """What JSON cannot say, a model in memory, is anything."""

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return {}


def describe_stage(name: str) -> Any:
    """Return a model of a stage's settings, with the types of its constructor."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        (stage,) = read_stages(compose("train", [f"technique={name}"]).technique)
    hints = get_type_hints(make_step(stage).technique.__init__, include_extras=True)
    types = {**hints, "train": Training, "calibration": Any}
    fields = {key: (types[key], None) for key in map(str, stage.node) if key != "_target_"}
    fields["class_"] = (Literal[stage.node._target_], Field(None, alias="_target_"))  # type: ignore[name-defined]
    return create_model(name, __config__=STRICT, **fields)


def loosen(schema: Any) -> Any:
    """Return a schema of types and ranges alone, whose values may be interpolations."""
    if isinstance(schema, list):
        return [loosen(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    dropped = ("required", "default", "title", "description")
    loose = {key: loosen(value) for key, value in schema.items() if key not in dropped}
    if "properties" in schema:
        either = {"$ref": "#/$defs/interpolation"}
        loose["properties"] = {key: {"anyOf": [loosen(one), either]} for key, one in schema["properties"].items()}
    return loose


def build_schemas() -> dict[str, Any]:
    """Return the schemas by the names of their files: `train` has all of them, the others point into it."""
    names = sorted(path.stem for path in (CONF / "technique/stage").glob("[a-z]*.yaml") if path.stem != "none")
    stages = {name: (describe_stage(name), None) for name in names}
    own = {"model": Backbone, "task": Task, "hardware": Hardware, "baseline": Baseline, "search": Search}
    shared = {key: hint for key, hint in get_type_hints(Settings, include_extras=True).items() if key not in own}
    free = {"defaults": list, "hydra": dict, "scale": Literal["full", "small"]}
    technique = create_model("Technique", __config__=STRICT, name=(str, None), **stages)
    fields = {key: (hint, None) for key, hint in {**own, **shared, **free, "technique": technique}.items()}
    root = TypeAdapter(create_model("train", __config__=STRICT, **fields)).json_schema(schema_generator=Lenient)
    schema = loosen(root)
    kinds = schema["$defs"] | {"interpolation": {"type": "string", "pattern": r"\$\{"}}
    chain = kinds["Technique"]["properties"]  # `prune_2` is the second `prune` of a chain
    kinds["Technique"]["patternProperties"] = {rf"^{name}_\d+$": chain[name] for name in names}
    for name in ("Task", "Backbone", "Hardware", *names):
        kinds[name]["properties"]["defaults"] = {"type": "array"}
    pointers = {group: {"$ref": f"train.json#/$defs/{own[group].__name__}"} for group in ("task", "model", "hardware")}
    stage = {"anyOf": [{"$ref": f"train.json#/$defs/{name}"} for name in names]}
    return {"train": schema | {"$defs": kinds}, "stage": stage, **pointers}


if __name__ == "__main__":
    for name, schema in build_schemas().items():
        (Path(__file__).parent / f"{name}.json").write_text(json.dumps(schema) + "\n")
