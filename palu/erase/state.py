"""What was done of a run, and of what inputs: the file that a second start reads."""

from __future__ import annotations

from pathlib import Path

from palu.storage.files import write_json
from palu.storage.json_files import read_object

STATE, STATE_FORMAT = "erase.json", "palu-erase/1"
STAGES = {
    "annotate": "Finding what to forget",
    "unlearn": "Unlearning",
    "evaluate": "Evaluating",
    "attack": "Attacking",
    "report": "Writing the report",
}


class State:
    """What was done in a work folder, and of what inputs."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        # A run that was killed with its first file has left a part of that alone.
        begun = f".{STATE}.*.partial"
        there = folder.is_dir() and not all(path.match(begun) for path in folder.iterdir())
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{str(folder)!r} is in the way of the work of this run; move it away")
        content = read_object(self.path) if self.path.is_file() else {}
        if there and content.get("format") != STATE_FORMAT:
            raise ValueError(
                f"{str(folder)!r} is in the way of the work of this run, and palu erase did not "
                "write it; move it away"
            )
        self.stages: dict[str, str] = dict(content.get("stages", {}))
        self.begun: str | None = content.get("begun")  # the key of a stage that was not ended

    def has(self, stage: str, key: str) -> bool:
        """Return whether a stage was done with these inputs."""
        return self.stages.get(stage) == key

    def begin(self, stage: str, key: str) -> None:
        """Note that a stage is begun, and that what comes after it is not done."""
        names = list(STAGES)
        done = {
            name: self.stages[name] for name in names[: names.index(stage)] if name in self.stages
        }
        self.stages, self.begun = done, key
        if self.path.parent.is_dir():
            self.write()

    def add(self, stage: str, key: str) -> None:
        """Note that a stage is done."""
        self.stages[stage], self.begun = key, None
        self.write()

    def write(self) -> None:
        """Write the state, into a folder that only its owner may read."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_json(self.path, {"format": STATE_FORMAT, "stages": self.stages, "begun": self.begun})
