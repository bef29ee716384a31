"""The two packages as a tool or another project finds them: names, version, files, dependencies."""

from __future__ import annotations

import ast
import importlib
import json
import os
import pydoc
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import ParamSpec, TypeVar, get_args, get_type_hints

import pytest

import palu
import palu_kernels
from palu.errors import TRAIN
from palu_kernels.linear.head import together
from palu_kernels.sharded_logits import takes_dtensors
from tests.support import ROOT, small
from tests.support.command import write_data
from tests.support.once import once

PYPROJECT = (ROOT / "pyproject.toml").read_text()


def names_for_type_checkers() -> dict[str, str]:
    """Name to module, as the `if TYPE_CHECKING` block of `palu/__init__.py` imports them."""
    tree = ast.parse((ROOT / "palu" / "__init__.py").read_text())
    blocks = [
        n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"
    ]
    imports = [n for block in blocks for n in block.body]
    return {alias.name: n.module for n in imports for alias in n.names}


def test_public_names_are_stated_alike():
    assert names_for_type_checkers() == palu._HOMES
    assert sorted(palu.__all__) == sorted(palu._HOMES)


@pytest.mark.parametrize("name", palu.__all__)
def test_public_name_is_defined_where_it_is_said_to_live(name):
    module = importlib.import_module(palu._HOMES[name])
    value = vars(module)[name]
    assert value is getattr(palu, name) and value.__module__ == palu._HOMES[name]


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="PALULos"):
        palu.PALULos  # noqa: B018


@pytest.mark.parametrize("package", [palu, palu_kernels], ids=lambda p: p.__name__)
def test_help_and_dir_show_public_names(package):
    text = pydoc.render_doc(package, renderer=pydoc.plaintext)
    for name in package.__all__:
        assert name in dir(package) and re.search(rf"^    (class )?{name}\(", text, re.MULTILINE)


def test_one_version():
    stated = re.search(r'^version = "(.*)"$', PYPROJECT, re.MULTILINE)[1]
    assert palu.__version__ == palu_kernels.__version__
    assert f"\nversion: {stated}\n" in (ROOT / "CITATION.cff").read_text()
    assert palu.__version__ in (stated, "0+unknown")  # the second: a clone that is not installed


def test_nobody_is_told_to_install_another_project():
    """`palu` on PyPI is not this one."""
    tracked = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / ".ci" / "run"]
    for folder in ("palu", "palu_kernels", "docs", "benchmarks"):
        tracked += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".md", ".sh"}]
    wrong = re.compile(
        r"pip install[^\n&;#|`]*\s['\"]?palu(\[|['\"]?\s|['\"]?$)|[\"']palu\[", re.MULTILINE
    )
    assert not [f for f in tracked if wrong.search(f.read_text())]


@pytest.mark.parametrize("decorator", [takes_dtensors, together])
def test_a_decorated_operator_has_its_arguments_for_type_checkers(decorator):
    given, returned = get_type_hints(decorator).values()
    assert given == returned and all(map(isinstance, get_args(given), (ParamSpec, TypeVar)))


def test_every_data_file_is_in_the_wheel():
    patterns = dict(re.findall(r"^(palu\w*) = (\[.*\])$", PYPROJECT, re.MULTILINE))
    for package, globs in patterns.items():
        folder = ROOT / package
        packed = {p for glob in ast.literal_eval(globs) for p in folder.glob(glob)}
        here = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
        assert here == packed, package
    assert patterns.keys() == {"palu", "palu_kernels"}


def python(code: str, folder: Path = ROOT, *arguments: str) -> str:
    """What `code` prints in a Python of its own, started in `folder`."""
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=env, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_an_editable_install_is_a_path_that_type_checkers_follow(tmp_path):
    """An import hook, setuptools' other way, is invisible to them and loses against a clone's own
    folder named `palu`."""
    names = ("pyproject.toml", "README.md", "LICENSE", "palu", "palu_kernels")
    for name in names:
        (tmp_path / name).symlink_to(ROOT / name)
    code = "from setuptools import build_meta; print(build_meta.build_editable('.'))"
    wheel = tmp_path / python(code, tmp_path).splitlines()[-1]
    with zipfile.ZipFile(wheel) as files:
        paths = [files.read(name) for name in files.namelist() if name.endswith(".pth")]
    assert [path.decode().strip() for path in paths] == [str(tmp_path)]


# ---- what is loaded, in processes that begin with torch alone ------------------------------------

HIDING = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in MODULES
        return None if hidden else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def without(modules: str) -> str:
    """Code after which a Python finds none of `modules`."""
    return HIDING.replace("MODULES", str(modules.split()))


