"""TernaryTrainer trains a student on transformers.Trainer, with phases, losses by name and verified checkpoints."""

from ti_fx.train.chain import trainers
from ti_fx.train.checkpoint import load
from ti_fx.train.model import TernaryModel
from ti_fx.train.trainer import TernaryTrainer

__all__ = ["TernaryModel", "TernaryTrainer", "load", "trainers"]
