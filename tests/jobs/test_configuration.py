"""Configuration files and overrides: what is accepted, and the one line that says what is not."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from blt.errors import ConfigError
from jobs.configuration import find_config, load_config, to_plain
from jobs.settings import Setting, describe


@dataclass(frozen=True, kw_only=True)
class Optimiser:
    """How weights are updated."""

    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True, kw_only=True)
class Base:
    output: str
    """Where it goes."""


@dataclass(frozen=True, kw_only=True)
class Job(Base):
    steps: int = 10
    """Steps,
    all of them."""
    input: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()
    kind: Literal["entropy", "space"] = "entropy"
    per_patch: Literal[1, 2, 4] = 1
    name: str | None = None
    resume: bool = False
    optimiser: Optimiser = field(default_factory=lambda: Optimiser(betas=(0.8, 0.9)))
    teacher: Optimiser | None = None


def load(*overrides: str, text: str = "output: o", directory: Path) -> Job:
    file = directory / "job.yaml"
    file.write_text(text)
    return load_config(Job, file, overrides)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=5", {"steps": 5}),
        ("steps='5'", {"steps": 5}),
        ("optimiser.lr=1e-2", {"optimiser": Optimiser(lr=0.01, betas=(0.8, 0.9))}),
        ("optimiser={lr: 2}", {"optimiser": Optimiser(lr=2, betas=(0.8, 0.9))}),
        ("optimiser.betas=[0, 1]", {"optimiser": Optimiser(betas=(0.0, 1.0))}),
        ("teacher.lr=3", {"teacher": Optimiser(lr=3)}),
        ("teacher=null", {"teacher": None}),
        ("input=*.jsonl", {"input": ("*.jsonl",)}),
        ("input=[a, b]", {"input": ("a", "b")}),
        ("sizes=3", {"sizes": (3,)}),
        ("name=null", {"name": None}),
        ("name=007", {"name": "007"}),
        ("name=To be: or not ", {"name": "To be: or not "}),
        (r'name="a\nb"', {"name": "a\nb"}),
        ("per_patch=4", {"per_patch": 4}),
        ("resume=true", {"resume": True}),
    ],
)
def test_override_is_read_by_the_type_of_its_key(override: str, expected: dict[str, object], tmp_path: Path) -> None:
    config = load(override, directory=tmp_path)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=many", 'key "steps": expected an integer, got "many"'),
        ("steps=true", 'key "steps": expected an integer, got true'),
        ("steps=1.5", 'key "steps": expected an integer, got 1.5'),
        ("steps=", 'key "steps": expected an integer, got null'),
        ("sizes=[1, x]", 'key "sizes[1]": expected an integer, got "x"'),
        ("optimiser.lrr=1", 'key "optimiser.lrr" is not known; did you mean "lr"? (accepted: lr, betas)'),
        ("optimiser={lr: 1, lrr: 1}", 'key "optimiser.lrr" is not known; did you mean "lr"? (accepted: lr, betas)'),
        ("teacher.momentum=1", 'key "teacher.momentum" is not known (accepted: lr, betas)'),
        ("optimiser.betas=[1]", 'key "optimiser.betas": expected a list of 2 (a number, a number), got [1]'),
        ("optimiser.lr=-1", 'key "optimiser.lr" must be above 0, got -1.0'),
        ("teacher.lr=-1", 'key "teacher.lr" must be above 0, got -1.0'),
        ("optimiser=3", 'key "optimiser": expected a section (keys: lr, betas), got 3'),
        ("steps.lr=3", 'key "steps": expected an integer, got {"lr": 3}'),
        ("kind=spaces", 'key "kind": expected one of entropy, space, got "spaces"'),
        ("per_patch=3", 'key "per_patch": expected one of 1, 2, 4, got 3'),
        ("resume=[1", "key \"resume\": \"[1\" is not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("--steps", '"--steps" is not a setting; settings are given as KEY=VALUE'),
    ],
)
def test_refused_override_is_named_with_what_is_accepted(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(override, directory=tmp_path)
    assert message in str(refusal.value)
    assert "command line" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'key "output" is missing: text is required'),
        ("output: o\nstep: 3", 'key "step" is not known; did you mean "steps"?'),
        ("outptu: o", 'key "outptu" is not known; did you mean "output"?'),
        ("output: o\noptimiser: {lr: fast}", 'key "optimiser.lr": expected a number, got "fast"'),
        ("output: o\noutput: p", 'is not valid YAML: key "output" is given twice (line 2, column 1)'),
        ("output: [", "is not valid YAML"),
        ("- output", "expected `key: value` lines"),
        ("output: o\n1: 2", 'key "1": keys are names, got 1'),
    ],
)
def test_error_in_a_file_names_the_file(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(text=text, directory=tmp_path)
    assert str(refusal.value).startswith(f"{tmp_path / 'job.yaml'}: {message}")


def test_scalars_are_read_as_yaml_1_2(tmp_path: Path) -> None:
    config = load(text="{output: on, name: 2026-11-22, steps: 1e1, optimiser: {lr: 1e-3}}", directory=tmp_path)
    assert (config.output, config.name, config.steps, config.optimiser.lr) == ("on", "2026-11-22", 10, 1e-3)


def test_override_replaces_the_value_of_the_file(tmp_path: Path) -> None:
    config = load("optimiser.lr=2", text="{output: o, optimiser: {lr: 1, betas: [0, 0]}}", directory=tmp_path)
    assert config.optimiser == Optimiser(lr=2.0, betas=(0.0, 0.0))


def test_plain_form_loads_to_the_same_configuration() -> None:
    config = load_config(Job, None, ["output=o", "teacher.lr=2", "input=[a, b]"])
    plain = to_plain(config)
    assert plain["input"] == ["a", "b"]
    assert load_config(Job, None, [f"{key}={value}" for key, value in plain.items() if value is not None]) == config


def test_missing_configuration_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'configuration file ".*nope\.yaml" does not exist'):
        find_config(str(tmp_path / "nope.yaml"))
    with pytest.raises(ConfigError, match="is a directory"):
        find_config(str(tmp_path))


def test_description_lists_nested_and_inherited_keys_with_their_defaults() -> None:
    settings = {setting.key: setting for setting in describe(Job, {"optimiser": {"lr": 0.5}})}
    assert settings["output"] == Setting(key="output", type="text", default="required", doc="Where it goes.")
    assert settings["steps"] == Setting(key="steps", type="integer", default="10", doc="Steps, all of them.")
    assert settings["optimiser"] == Setting(key="optimiser", type="section", default="", doc="How weights are updated.")
    assert settings["optimiser.lr"] == Setting(
        key="optimiser.lr", type="number", default="0.5", doc="Peak learning rate."
    )
    assert settings["optimiser.betas"].default == "[0.8, 0.9]"
    assert settings["teacher"].default == "null"
    assert settings["kind"].type == "entropy | space"
    assert settings["input"].type == "[text, ...]"
