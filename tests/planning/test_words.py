"""The words of a command line, read as Hydra reads them and written so that it reads them back."""

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from compress.errors import UserError
from compress.planning.words import arrange_words, list_words, quote_value, quote_word, read_override

PRINTED = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12) | st.text("\\'\"$ {}=~", max_size=6)


@given(st.recursive(PRINTED | st.booleans() | st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_hydra_reads_a_quoted_value_back(value):
    assert OverridesParser.create().parse_override(f"key={quote_value(value)}").value() == value


@given(PRINTED)
def test_hydra_reads_a_word_back_that_a_shell_has_read(text):
    (word,) = shlex.split(quote_word("key", text))
    assert read_override(word).value() == text


@pytest.mark.parametrize(
    ("typed", "arranged"),
    [
        ("technique=prune -m task=toy", "--multirun technique=prune task=toy"),
        ("technique=prune --multirun", "--multirun technique=prune"),
        ("-m a=1 -m b=2", "--multirun a=1 b=2"),
        ("a=1 -cn other b=2 --config-dir x", "--config-name=other --config-dir=x a=1 b=2"),
        ("-- a=1 -cjob", "--cfg=job a=1"),
        ("--info", "--info=all"),
    ],
)
def test_flags_may_be_anywhere(typed, arranged):
    assert arrange_words(typed.split()) == arranged.split()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a=1", "--multi-run"], r"`--multi-run` is no flag \(did you mean `--multirun`\?\); expected one of --help"),
        (["--technique=prune"], "`--technique=prune` is no flag; a setting is typed without dashes. Type technique="),
        (["--cfg", "all of it"], "argument --cfg/-c: invalid choice"),
        (["--config-dir"], "argument --config-dir/-cd: expected one argument"),
        (["seed"], "`seed` is no setting; expected KEY=VALUE"),
        (["=3"], "`=3` is no setting; expected KEY=VALUE"),
        (["my key=3"], "`my key=3` sets `my key`, which is no key"),
        (["task.path=~/c4.txt"], r"`task.path=~/c4.txt` cannot be read; .* Type 'task.path=\"~/c4.txt\"'$"),
        (["task.path=/d/a=b.txt"], r"Type 'task.path=\"/d/a=b.txt\"'$"),
        (["-m", "task.path=/d/données"], r"Type 'task.path=\"/d/données\"'$"),
        (["task.path=[a"], r"Type 'task.path=\"\[a\"'$"),
        (["task.path=/d/donn\udcc3\udca9es"], r"`task.path=/d/donn\?\?es` .* locale .* Set PYTHONUTF8=1"),
        (["~task"], "`~task` chooses no task"),
    ],
)
def test_a_word_that_hydra_cannot_read_is_refused_in_a_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        arrange_words(words)


def test_recorded_words_are_not_resolved():
    words = ["task.path=${oc.env:NOPE}", "seed=1"]
    assert list_words(OmegaConf.create({"words": words}).words) == list_words(words) == words
