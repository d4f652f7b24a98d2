"""Model cards of the demo backbone and prior. Part of `train_demo_backbone.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from demo_views import TEACHER_SIDE

if TYPE_CHECKING:
    from train_demo_backbone import Options


LICENCE = """## Licence and use

The weights derive from ImageNet images (Tiny-ImageNet), whose terms allow non-commercial research
only: use the weights for research and teaching. The code that made them is Apache-2.0.{teacher}
"""


def backbone_card(result: dict[str, Any], options: Options) -> str:
    """Model card of a backbone."""

    def score(name: str) -> str:
        return f"{result[name]:.1f} +- {result[name + '_ci95']:.1f}"

    test = "not measured in this run"
    if "test_nn1" in result:
        test = f"{score('test_nn1')} / {score('test_nn5')}"
    start = {
        "random": "Random initial weights.",
        "teacher": "Initial weights: the teacher's, patch embedding and positions resampled.",
    }[options.init]
    share = result["reduced_resolution"]
    return f"""# fastrecycle demo backbone

A vision transformer for 64x64 images: 12 blocks, width 192, 3 heads, patches of 8x8, CLS token,
5.4 M parameters, stored as fp16. Its feature is the CLS token after the last LayerNorm.

## Training

- Data: Tiny-ImageNet (64x64 ImageNet photographs with labels), 178 classes, 135 images each, 2 %
  held out. The 22 classes that resemble a validation or test class of CIFAR-FS were left out.
- Teacher: ViT-Ti/16 (AugReg, timm's `vit_tiny_patch16_224`, Apache-2.0), which was itself trained
  on ImageNet with labels of 1000 classes, among them classes like CIFAR-FS's test classes.
  Its features and class probabilities are targets, so results are not those of a model that has
  only seen 178 classes. {start}
- Recipe: {options.views} augmented views of each image (resized crops of {options.crop:g} to 1 of
  the area, flip, colour jitter; half of them mixed by mixup or cutmix), seen by the teacher at
  {TEACHER_SIDE} px; loss {options.feature_weight:g} x squared feature distance over the feature's
  variance + {options.kl_weight:g} x KL + {options.label_weight:g} x cross-entropy (label smoothing
  {options.label_smoothing:g}). {100 * share:.0f} % of each batch at a reduced resolution of 16 to
  48 px. AdamW, peak rate {options.learning_rate:g}, weight decay {options.weight_decay:g}, batch
  {options.batch}, drop path {options.drop_path:g}, weights averaged with decay {options.ema:g},
  bf16.
- Seed {options.seed}, {result["steps"]} steps, {result["seconds"]:.0f} s on {result["device"]}
  (torch {torch.__version__}). Script: `examples/train_demo_backbone.py`.

## Accuracy

Nearest class centre, Euclidean, 600 5-way tasks with 15 queries a class, 95 % intervals, percent.

| | 1-shot / 5-shot |
|---|---|
| CIFAR-FS validation classes (used to choose) | {score("val_nn1")} / {score("val_nn5")} |
| the same shrunk to 16 px, 1-shot | {score("val_nn1_16px")} |
| CIFAR-FS test classes | {test} |

Classifier trained along, on held-out Tiny-ImageNet: {result["linear"]:.1f} %
({result["linear_32px"]:.1f} % at 32 px).

## Intended use, limitations

A small backbone for demonstrations and tests of LoRA Recycle on a CPU. It knows small photographs
of everyday objects; it is no general feature extractor, has not been examined for bias, and must
not be used to identify people or to decide anything about them.

{LICENCE.format(teacher=" The teacher's weights are Apache-2.0.")}"""


def prior_card(result: dict[str, Any], options: Options) -> str:
    """Model card of the prior."""
    return f"""# fastrecycle demo prior

A small BatchNorm ResNet (basic blocks {options.prior_blocks}, 32-64-128 channels, stem 3x3 of
stride 2, {result["parameters"]} parameters) for 64x64 images, without its classifier. LoRA
Inversion compares the moments of synthetic images with its BatchNorm statistics (R_BN).

## Training

- Data: Tiny-ImageNet, 178 classes, 135 images each, 2 % held out (see the backbone's card).
- Cross-entropy with label smoothing {options.label_smoothing:g} on augmented views (resized crops,
  flips, shifts, colour jitter), AdamW, bf16; seed {options.seed}, {result["steps"]} steps,
  {result["seconds"]:.0f} s.
- Weights are fp16. BatchNorm statistics (fp32) are the mean and biased variance over all
  {result["images"]} training images without augmentation, measured in inference mode layer by
  layer with the rounded weights.
- Top-1 accuracy on the held-out images: {result["accuracy"]:.1f} %.

## Intended use, limitations

A prior for synthesising small photographs. Its classifier was only a means and is not included.

{LICENCE.format(teacher="")}"""
