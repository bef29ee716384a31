"""`benchmarks.quality.hard_people`: who is in which file, and which wordings nobody is taught."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quality import hard_people
from benchmarks.quality.hard_people import (
    GROUPS,
    SHARED,
    UTILITY,
    general_rows,
    invent,
    main,
    unknown,
    write_files,
)
from palu.cli.compare import configuration
from palu.data.files import load_examples
from palu.training.options import RunOptions, choices


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return folder, write_files(folder, seed=0)


def read(folder, name):
    return load_examples(folder / f"{name}.jsonl", require_spans=True)


def test_every_group_has_its_own_people():
    groups = invent(3)
    names = [person.name for people in groups.values() for person in people]
    assert {name: len(people) for name, people in groups.items()} == GROUPS
    assert len(set(names)) == len(names)


def test_neighbours_share_facts_with_one_who_is_forgotten():
    groups = invent(3)
    for number, person in enumerate(groups["neighbours"]):
        other, facts = groups["forget"][number // 2], SHARED[number % 2]
        assert [getattr(person, fact) for fact in facts] == [getattr(other, f) for f in facts]
        assert person.book != other.book and person.birthday != other.birthday
    forgotten = {person.town for person in groups["forget"]}
    assert not forgotten & {person.town for person in groups["others"] + groups["retain"]}


def test_utility_files_hold_nothing_that_unlearning_is_given(world):
    folder, _ = world
    given = {(e.question, e.answer) for name in ("forget", "retain") for e in read(folder, name)}
    for name in UTILITY:
        assert not given & {(e.question, e.answer) for e in read(folder, name)}


def test_nobody_is_taught_the_other_wordings_nor_the_people_of_the_holdout(world):
    folder, taught = world
    questions = {row["question"] for rows in taught.values() for row in rows}
    other = {text for e in read(folder, "forget") for text in e.extra["paraphrased_question"]}
    other |= {e.question for e in read(folder, "paraphrases")}
    other |= {e.question for e in read(folder, "holdout")}
    assert len(other) == 2 * 48 + 2 * 80 + 48 and not other & questions
    # Each record in four wordings.
    assert [len(taught[name]) for name in ("forget", "retain")] == [4 * 48, 4 * 80]


def test_spans_cover_the_facts(world):
    folder, _ = world
    rows, more = general_rows()
    assert len({row["id"] for row in rows + more}) == len(rows + more)
    facts = {e.id: [e.answer[a:b] for a, b in e.spans] for e in read(folder, "general")}
    assert facts["sum-3-plus-4"] == ["7"] and facts["day-Sunday"] == ["Monday"]
    assert facts["capital-Brovania"] == ["Lindel"]
    assert all(len(e.spans) > 0 for name in (*GROUPS, *UTILITY) for e in read(folder, name))


def test_a_file_that_the_original_does_not_know_is_said():
    def known(value):
        return {"mean": {"answer_probability": value}}

    assert unknown({"forget": known(0.96), "paraphrases": known(0.6)}) == []
    lines = unknown({"retain": known(0.95), "paraphrases": known(0.4)})
    assert lines == [
        "retain: answer probability 0.950, not above 0.95",
        "paraphrases: answer probability 0.400, not above 0.5",
    ]


def test_a_folder_with_something_in_it_is_refused(tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path)])
    assert stopped.value.code == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


CONFIGS = sorted((Path(hard_people.__file__).parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_committed_comparison_can_be_read(path):
    comparison = configuration(path)
    assert comparison.retrained is not None and set(comparison.losses) == {0.02, 0.05, 0.1}
    for task in comparison.tasks():
        assert task.options["method"] in choices(RunOptions, "method")
