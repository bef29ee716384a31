"""What came of a run: are the secrets forgotten, is the rest kept, and what is to be changed."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from palu.training.knowledge import Knowledge

NEVER_KNOWN = (
    "the original did not know the secrets either: another model, or another chat template, than "
    "the one that was trained on them?"
)


@dataclass(frozen=True)
class Limits:
    """When a run is good.

    Attributes:
        leak_rate: share of the secrets that greedy answers may say.
        sensitive_probability: see `Knowledge`, at most.
        retain_kept: share of the original's retain probability, at least.
    """

    leak_rate: float = 0.05
    sensitive_probability: float = 0.1
    retain_kept: float = 0.95

    def badness(self, now: Knowledge, before: Knowledge) -> tuple[float, float, float]:
        """Return probability, recited spans and harm, each over its limit: at most 1 is good."""
        recited = now.recited / max(now.spans, 1) / self.leak_rate
        return (
            now.sensitive_probability / self.sensitive_probability,
            recited,
            (1 - kept(now, before)) / (1 - self.retain_kept),
        )


def is_known(now: Knowledge, leaked: tuple[int, int] | None, limits: Limits) -> bool:
    """Return whether a model knows the secrets; `leaked` as in `RunOutcome`."""
    said, asked = leaked or (now.recited, now.spans)
    # not `>`: what cannot be measured (NaN) is not forgotten
    unlikely = now.sensitive_probability <= limits.sensitive_probability
    return not unlikely or said > limits.leak_rate * asked


def kept(now: Knowledge, before: Knowledge) -> float:
    """Return the share of the retain probability that is left; 1 without a retain set."""
    if now.retain_probability is None or not before.retain_probability:
        return 1.0
    share = now.retain_probability / before.retain_probability
    return 0.0 if math.isnan(share) else share  # of a model that has no numbers nothing is left


@dataclass
class RunOutcome:
    """What a model knew and knows, and what follows.

    Attributes:
        before, after: see `Knowledge`.
        leaked_before, leaked: secrets in greedy answers and how many were asked for, or None.
        checks: what was measured on the way, one dict a check.
        chosen_epoch: the epoch whose weights were kept.
    """

    before: Knowledge
    after: Knowledge
    leaked_before: tuple[int, int] | None
    leaked: tuple[int, int] | None
    checks: list[dict[str, Any]]
    chosen_epoch: float
    limits: Limits = field(default_factory=Limits)

    @property
    def known(self) -> bool:
        """Return whether the secrets are still known."""
        return is_known(self.after, self.leaked, self.limits)

    @property
    def harmed(self) -> bool:
        """Return whether the retain set lost more than it may."""
        return kept(self.after, self.before) < self.limits.retain_kept

    @property
    def status(self) -> str:
        """Return `forgotten`, `known`, `harmed`, `known and harmed`; `not measured` where there was
        no secret to ask for."""
        if not self.before.spans:
            return "not measured"
        names = [name for name in ("known", "harmed") if getattr(self, name)]
        return " and ".join(names) or "forgotten"

    def reasons(self) -> list[str]:
        """Return what was measured against each limit, in sentences."""
        limits, after = self.limits, self.after
        if not self.before.spans:
            return ["no secret could be asked for: the text before each span says it already"]
        said, asked = self.leaked or (after.recited, after.spans)
        how = "greedy answers say" if self.leaked else "the model recites"
        lines = [
            f"{how} {said} of {asked} secrets (at most {limits.leak_rate:.0%})",
            f"probability of sensitive tokens {self.before.sensitive_probability:.3f} -> "
            f"{after.sensitive_probability:.3f} (at most {limits.sensitive_probability})",
        ]
        if not is_known(self.before, self.leaked_before, limits):
            lines.append(NEVER_KNOWN)
        if after.past_prefix_probability is not None:
            lines.append(
                f"past the prefix, which is not trained, {after.past_prefix_probability:.3f}: that "
                "is known to whoever has the first tokens"
            )
        if after.retain_probability is None:
            lines.append("nothing was retained, so what was harmed is not known")
        else:
            lines.append(
                f"retain probability {self.before.retain_probability:.3f} -> "
                f"{after.retain_probability:.3f}, {kept(after, self.before):.1%} of it kept (at "
                f"least {limits.retain_kept:.0%})"
            )
        return lines

    def advice(self, settings: Any) -> list[str]:
        """Return what to change; nothing where all is well.

        Args:
            settings: the run's `PALUConfig`.
        """
        if not self.before.spans:
            return ["give records whose questions do not say what is to be forgotten"]
        rate, weight = settings.learning_rate, settings.forget_weight
        if self.known and self.harmed:
            return [
                "give more --retain examples (or a larger --retain-batch-size), and train longer "
                f"(--epochs) at half the --learning-rate ({rate / 2:.2g})"
            ]
        if self.known:
            lines = [
                f"train longer (--epochs) or with twice the --learning-rate ({2 * rate:.2g}) or "
                f"--forget-weight ({2 * weight:.2g})"
            ]
            if settings.method == "palu" and settings.prefix_length > 0:
                lines.append("--prefix-length 0 forgets whole spans")
            return lines
        if self.harmed:
            return [
                f"half the --learning-rate ({rate / 2:.2g}) or --forget-weight ({weight / 2:.2g}), "
                "or more --retain examples, or a larger --retain-batch-size"
            ]
        return []

    def to_dict(self, settings: Any) -> dict[str, Any]:
        """Return what `palu.json` keeps."""
        return {
            "status": self.status,
            "reasons": self.reasons(),
            "advice": self.advice(settings),
            "limits": asdict(self.limits),
            "before": _numbers(self.before, self.leaked_before),
            "after": _numbers(self.after, self.leaked),
            "checks": self.checks,
            "chosen_epoch": self.chosen_epoch,
        }


def _numbers(known: Knowledge, leaked: tuple[int, int] | None) -> dict[str, Any]:
    said, asked = leaked or (None, None)
    return {**known._asdict(), "leaked": said, "asked": asked}
