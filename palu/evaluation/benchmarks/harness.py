"""General ability: tasks of lm-evaluation-harness (EleutherAI) on the model that is loaded."""

from __future__ import annotations

import copy
import fnmatch
import json
import logging
import math
from collections.abc import Callable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any
from unittest import mock

from palu.data.spans import shown
from palu.errors import one_line
from palu.evaluation.benchmarks.benchmark import Entry
from palu.evaluation.benchmarks.meter import Meter
from palu.storage.json_files import NotJSON, parse

OPTIONS = ("num_fewshot", "limit", "apply_chat_template", "system_instruction", "gen_kwargs")
"""Arguments of `lm_eval.simple_evaluate` that `--lm-eval-options` may give."""


class Harness:
    """Some tasks of lm-evaluation-harness.

    A log gets an entry for each number of a task, `mmlu/acc`, as open-unlearning names them; with
    the harness's filter behind a comma where a task has several: `gsm8k/exact_match,strict-match`.

    Args:
        tasks: names of tasks and groups with commas between them.
        folder: with task files of the user's own, beside the harness's.
        options: a JSON object with some of `OPTIONS`.

    Raises:
        ValueError, TypeError: no such task, folder or option, or lm-evaluation-harness is not
            installed.
    """

    name, title = "lm_eval", "LMEval"
    uses_retrained = False

    def __init__(self, tasks: str, folder: Path | None = None, options: str | None = None) -> None:
        self.tasks = [task.strip() for task in tasks.split(",")]
        self.options = _options(options)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--lm-eval-tasks {str(folder)!r}: no such folder")
        try:
            import lm_eval.tasks
        except ImportError as error:
            raise ValueError(
                "--lm-eval needs lm-evaluation-harness: pip install 'palu-unlearning[bench]' "
                f"({one_line(error)})"
            ) from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self.manager = lm_eval.tasks.TaskManager(include_path=folder and str(folder))
        for task in self.tasks:
            if task in self.manager.all_tags:
                raise ValueError(f"--lm-eval {task!r} is a tag of several tasks: name the tasks")
            if task not in self.manager.all_tasks:
                raise ValueError(f"--lm-eval {task!r}: {self._alike(task)}")

    def settings(self) -> dict[str, Any]:
        """Return what a log must have been measured with to go on from."""
        import lm_eval

        return {"lm_eval": lm_eval.__version__, "lm_eval_options": self.options}

    def run(
        self,
        meter: Meter,
        log: dict[str, Entry],
        save: Callable[[dict[str, Entry]], None],
    ) -> None:
        """Add the tasks that `log` lacks, and save it after each.

        Raises:
            ValueError: several processes, or a task whose data cannot be loaded.
        """
        lacking = [t for t in self.tasks if not any(name.startswith(f"{t}/") for name in log)]
        if not lacking:
            return
        if meter.processes.count > 1:
            raise ValueError("--lm-eval measures in one process: start palu evaluate alone")
        from lm_eval.models.huggingface import HFLM

        # It gives the tokenizer another padding token.
        tokenizer = copy.deepcopy(meter.tokenizer)
        model = HFLM(pretrained=meter.model, tokenizer=tokenizer, batch_size=meter.batch_size)
        for task in lacking:
            log.update(entries(task, self._evaluate(model, task)))
            save(log)

    def _evaluate(self, model: Any, task: str) -> Mapping[str, Any]:
        from lm_eval import evaluator

        try:
            # It would ask git about the folder that the user is in.
            with mock.patch.object(evaluator, "get_git_commit_hash", lambda: None, create=True):
                return evaluator.simple_evaluate(
                    model=model, tasks=[task], task_manager=self.manager, **self.options
                )
        except (OSError, ConnectionError, ValueError) as error:
            raise ValueError(f"--lm-eval {task!r} failed: {one_line(error)}") from error

    def _alike(self, task: str) -> str:
        """Return that there is no such task, and a few whose names are alike."""
        import difflib

        known = self.manager.all_tasks
        close = difflib.get_close_matches(task, known, n=3) or fnmatch.filter(known, f"*{task}*")
        hint = f"; did you mean {', '.join(close[:3])}?" if close else ""
        return f"lm-evaluation-harness has no such task{hint}"


def entries(task: str, results: Mapping[str, Any]) -> dict[str, Entry]:
    """Return the entries of a task or a group from what `lm_eval.simple_evaluate` gave.

    An entry has its standard error where the harness gives one, a number for every example where
    the metric is a mean of such, and of a group the numbers of its tasks as `parts`.
    """
    own = {**results["results"].get(task, {}), **results.get("groups", {}).get(task, {})}
    members = [name for name in results["results"] if name != task]
    made: dict[str, Entry] = {}
    for key, number in own.items():
        metric, _, kind = key.partition(",")
        if not isinstance(number, Real) or metric.endswith("_stderr") or not kind:
            continue
        if not _is_number(number):
            raise FloatingPointError(f"--lm-eval {task!r}: {key} is {number}")
        name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
        entry: Entry = {"agg_value": float(number)}
        if _is_number(stderr := own.get(f"{metric}_stderr,{kind}")):
            entry["stderr"] = float(stderr)
        if members:
            parts = {one: results["results"][one].get(key) for one in members}
            entry["parts"] = {one: part for one, part in parts.items() if _is_number(part)}
        if rows := _examples(results.get("samples", {}), metric, kind, task):
            entry["value_by_index"] = rows
        made[name] = dict(sorted(entry.items()))
    if not made:
        raise ValueError(f"--lm-eval {task!r} gave no number")
    return made


def _examples(samples: Mapping[str, Any], metric: str, kind: str, task: str) -> dict[str, Entry]:
    """Return the metric of every example, by its number, of a group after its task's name; none
    where it is no number of an example."""
    rows = {}
    for name, some in samples.items():
        for sample in some:
            if sample.get("filter", kind) != kind or not _is_number(sample.get(metric)):
                continue
            index = str(sample["doc_id"])
            rows[index if name == task else f"{name}/{index}"] = {"score": float(sample[metric])}
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


def _options(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        options = parse(text)
    except NotJSON as error:
        raise ValueError(f"--lm-eval-options is not JSON: {error}") from None
    if not isinstance(options, Mapping):
        raise TypeError(f"--lm-eval-options must be a JSON object, got {shown(options)}")
    if unknown := [name for name in options if name not in OPTIONS]:
        raise ValueError(
            f"--lm-eval-options: {shown(unknown[0])} must be one of {', '.join(OPTIONS)}"
        )
    return json.loads(json.dumps(options))


def wanted(tasks: str | None, folder: Path | None, options: str | None) -> Harness | None:
    """Return what `--lm-eval` asks for; None where it is not given.

    Raises:
        ValueError: one of the others without it.
    """
    if tasks is not None:
        return Harness(tasks, folder, options)
    for name, value in (("tasks", folder), ("options", options)):
        if value is not None:
            raise ValueError(f"--lm-eval-{name} is of --lm-eval: add --lm-eval TASKS")
    return None