# What each command may load, one after the other in one process, of the libraries that take long.
COMMANDS = {
    "plan --model Llama-3.2-1B --gpu-memory 24": set(),
    "plan --model model --gpu-memory 24": {"accelerate", "transformers"},  # the config's class
    "inspect forget.jsonl --model model": {"accelerate", "transformers"},
}
HEAVY = {"accelerate", "datasets", "pandas", "peft", "scipy", "sklearn", "transformers"}
HEAVY |= {"transformers.modeling_utils", "transformers.trainer"}
CODES = {
    "kernels": f"{without('transformers accelerate datasets peft tokenizers typer')}"
    "import torch, palu_kernels\n"
    "logits = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)\n"
    "palu_kernels.kl_loss(logits, torch.zeros(1, 3), backend='torch').backward()\n"
    "print(logits.grad.shape, sorted(m for m in sys.modules if m.partition('.')[0] == 'palu'))",
    "names": f"{without('accelerate datasets peft typer rich scipy matplotlib')}"
    "import palu\n"
    "print({n for n in palu.__all__ if n != 'PALUTrainer' and not getattr(palu, n)})",
    "commands": "import sys\n"
    "from palu.cli.app import app\n"
    f"for command in {list(COMMANDS)}:\n"
    "    assert not app(command.split(), standalone_mode=False)\n"
    f"    print('LOADED', sorted({HEAVY} & set(sys.modules)))",
    "no train": f"{without(' '.join(TRAIN))}from palu.cli import main\nmain()",
    "no phonenumbers": f"{without('phonenumbers')}from palu.cli import main\n"
    "sys.argv = 'palu annotate forget.jsonl --terms Ada --output spans.jsonl'.split()\n"
    "main()",
    "no accelerate": f"{without('accelerate')}from palu import PALUTrainer",
    "trainer": "import sys\n"
    "from transformers import Trainer\n"
    "before = {name.partition('.')[0] for name in sys.modules}\n"
    "from palu import PALUTrainer\n"
    "after = {name.partition('.')[0] for name in sys.modules}\n"
    "print(*sorted(after - before - sys.stdlib_module_names))",
}
# Importing torch is most of what a process costs.
FORKED = """
import json, os, sys, torch, traceback
loaded = {"palu", "palu_kernels", "transformers", "triton"} & {*sys.modules}
assert not loaded, loaded
codes = json.loads(sys.argv[1])
for name, code in codes.items():
    if os.fork() == 0:
        for number in (1, 2):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        try:
            exec(code, {"__name__": "__main__"})
            print("END")
        except SystemExit as end:
            print("status", end.code)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(0)
for _ in codes:
    os.wait()
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, list[str]]:
    """The lines that each of `CODES` prints."""
    return once(tmp_path_factory, "package-processes", run_codes)[1]


def run_codes(folder: Path) -> dict[str, list[str]]:
    tokenizer = small.tokenizer()
    for part in (tokenizer, small.model(tokenizer).config):
        part.save_pretrained(folder / "model")
    write_data(folder)
    python(FORKED, folder, json.dumps(CODES))
    return {name: (folder / name).read_text().splitlines() for name in CODES}


def test_kernels_need_no_transformers(said):
    assert said["kernels"] == ["torch.Size([1, 3]) []", "END"]


def test_all_but_the_trainer_needs_no_extra(said):
    assert said["names"] == ["set()", "END"]


def test_a_command_starts_without_libraries_that_it_does_not_need(said):
    loaded = [line for line in said["commands"] if line.startswith("LOADED")]
    assert loaded == [f"LOADED {sorted(names)}" for names in COMMANDS.values()], said["commands"]


def test_the_command_names_the_extra_that_is_not_installed(said):
    error = f"error: not installed: {', '.join(TRAIN)}; pip install 'palu-unlearning[train]'"
    assert said["no train"] == [error, "status 2"]


def test_what_is_imported_later_names_the_extra_too(said):
    missing = "not installed: {}; pip install 'palu-unlearning[train]'"
    assert said["no phonenumbers"] == [f"error: {missing.format('phonenumbers')}", "status 2"]
    error = f"ModuleNotFoundError: PALUTrainer: {missing.format('accelerate')}"
    assert said["no accelerate"][-1] == error


def test_what_the_command_needs_is_the_extra_train():
    extra = re.search(r"^train = \[(.*?)\]", PYPROJECT, re.MULTILINE | re.DOTALL)[1]
    assert sorted(TRAIN) == sorted(ast.literal_eval(f"[{extra.replace('-', '_')}]"))


def test_the_trainer_loads_what_transformers_trainer_loads_and_palu(said):
    assert said["trainer"] == ["palu palu_kernels", "END"]
