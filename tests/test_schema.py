"""The schemas by which editors check conf/ are those of the constructors, and every YAML passes its own."""

import json
import runpy
from pathlib import Path

import pytest
import yaml
from test_conf import CONF, FILES

SCHEMAS = CONF.parent / "docs" / "schema"
MARK = "# yaml-language-server: $schema="
NAMED = {
    file: CONF.joinpath(file).parent / line.removeprefix(MARK)
    for file in FILES
    for line in CONF.joinpath(file).read_text().splitlines()
    if line.startswith(MARK)
}


def test_the_schemas_are_those_of_the_constructors():
    built = runpy.run_path(str(SCHEMAS / "write.py"))["build_schemas"]()
    shipped = {path.stem: json.loads(path.read_text()) for path in SCHEMAS.glob("*.json")}
    assert shipped == json.loads(json.dumps(built)), "python docs/schema/write.py writes them again"


def test_every_choice_names_its_schema():
    groups = ("experiment", "hardware", "model", "scale", "search", "task", "technique/stage")
    choices = {file for file in FILES if str(Path(file).parent) in groups and not Path(file).name.startswith("_")}
    assert choices - NAMED.keys() == {"technique/stage/none.yaml"}  # which has no values


@pytest.fixture(scope="module")
def validator():
    """`validator(file)` checks values by a schema file."""
    jsonschema = pytest.importorskip("jsonschema")
    referencing = pytest.importorskip("referencing")

    def read(uri):
        contents = json.loads((SCHEMAS / uri).read_text())
        return referencing.Resource.from_contents(contents, referencing.jsonschema.DRAFT202012)

    registry = referencing.Registry(retrieve=read)
    return lambda file: jsonschema.Draft202012Validator({"$ref": file.name}, registry=registry)


@pytest.mark.parametrize("file", NAMED)
def test_a_yaml_passes_its_schema(file, validator):
    values = yaml.safe_load((CONF / file).read_text())
    assert [error.message for error in validator(NAMED[file]).iter_errors(values)] == []


@pytest.mark.parametrize(
    ("file", "wrong"),
    [
        ("task/toy.yaml", {"epoch": 3}),
        ("hardware/auto.yaml", {"precision": "fp16"}),
        ("technique/stage/prune.yaml", {"sparsity": 1.5}),
        ("experiment/distill_sst2.yaml", {"technique": {"distill_2": {"temprature": 1}}}),
    ],
)
def test_a_mistake_does_not_pass(file, wrong, validator):
    values = {**yaml.safe_load((CONF / file).read_text()), **wrong}
    assert list(validator(NAMED[file]).iter_errors(values))
