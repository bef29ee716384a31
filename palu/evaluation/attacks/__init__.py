"""Attacks on a model that was made to forget: what still comes out, and how hard one must try."""

from palu.evaluation.attacks.run import run_attacks
from palu.evaluation.attacks.settings import NAMES, AttackSettings
from palu.evaluation.attacks.table import attack_table

__all__ = ["NAMES", "AttackSettings", "attack_table", "run_attacks"]
