"""L_meta, what meta-training descends on (LoRA Recycle, Eq. 3 and 4).

E episodes in a step, W ways, K shots, Q queries a class, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrecycle.classifier import class_means, prototype_logits
from fastrecycle.config import MetaConfig
from fastrecycle.meta_tasks import Draw, Episodes


def targets(pool_logits: Tensor, tasks: Draw | Episodes, config: MetaConfig) -> Tensor:
    """Target distribution of each query: the teacher's, or one-hot in interpolated tasks and where
    `config.target` is "label".

    KL(teacher, student) and cross-entropy differ from CE(target, student) only by the target's
    entropy, so one loss serves Eq. 3a and Eq. 4.

    Returns:
        (E, W Q, W) float32 on the device of `pool_logits`.

    """
    device = pool_logits.device
    rows, labels = (torch.as_tensor(x, device=device) for x in (tasks.rows, tasks.labels))
    queries = rows[:, :, config.shots :]
    own = (labels[:, 0] >= 0) & (config.target == "teacher")
    columns = labels.clamp_min(0)[:, None, None, :].expand(-1, config.ways, config.queries, -1)
    logits = pool_logits[queries].gather(-1, columns)  # (E, W, Q, W)
    # below 1 even where a sure teacher's softmax rounds to it: `meta_loss` knows labels by their 1
    teacher = (logits / config.temperature).softmax(-1).clamp_max(1 - torch.finfo().eps)
    one_hot = torch.eye(config.ways, device=device)[:, None].expand(-1, config.queries, -1)
    return torch.where(own[:, None, None, None], teacher, one_hot).flatten(1, 2)


def meta_loss(
    features: Tensor, target: Tensor, config: MetaConfig, text: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """L_meta, LoRA Recycle, Eq. 3 and 4, and the accuracy against the target's mode.

    Without shots, class texts stand in for prototypes: against labels this is CLIP's contrastive
    loss from images to texts, cross-entropy over scale cos(image, text).

    Args:
        features: (E, W, K + Q, F), support images first.
        target: (E, W Q, W), see `targets`.
        config: shots, distance, direction of the KL.
        text: (E, W, F), class texts, scale included; given if and only if there are no shots.

    Returns:
        loss and accuracy, scalars.

    """
    if text is not None:
        unit = torch.nn.functional.normalize(features.flatten(1, 2).to(text.dtype), dim=-1)
        logits = unit @ text.transpose(1, 2)
    else:
        support, query = features.split((config.shots, config.queries), dim=2)
        prototypes = class_means(support.flatten(1, 2), config.ways)
        logits = prototype_logits(prototypes, query.flatten(1, 2), config.distance)
    log_p = (logits / config.temperature).log_softmax(-1)
    log_target = target.clamp_min(1e-12).log()
    if config.kl == "teacher_student":
        loss = (target * (log_target - log_p)).sum(-1).mean()
    else:
        one_hot = (target.amax(-1, keepdim=True) == 1).to(target.dtype)
        reverse = (log_p.exp() * (log_p - log_target)).sum(-1, keepdim=True)
        forward = -(target * log_p).sum(-1, keepdim=True)
        # interpolated tasks have no teacher: their one-hot target takes the cross-entropy
        loss = (one_hot * forward + (1 - one_hot) * reverse).mean()
    accuracy = (logits.argmax(-1) == target.argmax(-1)).float().mean()
    return loss * config.temperature**2, accuracy
