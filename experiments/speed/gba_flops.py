"""What the parts of a GBA step have to do: FLOPs of matrix products, from the shapes of model and tree, and bytes.

A multiplication with its addition counts two.

- forward: every linear layer of the language model (LoRA's too) on every token of the row, and for the two products of
  attention every pair of a query and a key it may see in the tree, 4 H D a pair and layer;
- backward: gradients of inputs, as much as the forward pass, through frozen and LoRA layers (without those of the first
  layer's q, k and v, whose input needs none), gradients of weights for LoRA alone, for attention twice the forward
  pass. With gradient checkpointing the part has the forward pass once more; the update's model FLOPs do not;
- head: logits of the completion tokens, and as much for the gradient, which is formed in the same pass;
- decoding: C - 1 steps of one token a row, with the head; its bytes are all weights, the prompts' keys and values once
  a prompt, and each row's own. Sampling from the logits is in its seconds alone;
- vision tower: as torch counts its operations in one run;
- image decoding has the bytes of pixels and patches, the optimizer (with clipping) those of weights and states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from mmedexpert.models.attention import Tree
from mmedexpert.models.encode import Encoder, Prompt
from mmedexpert.models.packing import Pack


@dataclass(frozen=True)
class Work:
    """What a part has to do: FLOPs of matrix products, and bytes that have to move."""

    flops: float = 0
    bytes: float = 0


def linears(module: nn.Module) -> list[nn.Linear]:
    """Its linear layers, LoRA's among them."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def pairs(tree: Tree) -> int:
    """Pairs of a query and a key it attends to."""
    lengths = tree.lengths
    return sum(
        length * sum(lengths[s] for s in tree.ancestors(n)) + length * (length + 1) // 2
        for n, length in enumerate(lengths)
    )


def reading(core: Any, tree: Tree) -> tuple[float, float]:
    """FLOPs of the language model on a row of tokens: forward and, without a second forward pass, backward."""
    language, config = core.model.language_model, core.config.get_text_config()
    tokens = sum(tree.lengths)
    layers = linears(language)
    weights = sum(layer.weight.numel() for layer in layers)
    trained = sum(layer.weight.numel() for layer in layers if layer.weight.requires_grad)
    first = language.layers[0].self_attn
    unneeded = sum(
        layer.weight.numel()
        for projection in (first.q_proj, first.k_proj, first.v_proj)
        for layer in linears(projection)
        if layer.in_features == config.hidden_size  # the layer itself and LoRA's A
    )
    attention = 4 * pairs(tree) * config.hidden_size * config.num_hidden_layers
    return 2 * tokens * weights + attention, 2 * tokens * (weights + trained - unneeded) + 2 * attention


def decoding(core: Any, lengths: Sequence[int], num_generations: int, max_new_tokens: int) -> Work:
    """C - 1 steps of G rows for each of the prompts with these lengths."""
    language, config = core.model.language_model, core.config.get_text_config()
    rows, steps = len(lengths) * num_generations, max_new_tokens - 1
    own = steps * (steps + 1) // 2  # tokens of its own that a row reads in all steps
    read = [core.lm_head, *linears(language)]
    key = language.layers[0].self_attn.k_proj.out_features * config.num_hidden_layers * core.dtype.itemsize
    seen = steps * num_generations * sum(lengths) + rows * own
    return Work(
        2 * rows * steps * sum(layer.weight.numel() for layer in read)
        + 2 * len(lengths) * core.lm_head.weight.numel()  # the first tokens, behind the prompts
        + 4 * seen * config.hidden_size * config.num_hidden_layers,
        steps * sum(layer.weight.nbytes for layer in read) + 2 * key * (steps * sum(lengths) + rows * own),
    )


def work(
    core: Any,
    prompts: Sequence[Prompt],
    prompt_tree: Tree,
    packed: Pack,
    *,
    num_generations: int,
    max_new_tokens: int,
    vision: float,
    gradient_checkpointing: bool,
) -> dict[str, Work]:
    """What each part of a step has to do; `vision` is the tower's FLOPs for the image of one prompt."""
    forward, backward = reading(core, packed.inputs["tree"])
    again = forward if gradient_checkpointing else 0
    patches = sum(int(image.grid.prod()) for prompt in prompts for image in prompt.images)
    channels = core.model.visual.patch_embed.proj.weight[0].numel()
    states = sum(p.numel() * p.element_size() for p in core.parameters() if p.requires_grad)
    return {
        "images": Work(
            bytes=patches * channels * (4 + 0.5)
        ),  # fp32; the pixels are bytes, and a patch holds them twice
        "vision tower": Work(vision * len(prompts)),
        "prefill": Work(reading(core, prompt_tree)[0]),
        "decoding": decoding(core, [len(prompt.input_ids) for prompt in prompts], num_generations, max_new_tokens),
        "forward": Work(forward),
        "head": Work(4 * len(packed.targets) * core.lm_head.weight.numel()),
        "backward": Work(backward + again),
        # reads weights, gradients and two moments, writes all but the gradients; clipping reads these twice and writes
        "optimizer": Work(bytes=(7 + 3) * states),
    }


def vision_flops(core: Any, encoder: Encoder, image: Path) -> float:
    """The vision tower on one image, as torch counts it."""
    on_cpu = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    }
    prompt = encoder.chat("", [encoder.image(image)])
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        encoder.encode_images(core, [prompt])
    return counter.get_total_flops()
