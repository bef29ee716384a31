"""TOFU's files and the user's own, as the sets of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from palu.data.files import load_examples
from palu.evaluation.datasets import PARAPHRASED, PERTURBED, EvalSet

_FILES = {
    "retain": "retain_perturbed.json",
    "ra": "real_authors_perturbed.json",
    "wf": "world_facts_perturbed.json",
}


def tofu_files(folder: Path, split: str) -> dict[str, str]:
    """The files of a split that a folder of TOFU's holds: set -> path.

    `forget` is `SPLIT_perturbed.json`, or `SPLIT.json` where that is not there (then without truth
    ratio); `retain`, `ra` and `wf` are left out where their files are; `holdout` is
    `holdoutNN.json` of `forgetNN`.

    Raises:
        ValueError: no such folder, or none of the split in it.
    """
    if not folder.is_dir():
        raise ValueError(f"--tofu {str(folder)!r}: no such folder")
    if split in ("", ".", "..") or Path(split).name != split:
        raise ValueError(f"--split must be a name such as forget10, not {split!r}")
    forget = [folder / f"{split}_perturbed.json", folder / f"{split}.json"]
    there = [path for path in forget if path.is_file()]
    if not there:
        raise ValueError(f"--split {split!r}: neither {forget[0]} nor {forget[1]} is there")
    files = {"forget": str(there[0])}
    names = dict(_FILES)
    if split.startswith("forget"):
        names["holdout"] = f"holdout{split.removeprefix('forget')}.json"
    return files | {
        name: str(folder / file) for name, file in names.items() if (folder / file).is_file()
    }


def read_sets(
    files: dict[str, str],
    tokenizer: Any,
    *,
    template: Any,
    max_length: int,
    repair: str = "none",
) -> dict[str, EvalSet]:
    """Reads and tokenises files: set -> examples.

    Records of forget and retain files may have `paraphrased_answer` (a text) and
    `perturbed_answer` (a list of texts), all of a file or none; those of a file that is called
    `*_perturbed.json`, as TOFU's are, must have them. Real authors and world facts must have
    `perturbed_answer`; a holdout set needs neither.

    Args:
        files: set (`forget`, `retain`, `ra`, `wf`, `holdout`) -> path, slices allowed.

    Raises:
        ValueError, TypeError: as `palu.data.files.load_examples` and `EvalSet.tokenise`: names
            file, row and field.
    """
    sets = {}
    for name, path in files.items():
        fields = {"ra": (PERTURBED,), "wf": (PERTURBED,), "holdout": ()}
        wanted = fields.get(name, (PARAPHRASED, PERTURBED))
        must = name in fields or path.endswith("_perturbed.json")
        sets[name] = EvalSet.tokenise(
            path,
            load_examples(path, require_spans=False, repair=repair),
            tokenizer,
            template=template,
            max_length=max_length,
            required=wanted if must else (),
            optional=() if must else wanted,
        )
    return sets
