"""Break the code on purpose, one fault at a time, and see the default tests notice.

    python tests/breakages.py [--repo DIR] [--only WORD] [--output FILE] [--control]

Each fault replaces a piece of text that stands in one source file alone. The checkout is copied,
the fault put in, and the test files named beside it run as `pytest -x` runs them by default. A
fault that no test notices is a line `NOT CAUGHT`, and the exit status is 1. With `--control`
nothing is broken, and every line is to say `NOT CAUGHT`: tests that fail anyway would look as if
they noticed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    name: str
    text: str  # as it is
    broken: str
    tests: str  # stems of test files, without `test_`, the likeliest first


FAULTS = [
    # what a run leaves known
    Fault(
        "splits of a row count from one number",
        "total += tl.load(slot + 1) + split_live * (split_near - near)",
        "total += tl.load(slot + 1)",
        "statistics",
    ),
    Fault(
        "a span counts as recited where one token is",
        "bool(first[own].all())",
        "bool(first[own].any())",
        "until_forgotten",
    ),
    Fault(
        "what the text before says counts as a secret",
        "judged = sort_secrets([text.strip()], before).judged",
        "judged = [text.strip()]",
        "until_forgotten",
    ),
    Fault(
        "the worst weights stay",
        "(self.best is None or bad <= self.best[0])",
        "(self.best is None or bad >= 9)",
        "until_forgotten",
    ),
    Fault(
        "a resumed run forgets what it had kept",
        "        self.best = self._kept_before(state.global_step)\n",
        "",
        "until_forgotten",
    ),
    Fault(
        "secrets that are still known end with 0",
        'say("try", "red", line)\n        raise typer.Exit(3)',
        'say("try", "red", line)',
        "until_forgotten",
    ),
    Fault(
        "harm is not seen",
        "share = now.retain_probability / before.retain_probability",
        "share = 1.0",
        "until_forgotten",
    ),
    # kernels and operators
    Fault(
        "KL without its gradient (PyTorch)",
        "difference.sub_(rows[:, None]).mul_(p)",
        "difference.mul_(0)",
        "eager operators check_linear check",
    ),
    Fault(
        "cross-entropy's gradient misses the label",
        "torch.full_like(out[:, :1], -1.0)",
        "torch.full_like(out[:, :1], 0.0)",
        "eager operators check_linear check",
    ),
    Fault(
        "a tie goes to the highest index (PyTorch)",
        "tie_column[rank < need[tie_row]]",
        "tie_column[rank >= (ties - need)[tie_row]]",
        "eager operators",
    ),
    Fault(
        "flatten's gradient without the term of the mean",
        "off_s = -on_s.sum(-1, keepdim=True) / columns",
        "off_s = 0 * on_s[:, :1]",
        "eager operators check",
    ),
    Fault(
        "entropy without log k",
        "math.log(z_s.shape[1]) + negative_entropy[:, 0]",
        "negative_entropy[:, 0]",
        "eager operators check",
    ),
    Fault(
        "a softcap whose slope is forgotten",
        "1 - share.square()",
        "1 + 0 * share",
        "eager linear check_linear check",
    ),
    # the chunk loop
    Fault(
        "rows of a chunk's second part take the reference's first rows",
        "ref_hidden[ref_start : ref_start + count]",
        "ref_hidden[:count]",
        "linear loss_hidden",
    ),
    Fault(
        "the head's gradient misses the logit scale",
        "self.row_scale[rows] * self.logit_scale",
        "self.row_scale[rows]",
        "linear check_linear check",
    ),
    Fault(
        "the head's gradient misses the common scale of the weights",
        "weights / torch.where(common > 0, common, 1)",
        "weights",
        "linear check_linear check",
    ),
    Fault(
        "hidden gradients are not weighted by row",
        "(grad_hidden * weights[:, None])",
        "(grad_hidden * weights.mean())",
        "linear loss_hidden",
    ),
    Fault(
        "padding behind a row is left as it was",
        "whole[:, columns:] = 0",
        "whole[:, columns:] = float('nan')",
        "read_beyond",
    ),
    # labels and roles
    Fault(
        "a prefix is one token longer",
        "sensitive & (rank <= prefix_length)",
        "sensitive & (rank <= prefix_length + 1)",
        "labels loss",
    ),
    Fault(
        "the end token is forgotten too",
        "(labels >= 0) & ~is_eos & predicted",
        "(labels >= 0) & predicted",
        "labels loss",
    ),
    Fault(
        "roles are not shifted to the rows that predict them",
        "pad(self.roles(labels)[:, 1:], (0, 1), value=NONE)",
        "pad(self.roles(labels), (0, 0))",
        "loss loss_hidden",
    ),
    Fault(
        "the trainer's roles are not shifted",
        "functional.pad(roles.cpu()[:, 1:], (0, 1))",
        "functional.pad(roles.cpu(), (0, 0))",
        "objective trainer",
    ),
    # trainer
    Fault(
        "means over a micro-batch instead of the step",
        "reduce(counts.sum(0)).clamp(min=1).repeat(len(batches), 1)",
        "counts.clamp(min=1)",
        "trainer methods",
    ),
    Fault(
        "a resumed run begins its retain examples anew",
        "walked = step * self.step_rows",
        "walked = 0 * self.step_rows",
        "trainer resume",
    ),
    Fault(
        "retained tokens are taken one place early",
        'functional.pad(batch["input_ids"][:, 1:], (0, 1))',
        'batch["input_ids"]',
        "trainer objective methods",
    ),
    Fault(
        "the model stays in evaluation mode after its adapter was off",
        "module.training = mode",
        "module.training = False",
        "objective lora modeling model_checks",
    ),
    Fault(
        "the reference trains along",
        "self.model.requires_grad_(False)",
        "self.model.requires_grad_(True)",
        "objective trainer",
    ),
    Fault(
        "repeated examples count",
        "range(places.start, max(min(places.stop, self.rows), places.start))",
        "places",
        "distributed collated batches",
    ),
    # methods
    Fault(
        "NPO by the sum of the wrong sign",
        "logsigmoid(-self.beta * log_ratio)",
        "logsigmoid(self.beta * log_ratio)",
        "methods",
    ),
    Fault(
        "DPO prefers the answer to forget",
        "self.beta * (second - first)",
        "self.beta * (first - second)",
        "methods",
    ),
    Fault(
        "RMU steers at the row before the token",
        "for role in (FORGET, RETAINED)]) + 1",
        "for role in (FORGET, RETAINED)])",
        "rmu",
    ),
    Fault(
        "PDU's dual never moves",
        "max(0.0, dual + self.dual_step_size * (retain - self.retain_loss_eps))",
        "max(0.0, dual)",
        "pdu",
    ),
    # cache and checkpoints
    Fault(
        "a cache of another model is opened",
        "model_fingerprint(model) != starting_model",
        "False",
        "cache cache_faults",
    ),
    Fault(
        "a checkpoint's files are not compared with their digests",
        "check_digests(checkpoint, read_record(checkpoint))",
        "read_record(checkpoint)",
        "resume events",
    ),
    Fault(
        "masters round to the nearest",
        "round_into(parameter, master, generators[where])",
        "parameter.copy_(master)",
        "master_weights",
    ),
    # metrics
    Fault(
        "ROUGE's precision for its recall",
        '("recall", "recall")',
        '("recall", "precision")',
        "metrics tofu",
    ),
    Fault(
        "extraction strength counts from the first wrong token",
        "min(wrong[-1] + 1, len(argmax_correct) - 1)",
        "wrong[0]",
        "metrics inference evaluator tofu",
    ),
    Fault(
        "privleak against 1 instead of the retrained model",
        "100 * (ref - value) / (1 - ref + EPSILON)",
        "100 * (1 - value)",
        "metrics tofu",
    ),
    Fault(
        "an area under the curve whose ties count nothing",
        'np.searchsorted(low, high, "right")',
        'np.searchsorted(low, high, "left")',
        "metrics tofu",
    ),
    Fault(
        "min-k of the likeliest tokens",
        'np.sort(finite_numbers("log_probs", log_probs))',
        'np.sort(finite_numbers("log_probs", log_probs))[::-1]',
        "metrics tofu",
    ),
    # Triton's kernels
    Fault(
        "slices of a KL are added without their scales",
        "sum_b = exp(drop_b) * sum_b + tl.sum(exp(b), 1)",
        "sum_b += tl.sum(exp(b), 1)",
        "operators check masked_rows",
    ),
    Fault(
        "ties at the k-th largest forget what is larger",
        "low, high, _reach, above = bisect(keys",
        "above, (low, high, _r, _a) = 0, bisect(keys",
        "topk operators check",
    ),
    Fault(
        "an ignored label has a loss",
        "tl.where(counted, loss, 0.0)",
        "loss",
        "operators linear check",
    ),
    Fault(
        "a slice's logarithms are told in one number",
        "torch.where(high.isfinite(), x - high.to(x.dtype), 0).to(dtype)",
        "torch.zeros_like(high)",
        "slices",
    ),
    Fault(
        "the gradient on S goes to the neighbours",
        "lane = index + first\n",
        "lane = index + first + 1\n",
        "operators linear sparse check",
    ),
    # data
    Fault(
        "padding is attended to",
        "batch[name] = torch.zeros(shape",
        "batch[name] = torch.ones(shape",
        "data batches",
    ),
    # command line, callbacks and files
    Fault(
        "the command line does not hand on --top-k",
        "(RunOptions, LossOptions, MethodOptions, TrainingOptions)",
        "(RunOptions, MethodOptions, TrainingOptions)",
        "cli",
    ),
    Fault(
        "a run stops above the probability it is to reach",
        "if probability > args.stop_at_forget_prob:",
        "if probability < 0:",
        "events",
    ),
    Fault(
        "a flipped byte of a cache is read",
        'if file_digest(path) != record["blake2b"]:',
        "if False:",
        "cache cache_faults",
    ),
    Fault(
        "a checkpoint of another length is read",
        "path.stat().st_size != size:",
        "False:",
        "resume events",
    ),
    Fault(
        "a folder that could not be replaced is gone",
        "            os.replace(old, path)\n        raise",
        "            pass\n        raise",
        "files folders",
    ),
    Fault(
        "a finished file does not take its place",
        "        os.replace(aside, path)",
        "        pass",
        "files folders",
    ),
]


def place(repo: Path, fault: Fault) -> Path | None:
    """Return the one source file that holds the text; None where it is not in one alone."""
    sources = [p for top in ("palu", "palu_kernels") for p in (repo / top).rglob("*.py")]
    holders = [path for path in sources if fault.text in path.read_text(encoding="utf-8")]
    return holders[0] if len(holders) == 1 else None


def noticing(repo: Path, fault: Fault) -> list[Path]:
    """Return the test files that are to notice a fault, the likeliest first."""
    names = [f"test_{stem}.py" for stem in fault.tests.split()]
    return [path for name in names for path in (repo / "tests").rglob(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repo", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--control", action="store_true", help="break nothing")
    given = parser.parse_args()
    lines = []
    for fault in FAULTS:
        if given.only not in fault.name:
            continue
        found = run(given.repo.resolve(), fault, control=given.control)
        lines.append(f"{found:<12} {fault.name}")
        print(lines[-1], flush=True)
        if given.output is not None:
            given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    wanted = "NOT CAUGHT" if given.control else "caught"
    return int(any(not line.startswith(wanted) for line in lines))


def run(repo: Path, fault: Fault, *, control: bool = False) -> str:
    """Return `caught`, `NOT CAUGHT`, or `NOT FOUND` where the code has no such text."""
    path = place(repo, fault)
    if path is None:
        return "NOT FOUND"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, repo.name)
        shutil.copytree(repo, copy, ignore=shutil.ignore_patterns(".git", "__pycache__", "results"))
        target = copy / path.relative_to(repo)
        if not control:
            source = target.read_text(encoding="utf-8").replace(fault.text, fault.broken)
            target.write_text(source, encoding="utf-8")
        tests = map(str, noticing(copy, fault))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            timeout=900,
        )
    if done.returncode < 0:  # a write beyond its tensor ends the tests by a signal
        return "caught"
    return {0: "NOT CAUGHT", 1: "caught"}.get(done.returncode, f"ERROR {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
