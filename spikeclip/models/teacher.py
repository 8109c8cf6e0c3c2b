"""The frozen CLIP teacher: any open_clip model, or the small one that ships with the package."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tokenizer import Tokenizer

PRETRAINED = Path(__file__).parent / "pretrained"
DEMO_TEACHER = "spikeclip-demo-teacher"


class Teacher(nn.Module):
    """A CLIP model under one face: images in [0, 1] of any size in, features out; frozen and in eval mode.

    Attributes:
        clip: the open_clip model. tokenizer: text to its token ids. embed_dim: size of its features.
        image_size: height and width it wants; other sizes are resized bicubically.
    """

    def __init__(self, clip: nn.Module, tokenizer, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.clip = clip
        self.tokenizer = tokenizer
        size = clip.visual.image_size
        self.image_size = tuple(size) if isinstance(size, (tuple, list)) else (size, size)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def logit_scale(self) -> Tensor:
        """Log of the factor on cosines, as in CLIP."""
        return self.clip.logit_scale

    @property
    def token_embedding(self) -> Tensor:
        """[vocabulary, width], from the text tower, which open_clip keeps at one of two places."""
        return self._text_part("token_embedding").weight

    @property
    def positional_embedding(self) -> Tensor:
        """[context, width]."""
        return self._text_part("positional_embedding")

    @property
    def embed_dim(self) -> int:
        projection = self._text_part("text_projection")
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    def _text_part(self, name: str):
        owner = getattr(self.clip, "text", self.clip)
        if not hasattr(owner, name):
            raise ValueError(f"teacher must have a CLIP text tower with a {name}; {type(owner).__name__} has none")
        return getattr(owner, name)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images [B, 3, H, W], floating in [0, 1], to features [B, embed_dim]; ValueError for another shape or dtype."""
        if images.dim() != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(f"images must be floating, [B, 3, H, W] in [0, 1]; got {images.dtype}, {list(images.shape)}")
        if images.shape[-2:] != self.image_size:
            images = F.interpolate(images, self.image_size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.clip.encode_image((images - self.mean) / self.std, normalize=normalize)

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Token ids [B, L] of this teacher's tokenizer to features [B, embed_dim]."""
        return self.clip.encode_text(tokens, normalize=normalize)

    def train(self, mode: bool = True) -> Teacher:
        return super().train(mode and any(p.requires_grad for p in self.parameters()))

    def image_tower_unfrozen(self) -> Teacher:
        """A copy whose image tower can be trained, for adapting it to a task; the text tower stays frozen."""
        twin = copy.deepcopy(self)
        twin.clip.visual.requires_grad_(True)
        return twin


def load_teacher(name: str = DEMO_TEACHER, pretrained: str | None = None) -> Teacher:
    """A frozen teacher.

    Args:
        name: ``spikeclip-demo-teacher`` (in the package), an open_clip architecture such as ``ViT-B-16``, or a folder that
            holds ``open_clip_config.json`` and its weights.
        pretrained: for an architecture, open_clip's tag (``openai``, downloaded by open_clip) or a local weights file.

    Raises:
        ValueError: unknown name or tag, weights missing, unreadable or of another architecture, or ``pretrained`` for a
            teacher that comes with its weights.
    """
    import open_clip

    folder = PRETRAINED / name if name == DEMO_TEACHER else Path(name)
    if folder.is_dir():
        if pretrained is not None:
            raise ValueError(f"pretrained must be left out for {name}, which has its own weights; got {pretrained!r}")
        return _from_folder(folder)
    if name not in open_clip.list_models():
        raise ValueError(
            f"name must be {DEMO_TEACHER!r}, a folder with open_clip_config.json, or one of "
            f"open_clip.list_models(), such as 'ViT-B-16'; got {name!r}"
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None or not (pretrained in tags or Path(pretrained).is_file()):
        raise ValueError(f"pretrained must be a weights file or one of {', '.join(tags)} for {name}; got {pretrained!r}")
    clip = _created(name, pretrained)
    preprocess = clip.visual.preprocess_cfg
    return Teacher(clip, open_clip.get_tokenizer(name), preprocess["mean"], preprocess["std"])


def _created(name: str, pretrained: str | None) -> nn.Module:
    import open_clip

    try:
        return open_clip.create_model(name, pretrained=pretrained, require_pretrained=True).float()
    except (StopIteration, AttributeError) as error:  # open_clip's answers to an empty file and to one without a state dict
        raise ValueError(f"the teacher {pretrained or name} could not be loaded: it holds no weights") from error
    except Exception as error:  # open_clip, safetensors and torch each raise their own kinds for a bad file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the teacher {pretrained or name} could not be loaded: {reason}") from error


def _from_folder(folder: Path) -> Teacher:
    import open_clip

    try:
        config = json.loads((folder / "open_clip_config.json").read_text())
        mean, std = (tuple(float(value) for value in config["preprocess_cfg"][key]) for key in ("mean", "std"))
        cut = config.get("spikeclip_vocabulary")
        context_length = config["model_cfg"]["text_cfg"]["context_length"] if cut is not None else None
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the teacher folder {folder} needs a readable open_clip_config.json: {error}") from error
    clip = _created(f"local-dir:{folder}", None)
    if cut is None:
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    else:
        tokenizer = Tokenizer(context_length, cut)
    return Teacher(clip, tokenizer, mean, std)
