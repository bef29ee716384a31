"""The operator that docs/kernels.md adds, held to the accuracy rule.

`python -m tests.support.new_operator FOLDER`: FOLDER gets a copy of `palu_kernels` with the page's
blocks put in. It is a process of its own, since the copy stands in the package's place.
"""

import re
import shutil
import sys
from pathlib import Path

from tests.support import ROOT


def apply(folder: Path) -> None:
    """Put in the page's blocks: a whole file, lines at a file's end, or changed lines."""
    shutil.copytree(ROOT / "palu_kernels", folder / "palu_kernels")
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for kind, block in re.findall(r"^```(py|diff)\n(.*?)^```", page, re.S | re.M):
        head, _, body = block.partition("\n")
        file = folder / head.split()[-1]
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if kind == "py":
            text += body
        else:
            lines = body.splitlines(keepends=True)
            old, new = ("".join(x[1:] for x in lines if x[0] != skip) for skip in "+-")
            assert text.count(old) == 1, f"{file.name} has changed: docs/kernels.md does not fit"
            text = text.replace(old, new)
        file.write_text(text, encoding="utf-8")


def check() -> None:
    """The accuracy rule on both backends; the op as PyTorch tests it; on hidden states."""
    import torch  # here, as the copy is there only now

    from palu_kernels import LMHead, logits_op, reference, roles, row_loss, z_loss
    from palu_kernels.check.__main__ import cases, compare

    chosen = [case for case in cases(quick=True) if case.operator == "z_loss"]
    assert len(chosen) > 6
    for case in chosen:
        for backend in ("torch", "triton"):
            for result in compare(case, torch.device("cpu"), backend):
                assert result.passed, (backend, result)
    logits = torch.randn(2, 3, 33, requires_grad=True)
    for backend in ("torch", "triton"):
        options = (None, None, row_loss.encode([row_loss.ZLoss()]), "mean", backend)
        torch.library.opcheck(logits_op.logits_loss, (logits, *options))
    right = reference.z_loss(logits.reshape(-1, 33)).mean()
    torch.testing.assert_close(z_loss(logits), right)

    hidden = torch.randn(2, 3, 8, requires_grad=True)
    head = LMHead(torch.randn(33, 8), softcap=5.0)
    kinds = torch.tensor([[0, 1, 1], [1, 0, 1]])
    total, _ = roles.linear_role_losses(hidden, head, kinds, [row_loss.ZLoss()], torch.ones(1))
    exact = reference.z_loss(head.logits(hidden[kinds == 1])).sum()
    torch.testing.assert_close(total, exact)
    found, right = (torch.autograd.grad(loss, hidden)[0] for loss in (total, exact))
    torch.testing.assert_close(found, right)


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    apply(Path(sys.argv[1]))
    check()
