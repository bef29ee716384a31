"""The configuration of a comparison: methods x settings x seeds on one model and its data."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from palu.comparison.measures import RECORDS, UTILITY
from palu.comparison.run_file import FORGET, ORIGINAL, RETRAINED
from palu.data.spans import shown
from palu.evaluation.names import PER_EXAMPLE
from palu.storage.json_files import NotJSON, parse, parse_yaml, read_text

LOSSES = (0.02, 0.05, 0.10)
# Options of `palu unlearn` that the comparison decides itself.
DECIDED = {
    **dict.fromkeys(("model", "forget", "seed"), "the comparison, which has a key of its own"),
    **dict.fromkeys(("output", "overwrite", "rescue", "resume", "save_steps"), "the comparison"),
    **dict.fromkeys(("keep_cache", "report_to", "set"), "the comparison"),
    **dict.fromkeys(("config", "print_config", "help"), "the command line alone"),
}
# What must be the same in all runs, or they would not be measured on the same.
COMMON_ONLY = ("max_length", "columns", "retain_columns", "drop_overlap", "repair")
COMMON_ONLY += ("system_prompt", "date_string", "chat_template_kwargs", "force_template")
COMMON_ONLY += ("dtype", "device", "allow_missing")
_NAME = re.compile(r"[A-Za-z0-9][\w .,+()=-]*")


class ConfigError(ValueError):
    """A configuration that cannot be; the message names file and key."""


@dataclass(frozen=True)
class Task:
    """One run, or (without method) the measurement of a model that nothing is done to.

    Attributes:
        id: name of its folder, readable.
        method: its name in the configuration.
        setting: what varies among the method's settings, in words; "" where nothing does.
        options: of `palu unlearn`.
    """

    id: str
    method: str | None = None
    setting: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True)
class MethodConfig:
    """One method: options of all its runs, and the settings that it is tried with."""

    options: dict[str, Any]
    settings: tuple[dict[str, Any], ...]
    search: dict[str, Any] | None = None


@dataclass(frozen=True)
class Comparison:
    """What is compared, on what, and how it is measured.

    Attributes:
        model, retrained: folder or id on the hub of the original, and of a model that never saw
            the forget set.
        forget, retain, holdout: files as `palu unlearn` and `palu attack` take them.
        utility: name -> file of what must not be lost.
        common: options of `palu unlearn` for all runs.
        attacks: names, quick, seed, and fields of `AttackSettings`.
        evaluate: max_new_tokens, batch_size, samples, temperature.
        forgetting: by which measure methods are ranked.
        losses: of utility, at which the best points are given.
        utility_metrics: of the utility sets, of which utility is made.
        max_fell_apart: of a setting that is ranked, the largest share of answers to the forget file
            that are no text any more; None: any.
        keep_models: whether a run's weights stay.
        jobs: runs at a time on this machine.
        threads: of a run, on a CPU; None: the cores, shared by the jobs.
    """

    model: str
    forget: str
    utility: dict[str, str]
    methods: dict[str, MethodConfig]
    retrained: str | None = None
    retain: str | None = None
    holdout: str | None = None
    seeds: tuple[int, ...] = (0,)
    common: dict[str, Any] = field(default_factory=dict)
    attacks: dict[str, Any] = field(default_factory=dict)
    evaluate: dict[str, Any] = field(default_factory=dict)
    forgetting: str = "attacks"
    losses: tuple[float, ...] = LOSSES
    utility_metrics: tuple[str, ...] = UTILITY
    max_fell_apart: float | None = None
    keep_models: bool = False
    jobs: int = 1
    threads: int | None = None

    def tasks(self) -> list[Task]:
        """Return the runs of all settings that are written down, seed by seed: what is there when a
        comparison is stopped has all methods."""
        return [
            task
            for seed in self.seeds
            for rank in itertools.zip_longest(
                *(
                    [self.task(name, setting, seed) for setting in method.settings]
                    for name, method in self.methods.items()
                )
            )
            for task in rank
            if task is not None
        ]

    def task(self, name: str, setting: Mapping[str, Any], seed: int) -> Task:
        """Return one run of a method."""
        options = {**self.common, **self.methods[name].options, **setting}
        words = _words(setting)
        text = json.dumps([name, options, seed], sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
        slug = re.sub(r"[^A-Za-z0-9.+=,-]+", "_", f"{name}-{words}" if words else name)[:100]
        return Task(f"{slug}-s{seed}-{digest}", name, words, options, seed)


def read_config(path: Path) -> Comparison:
    """Read a YAML or JSON file. Raises ConfigError, which names the file and the key."""
    try:
        text = read_text(path)
        content = parse(text) if path.suffix == ".json" else parse_yaml(text)
    except NotJSON as error:
        raise ConfigError(f"{path}: not readable: {error}") from None
    try:
        return from_dict(content)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def from_dict(content: Any) -> Comparison:
    """Return the configuration that a file holds. Raises ConfigError, which names the key."""
    content = _plain(content)
    _keys("the configuration", content, _PARTS, needed=("model", "forget", "utility", "methods"))
    values = {name: check(name, content[name]) for name, check in _PARTS.items() if name in content}
    names = (FORGET, ORIGINAL, RETRAINED, "holdout", RECORDS)
    if taken := [name for name in values["utility"] if name in names]:
        raise ConfigError(f"utility.{taken[0]} is a name of another set; name it otherwise")
    _check_common(values)
    return Comparison(**values)


def check_names(comparison: Comparison, methods: Sequence[str]) -> Comparison:
    """Check the names of all options, and fill in `method` where a method's name says it.

    Args:
        methods: that `palu unlearn` has.

    Raises:
        ConfigError: an option that the comparison decides, or a method that is not named.
    """
    for where, options in comparison_options(comparison):
        for name in options:
            if name in DECIDED and name != "retain":
                raise ConfigError(f"{where}.{name} is decided by {DECIDED[name]}; leave it out")
            if name in COMMON_ONLY and not where.startswith("common"):
                raise ConfigError(f"{where}.{name} must be the same in all runs: put it in common")
    for name, one in comparison.methods.items():
        given = {**comparison.common, **one.options}
        varies = [*one.settings, *([one.search["space"]] if one.search else [])]
        if "method" in given or all("method" in setting for setting in varies):
            continue
        called = [method for method in methods if _bare(method) == _bare(name)]
        if not called:
            raise ConfigError(
                f"methods.{name} has no option method, which says what palu unlearn does: one of "
                f"{', '.join(methods)}"
            )
        one.options["method"] = called[0]
    return comparison


def comparison_options(comparison: Comparison) -> list[tuple[str, Mapping[str, Any]]]:
    """Return every place of the configuration that has options of `palu unlearn`, and those."""
    places: list[tuple[str, Mapping[str, Any]]] = [("common", comparison.common)]
    for name, one in comparison.methods.items():
        places.append((f"methods.{name}.options", one.options))
        places += [(f"methods.{name}.settings", setting) for setting in one.settings]
        if one.search is not None:
            places.append((f"methods.{name}.search.space", one.search["space"]))
    return places


def _bare(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()


# ---- the parts of a file -------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    """Return a value of a file with `_` for `-` in names of options, and numbers for texts such as
    1e-4, which YAML takes for no number."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def _words(setting: Mapping[str, Any]) -> str:
    """Return what a setting is called in the tables."""
    return ", ".join(f"{key}={_value(value)}" for key, value in setting.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "+".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _keys(
    where: str, content: Any, known: Mapping[str, Any] | Sequence[str], needed: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Raise ConfigError for what is no mapping, a key that is unknown or one that is missing."""
    import difflib

    if not isinstance(content, Mapping):
        raise ConfigError(f"{where} must hold names and values, not {shown(content)}")
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), list(known), n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown key {key!r}; the nearest known one is {near[0]!r}")
    for key in needed:
        if key not in content:
            raise ConfigError(f"{where}: {key} is missing")
    return content


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text, not {shown(value)}")
    return value


def _maybe(check: Callable[[str, Any], Any]) -> Callable[[str, Any], Any]:
    return lambda name, value: None if value is None else check(name, value)


def _whole(least: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
        return value

    return check


def _above_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a finite number above 0, not {value!r}")
    return float(value)


def _metrics(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name} must be a list of metrics, not {shown(value)}")
    if unknown := [one for one in value if one not in PER_EXAMPLE]:
        raise ConfigError(f"{name}: {unknown[0]!r} must be one of {', '.join(PER_EXAMPLE)}")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name} has a metric twice: {shown(value)}")
    return tuple(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {shown(value)}")
    return value


def _seeds(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{name} must be a list of whole numbers, not {shown(value)}")
    seeds = tuple(_whole(0)(f"{name}[{n}]", one) for n, one in enumerate(value))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{name} has a seed twice: {shown(value)}")
    return seeds


def _losses(name: str, value: Any) -> tuple[float, ...]:
    fine = isinstance(value, list) and value
    if not fine or not all(isinstance(one, float | int) and 0 < one < 1 for one in value):
        raise ConfigError(f"{name} must be a list of numbers between 0 and 1, not {shown(value)}")
    if len(set(value)) < len(value):
        raise ConfigError(f"{name} has a loss twice: {shown(value)}")
    return tuple(map(float, value))


def _share(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, float | int) or not 0 <= value < 1:
        raise ConfigError(f"{name} must be a number from 0 to below 1, not {shown(value)}")
    return float(value)


def _utility(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{name} must name at least one file: NAME: FILE, not {shown(value)}")
    return {_name(name, key): _text(f"{name}.{key}", file) for key, file in value.items()}


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} must be a name of letters, digits, blanks and - _ + = . , ( ), and "
            "begin with a letter of English or a digit"
        )
    return name


def _options(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must hold options and values, not {shown(value)}")
    options = {str(key).replace("-", "_"): one for key, one in value.items()}
    if len(options) < len(value):
        raise ConfigError(f"{name} has an option twice, once with - and once with _")
    for key, one in options.items():
        if isinstance(one, Mapping) and key != "chat_template_kwargs":
            raise ConfigError(f"{name}.{key} must be a value, not {shown(one)}")
    return options


def _method(name: str, value: Any) -> MethodConfig:
    value = {} if value is None else value
    _keys(name, value, ("options", "grid", "settings", "search"))
    options = _options(f"{name}.options", value.get("options", {}))
    settings = []
    if "grid" in value:
        grid = _options(f"{name}.grid", value["grid"])
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ConfigError(f"{name}.grid.{key} must be a list of values, not {values!r}")
        settings += [
            dict(zip(grid, some, strict=True)) for some in itertools.product(*grid.values())
        ]
    if "settings" in value:
        if not isinstance(value["settings"], list) or not value["settings"]:
            raise ConfigError(f"{name}.settings must be a list of options and values")
        some = enumerate(value["settings"])
        settings += [_options(f"{name}.settings[{n}]", one) for n, one in some]
    search = None
    if "search" in value:
        search = _search(f"{name}.search", value["search"])
        if both := [key for key in search["space"] if key in options]:
            raise ConfigError(f"{name}: {both[0]} is in options, and sought; leave it out of one")
    if not settings and search is None:
        settings = [{}]
    _check_settings(name, options, settings)
    return MethodConfig(options, tuple(settings), search)


def _check_settings(name: str, options: Mapping[str, Any], settings: Sequence[dict]) -> None:
    """Raise ConfigError for a setting that is there twice, or called as another one."""
    for n, setting in enumerate(settings):
        if setting in settings[:n]:
            raise ConfigError(f"{name} has the setting {shown(setting)} twice")
        if both := [key for key in setting if key in options]:
            raise ConfigError(f"{name}: {both[0]} is in options, and varies; leave it out of one")
    names = [*map(_words, settings)]
    if twice := [one for one in names if names.count(one) > 1]:
        raise ConfigError(f"{name} has two settings that are called {twice[0]!r} in the tables")


def _search(name: str, value: Any) -> dict[str, Any]:
    sizes = {"trials": _whole(1), "generation": _whole(1), "startup": _whole(1), "seed": _whole(0)}
    _keys(name, value, (*sizes, "space"), needed=("trials", "space"))
    search = {"generation": 4, "startup": 8, "seed": 0}
    search |= {
        key: check(f"{name}.{key}", value[key]) for key, check in sizes.items() if key in value
    }
    space = value["space"]
    if not isinstance(space, Mapping) or not space:
        raise ConfigError(f"{name}.space must name at least one option, not {shown(space)}")
    search["space"] = {
        str(key).replace("-", "_"): _range(f"{name}.space.{key}", one) for key, one in space.items()
    }
    return search


def _range(name: str, value: Any) -> Any:
    """Return a list of values, or `low`, `high` and `log`."""
    if isinstance(value, list) and value:
        return value
    _keys(name, value, ("low", "high", "log"), needed=("low", "high"))
    low, high = value["low"], value["high"]
    log = _flag(f"{name}.log", value.get("log", False))
    for one in (low, high):
        if isinstance(one, bool) or not isinstance(one, int | float):
            raise ConfigError(f"{name}: low and high must be numbers, not {one!r}")
    if not (0 if log else -math.inf) < low < high < math.inf:
        least = " above 0" if log else ""
        raise ConfigError(f"{name}: low must be a number{least} and below high, not {low!r}")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return {"low": low, "high": high, "log": log}


def _methods(name: str, value: Any) -> dict[str, MethodConfig]:
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{name} must name at least one method, not {shown(value)}")
    if taken := [key for key in value if key in (ORIGINAL, RETRAINED)]:
        raise ConfigError(f"{name}.{taken[0]} is a name of another model's rows; name it otherwise")
    return {_name(name, key): _method(f"{name}.{key}", one) for key, one in value.items()}


def _attacks(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} must hold names and values, not {shown(value)}")
    return {str(key).replace("-", "_"): one for key, one in value.items()}


def _evaluate(name: str, value: Any) -> dict[str, Any]:
    sizes = {"max_new_tokens": _whole(1), "batch_size": _whole(1), "samples": _whole(0)}
    _keys(name, value, (*sizes, "temperature"))
    checks = {**sizes, "temperature": _above_zero}
    return {key: checks[key](f"{name}.{key}", one) for key, one in value.items()}


def _check_common(values: Mapping[str, Any]) -> None:
    common = values.get("common", {})
    if "retain" in common:
        raise ConfigError("common.retain: the configuration has a key retain of its own")


_PARTS: dict[str, Callable[[str, Any], Any]] = {
    "model": _text,
    "retrained": _maybe(_text),
    "forget": _text,
    "retain": _maybe(_text),
    "holdout": _maybe(_text),
    "utility": _utility,
    "seeds": _seeds,
    "common": _options,
    "methods": _methods,
    "attacks": _attacks,
    "evaluate": _evaluate,
    "forgetting": _text,
    "losses": _losses,
    "utility_metrics": _metrics,
    "max_fell_apart": _maybe(_share),
    "keep_models": _flag,
    "jobs": _whole(1),
    "threads": _maybe(_whole(1)),
}
