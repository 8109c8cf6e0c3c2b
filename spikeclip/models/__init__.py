"""SpikeCLIP's towers, configs and teacher."""

from .config import SpikeCLIPConfig, load_config
from .spikeclip import SpikeCLIP
from .teacher import Teacher, load_teacher
from .tokenizer import Tokenizer

__all__ = ["SpikeCLIP", "SpikeCLIPConfig", "Teacher", "Tokenizer", "load_config", "load_teacher"]
