"""Train the small CLIP teacher that ships with spikeclip, from a seed, on seen compositions only (about 5 CPU minutes).

python scripts/train_teacher.py --out spikeclip/models/pretrained/spikeclip-demo-teacher
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save_file

from spikeclip import keep_memory
from spikeclip.models.teacher import load_teacher
from spikeclip.models.tokenizer import Tokenizer
from spikeclip.training.compositions import LABELS, SEEN, TEMPLATES, UNSEEN, caption_corpus, render

EMBED_DIM = 128
VISION = {"layers": [1, 1, 1, 1], "width": 16, "head_width": 64, "image_size": 32}
TEXT = {"context_length": 20, "width": 128, "heads": 4, "layers": 2}
MEAN, STD = [0.48, 0.48, 0.48], [0.3, 0.3, 0.3]


def batches(steps: int, seed: int, tokenizer: Tokenizer):
    """One photo of every seen pair a batch, with its full caption or a template, 8,000 pictures rendered at a time."""
    g = torch.Generator().manual_seed(seed)
    by_class = {}
    for step in range(steps):
        if step % 133 == 0:
            pictures = render(8000, seed=seed * 10_000 + step)
            by_class = {y: (pictures.labels == y).nonzero()[:, 0] for y in SEEN}
        rows = torch.stack([by_class[y][torch.randint(len(by_class[y]), (1,), generator=g)[0]] for y in SEEN])
        texts = [
            pictures.captions[i] if torch.rand(1, generator=g) < 0.5
            else TEMPLATES[int(torch.randint(2, (1,), generator=g))].format(LABELS[y])
            for i, y in zip(rows.tolist(), SEEN, strict=True)
        ]  # fmt: skip
        yield pictures.images[rows], tokenizer(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    keep_memory()
    torch.manual_seed(args.seed)

    tokenizer = Tokenizer.for_corpus(caption_corpus(), TEXT["context_length"])
    text = {**TEXT, "vocab_size": tokenizer.vocab_size}
    clip = CLIP(EMBED_DIM, VISION, text).train()
    optimizer = torch.optim.AdamW(clip.parameters(), lr=args.lr, weight_decay=0.05)
    warmup = 100
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, s / warmup) * 0.5 * (1 + math.cos(math.pi * min(1, s / args.steps))),
    )
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    target = torch.arange(len(SEEN))
    started = time.perf_counter()
    for step, (images, tokens) in enumerate(batches(args.steps, args.seed, tokenizer)):
        image_features = clip.encode_image((images - mean) / std, normalize=True)
        text_features = clip.encode_text(tokens, normalize=True)
        logits = clip.logit_scale.exp() * image_features @ text_features.T
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=math.log(100))
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} {time.perf_counter() - started:.0f} s", flush=True)

    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "model_cfg": {"embed_dim": EMBED_DIM, "vision_cfg": VISION, "text_cfg": text},
        "preprocess_cfg": {"mean": MEAN, "std": STD},
        "spikeclip_vocabulary": list(tokenizer.vocabulary),
        "training": {"seed": args.seed, "steps": args.steps, "seconds": round(time.perf_counter() - started)},
    }
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")
    weights = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    save_file({k: v.contiguous() for k, v in weights.items()}, args.out / "open_clip_model.safetensors")

    teacher = load_teacher(str(args.out))
    with torch.no_grad():
        vectors = torch.stack(
            [teacher.encode_text(tokenizer([t.format(y) for t in TEMPLATES]), normalize=True).mean(0) for y in LABELS]
        )
        for name, classes in (("seen", SEEN), ("unseen", UNSEEN)):
            pictures = render(2000, seed=987_654, classes=classes)
            top = (teacher.encode_image(pictures.images, normalize=True) @ F.normalize(vectors, dim=-1).T).argmax(-1)
            config["training"][name] = round((top == pictures.labels).float().mean().item(), 4)
            print(name, config["training"][name])
    (args.out / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()
