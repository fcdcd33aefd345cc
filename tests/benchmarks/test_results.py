"""Every results file says by which command, at which commit and where it was made, and the command still exists."""

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from balf_fx.cli.main import main as cli

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
COMMANDS = [
    line
    for block in re.findall(r"```console\n(.*?)```", (ROOT / "benchmarks" / "README.md").read_text(), re.DOTALL)
    for line in block.splitlines()
]
UNKNOWN = {"db81b545429afdd4f81e86048ad6c5c7d41ad5a0": ["torch", "cpu", "cores", "threads"]}
"""What the headers of some early runs leave out, by commit."""
FIELDS = ("torch", "cpu", "cores", "threads", "date", "commit", "command", "options")


def headers(found):
    """Of a file's run and of those that it continues; pytest-benchmark has a form of its own."""
    own = {key: found[key] for key in FIELDS if key in found}
    if "machine_info" in found:
        own |= {**found["machine_info"], "commit": found["commit_info"]["id"]}
    return [own, *(headers(found["continues"]) if "continues" in found else [])]


def missing(header):
    """The fields that a header should have and has not; pytest takes no options but those of the command."""
    fields = FIELDS[:-1] if str(header.get("command")).startswith("python -m pytest") else FIELDS
    return [field for field in fields if header.get(field) is None]


def options(command):
    """What a command of a benchmark passes, by name, defaults included; the folder of benchmarks is on the path.

    Raises:
        click.UsageError: the script has no such option, or the option no such value.
    """
    program, script, *arguments = shlex.split(command)
    if program == "balf-fx":
        parser = cli.commands[script].make_parser(click.Context(cli))  # values may name files that are only examples
        return parser.parse_args(arguments)[0]
    assert program == "python"
    assert (ROOT / script).is_file(), f"{script} does not exist"
    main = pytest.importorskip(Path(script).stem).main
    return main.make_context(script, arguments).params


def collected(command):
    """What a command of pytest collects, the first word that is no option."""
    return next(word for word in shlex.split(command) if word.startswith("benchmarks"))


def as_json(values):
    return json.loads(json.dumps({name: value for name, value in values.items() if not isinstance(value, Path)}))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_how_each_of_its_runs_was_made(path):
    for header in headers(json.loads(path.read_text())):
        assert missing(header) == UNKNOWN.get(header["commit"], [])
        assert re.fullmatch("[0-9a-f]{40}", header["commit"]), "it was not made from a commit, but from changed files"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_commands_of_a_file_exist_and_pass_its_options(path, load_benchmark):
    load_benchmark("common")
    for header in headers(json.loads(path.read_text())):
        if header["command"].startswith("python -m pytest"):
            assert (ROOT / collected(header["command"])).exists()
        else:
            passed = as_json(options(header["command"]))
            assert {name: passed[name] for name in header["options"]} == header["options"]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_exist(command, load_benchmark):
    load_benchmark("common")
    if command.startswith("python -m pytest"):
        assert (ROOT / collected(command)).exists()
    else:
        options(command)


@pytest.mark.parametrize("field", FIELDS)
def test_what_a_header_leaves_out_is_noticed(field):
    header = {**dict.fromkeys(FIELDS, "a"), "options": {}}
    assert missing(header) == []
    del header[field]
    assert missing(header) == [field]
    assert [missing(each) for each in headers({**dict.fromkeys(FIELDS, "a"), "continues": header})] == [[], [field]]


@pytest.mark.parametrize("wrong", ["--no-such-option", "--model no_such_model", "--images many"])
def test_what_a_script_does_not_take_is_noticed(wrong, load_benchmark):
    load_benchmark("common")
    with pytest.raises(click.UsageError):
        options(f"python benchmarks/accuracy.py {wrong}")
    with pytest.raises(AssertionError, match="does not exist"):
        options("python benchmarks/no_such_script.py")
