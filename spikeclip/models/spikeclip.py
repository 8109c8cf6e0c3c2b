"""SpikeCLIP (arXiv 2310.06488): a spiking image tower and a spiking text tower in one feature space, with open_clip's face."""

# No `from __future__ import annotations` here: the Hub mixin reads the config's type from __init__'s signature.
import contextlib
import copy
import dataclasses
import io
import json
import math
import os
import re
import shutil
import tempfile
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from .config import SpikeCLIPConfig, load_config
from .teacher import PRETRAINED
from .text import SpikingTextEncoder
from .tokenizer import Tokenizer
from .vision import SpikingImageEncoder


class SpikeCLIP(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="spikeclip",
    tags=["spiking-neural-network", "clip"],
):
    """The student. ``visual`` and ``text`` are its towers, ``tokenizer`` makes its token ids, ``logit_scale`` is a log.

    The interface is open_clip's: ``encode_image``, ``encode_text``, ``forward``, so code written for open_clip models runs on
    it. ``save_pretrained`` and ``from_pretrained`` write and read ``model.safetensors`` and ``config.json``.
    """

    def __init__(self, config: SpikeCLIPConfig):
        super().__init__()
        self.config = config
        self.tokenizer = Tokenizer(config.text.context_length, config.text.vocabulary)
        self.visual = SpikingImageEncoder(config.vision, config.embed_dim, config.T, config.lif)
        self.text = SpikingTextEncoder(config.text, config.embed_dim, config.T, config.lif, self.tokenizer.vocab_size)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.output_dict = False
        if config.weights is not None:
            self.visual = self.visual.for_inference(config.weights)
            self.requires_grad_(False).eval()

    @classmethod
    def from_config(cls, name: str) -> "SpikeCLIP":
        """An untrained model from a named config or a JSON file. Raises ValueError when there is none."""
        return cls(load_config(name))

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] to features [B, embed_dim], of unit length if ``normalize``."""
        features = self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L] to features [B, embed_dim], of unit length if ``normalize``."""
        features = self.text(text)
        return F.normalize(features, dim=-1) if normalize else features

    def forward(self, image: Tensor | None = None, text: Tensor | None = None):
        """(image features, text features, scale), unit length, None for what was not given; a dict if ``output_dict``."""
        image_features = None if image is None else self.encode_image(image, normalize=True)
        text_features = None if text is None else self.encode_text(text, normalize=True)
        scale = self.logit_scale.exp()
        if self.output_dict:
            return {"image_features": image_features, "text_features": text_features, "logit_scale": scale}
        return image_features, text_features, scale

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """The image tower's :meth:`SpikingImageEncoder.set_grad_checkpointing`; the text tower keeps little.

        Raises ValueError for a model made for inference.
        """
        if self.config.weights is not None:
            raise ValueError("grad checkpointing is for a model that learns; this one was made for inference")
        self.visual.set_grad_checkpointing(enable)

    def for_inference(self, weights: str = "fp32") -> "SpikeCLIP":
        """A model of its own for asking alone, with :meth:`SpikingImageEncoder.for_inference` for its image tower.

        It is used, copied, saved and loaded like any other model. Later changes of this one are not seen.

        Args:
            weights: what the image tower's weights are held in, fp32, int16 or int8.

        Raises:
            ValueError: other ``weights``, or this model was made for inference itself.
        """
        if self.config.weights is not None:
            raise ValueError(f"weights can be chosen once, from a model that learns; these are {self.config.weights} already")
        model = copy.copy(self)
        model.__dict__.update({key: copy.copy(value) for key, value in vars(self).items() if isinstance(value, dict)})
        model.config = model._hub_mixin_config = dataclasses.replace(self.config, weights=weights)
        model.visual = self.visual.for_inference(weights)
        model.text, model.logit_scale = copy.deepcopy(self.text), copy.deepcopy(self.logit_scale)
        return model.requires_grad_(False).eval()

    def save_pretrained(self, save_directory: str | Path, **kwargs):
        """Write ``model.safetensors`` and ``config.json`` into a folder, whole or not at all. Raises OSError when it cannot."""
        target = Path(save_directory)
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
        try:
            result = super().save_pretrained(staging, **kwargs)
            readable = (staging / "config.json").stat().st_mode  # safetensors leaves its file to the owner alone
            for file in staging.iterdir():
                file.chmod(readable)
                os.replace(file, target / file.name)
        except SafetensorError as error:
            raise OSError(f"{target / 'model.safetensors'} could not be written: {error}") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return result

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "SpikeCLIP":
        """A trained model in eval mode: ``spikeclip-demo`` (in the package), a local folder, or a Hub repository.

        Raises:
            ValueError: none of these, a folder without a readable config or weights, or weights of another model.
        """
        given, packaged = str(pretrained_model_name_or_path), [path.parent for path in PRETRAINED.glob("*/config.json")]
        source = next((folder for folder in packaged if folder.name == given), given)
        local = Path(source).is_dir()
        if not local and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", given):
            names = ", ".join(sorted(folder.name for folder in packaged))
            raise ValueError(
                f"model must be {names}, the folder of a saved model, or a Hub repository, owner/name; got {given!r}"
            )
        for name in ("config.json", "model.safetensors") if local else ():
            if not (Path(source) / name).is_file():
                raise ValueError(f"{source} is not a saved SpikeCLIP: it has no {name}")
        try:
            if local:  # the mixin would drop keys that it does not know
                kwargs.setdefault("config", SpikeCLIPConfig.from_dict(json.loads((Path(source) / "config.json").read_text())))
            with contextlib.redirect_stdout(io.StringIO()):  # the mixin prints what it does
                return super().from_pretrained(source, **{"strict": True, **kwargs}).eval()
        except Exception as error:  # safetensors, json, torch and the Hub each raise their own kinds
            reason = textwrap.shorten(str(error), 300) or type(error).__name__
            raise ValueError(f"{source} could not be loaded as a SpikeCLIP: {reason}") from error

    @classmethod
    def _load_as_pickle(cls, model, model_file, map_location, strict):
        raise ValueError("it has no model.safetensors, and pickled weights are never read")
