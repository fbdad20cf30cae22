"""What training and sampling hold and compute: bytes and FLOPs of one device, from the shapes alone.

Bytes follow what autograd keeps of each operation of a decoder layer (`layer_bytes`), FLOPs are those of matrix
products (a multiplication with its addition counts two). `tests/test_plan.py` holds both against what is really
allocated and counted on the tiny model, and against measured figures of a 3B and a 7B.

Units: bytes, FLOPs, seconds. T tokens of a packed row, S of them scored, P of a prompt, C of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mmedexpert.models.shapes import Linear, Shape

GIB = 2**30
LOGITS, ROWS = 2**22, 256  # of models/logps.py: logits at a time, and positions at least
PREFILL = 16_384  # of models/generate.py: tokens of prompts that are read together
SPARE = 0.1  # ours: share of what is free that `auto` leaves, for blocks that the allocator cannot join


@dataclass(frozen=True)
class Setup:
    """How a model is held and trained: bytes of an entry of its weights, of its LoRA and of what it computes."""

    shape: Shape
    rank: int
    lora: Sequence[tuple[Linear, int]]  # its layers and their parameters
    weights: int
    trained: int
    computed: int
    dropout: bool = False
    checkpointing: bool = False
    devices: int = 1
    sharded: bool = False  # FSDP2: decoder layers with their LoRA are shared out over the devices
    started: int = 0  # LoRAs that training starts from, kept beside 16-bit weights (models/lean.py)

    @property
    def sharers(self) -> int:
        """How many devices share a decoder layer."""
        return self.devices if self.sharded else 1

    @cached_property
    def lora_parameters(self) -> int:
        """Trained parameters, of all devices together."""
        return sum(count for _, count in self.lora)

    @property
    def weight_bytes(self) -> int:
        """Weights on one device, between passes."""
        shape = self.shape
        decoder = shape.decoder * self.weights
        return (shape.parameters - shape.decoder) * self.weights + -(-decoder // self.sharers)

    @property
    def gathered_bytes(self) -> int:
        """What FSDP2 holds whole in a pass: a layer, and the next that is fetched meanwhile."""
        whole = self.shape.decoder * self.weights + self.lora_parameters * self.trained
        return 2 * whole // self.shape.layers if self.sharers > 1 else 0

    @property
    def started_bytes(self) -> int:
        """The factors that RL starts from; fp32 weights take them in."""
        return self.started * self.lora_parameters * self.weights if self.weights < 4 else 0

    @property
    def lora_bytes(self) -> int:
        """The LoRA on one device."""
        return self.lora_parameters * self.trained // self.sharers

    @property
    def state_bytes(self) -> int:
        """AdamW's two moments, and a step counter of 4 bytes for each of A and B."""
        return 2 * self.lora_bytes + 4 * 2 * len(self.lora)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of the LoRA; DDP keeps a second copy in its buckets."""
        return self.lora_bytes * (2 if self.devices > 1 and not self.sharded else 1)

    def layer_bytes(self, seen: float = 2.0, mask: int = 1) -> float:
        """What autograd keeps of one decoder layer for its backward pass, a token.

        Norms keep their input in fp32 (a copy, where the input is not), attention q, k, v and its output, the MLP
        gate, up and silu(gate). A LoRA layer keeps its input; under dropout one of its own, with a mask of so many
        bytes an entry (one on CUDA). Frozen weights keep nothing. Keys and values of a shared prompt stand before those
        of each completion: `seen` for each token of the row, at most two in a group of long completions.
        """
        s, e = self.shape, self.computed
        norms = 2 * s.hidden * 4
        attention = e * (2 * s.q + 2 * seen * s.kv) + 4 * s.heads  # and log-sums of the flash kernel
        qk_norms = 4 * (s.q + s.kv) if s.kind == "qwen3_vl" else 0
        mlp = 3 * e * s.inner
        inputs = 0.0
        held = set()
        for layer, _ in self.lora[: len(self.lora) // s.layers] if self._everywhere else ():
            at = layer.name.rpartition(".")[2]
            source = {"q_proj": "first", "k_proj": "first", "v_proj": "first", "gate_proj": "second",
                      "up_proj": "second", "o_proj": "attention", "down_proj": "product"}[at]  # fmt: skip
            inputs += e * self.rank
            if self.dropout:
                inputs += (e + mask) * layer.inputs
            elif source not in held and source != "attention":  # what attention gives is kept already
                inputs += e * layer.inputs
            held.add(source)
        return norms + attention + qk_norms + mlp + inputs

    @property
    def _everywhere(self) -> bool:
        """Whether LoRA is on the same layers of every decoder layer, and nowhere else."""
        inside = all(one.name.startswith("model.language_model.layers.") for one, _ in self.lora)
        return bool(self.lora) and inside and len(self.lora) % self.shape.layers == 0

    def kept_bytes(self) -> float:
        """What is held of a token when its forward pass is over: all layers', or with checkpointing their inputs."""
        return self.shape.layers * (self.computed * self.shape.hidden if self.checkpointing else self.layer_bytes())

    def token_bytes(self) -> float:
        """The most that a training pass holds of each of its tokens: when the backward pass begins."""
        s, e = self.shape, self.computed
        flowing = 3 * e * s.inner + e * s.hidden  # gradients in the MLP: of its product by two ways, and their sum
        return self.kept_bytes() + flowing + (self.layer_bytes() if self.checkpointing else 0)

    def head_bytes(self, scored: int) -> float:
        """Logits of one block of positions: in the computed dtype, in fp32, their log-softmax, and chances."""
        rows = min(scored, max(ROWS, LOGITS // self.shape.vocab))
        return rows * self.shape.vocab * (8 + (2 * self.computed if self.computed < 4 else 0))

    def training_bytes(self, tokens: int, scored: int, passes: int) -> dict[str, float]:
        """The parts of the peak of an optimiser step whose largest pass has so many tokens.

        In a single pass the gradients appear while the activations go: the larger of the two counts.
        """
        fleeting, kept = self.token_bytes() * tokens, self.kept_bytes() * tokens
        gradients = self.gradient_bytes if passes > 1 else max(0.0, self.gradient_bytes - kept)
        return {
            "weights": self.weight_bytes + self.gathered_bytes + self.started_bytes,
            "LoRA": self.lora_bytes,
            "AdamW": self.state_bytes,
            "gradients": gradients,
            "activations": fleeting,
            # they go before the backward pass begins: what exceeds its share, and the states' gradients, which stay
            "logits": max(0.0, self.head_bytes(scored) + kept - fleeting) + scored * self.shape.hidden * self.computed,
        }

    def fitting_tokens(self, room: float) -> int:
        """The most tokens of a pass for which `room` bytes suffice, beside weights, LoRA, moments and gradients."""
        return max(0, int((room - self.head_bytes(ROWS)) / self.token_bytes()))

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.shape.kv * self.shape.layers * self.computed

    def sampling_bytes(self, prompts: int, prompt: int, rows: int, width: int, packed: int) -> dict[str, float]:
        """The parts of the peak of sampling: `rows` completions of `width` tokens behind `prompts` of `prompt` each,
        which were read as rows of `packed` tokens in all, PREFILL at a time."""
        s, e = self.shape, self.computed
        shared = self.cache_bytes * prompts * prompt
        own = self.cache_bytes * rows * cached(width)
        # while prompts are read: their keys and values a second time, and a layer's values that no one keeps
        packed = min(packed, PREFILL)
        reading = self.cache_bytes * packed + packed * (4 * e * s.inner + 10 * s.hidden)
        # logits as they come, in fp32, without the banned, as chances
        logits = rows * s.vocab * (e + 12)
        peak = max(reading, own + logits)
        return {
            "weights": self.shape.parameters * self.weights + self.started_bytes,  # FSDP2's are whole while sampling
            "LoRA": self.lora_parameters * self.trained,
            "KV of prompts": shared,
            "KV of completions": own,
            "logits": logits,
            "activations": peak - own - logits,
        }

    def image_bytes(self, images: int, tokens: int, most: float) -> float:
        """Features of the images that an encoder keeps on the device, at most so many bytes."""
        return min(most, images * tokens * self.shape.v_out * (1 + self.shape.v_deep) * self.weights)

    def forward_flops(self, tokens: int, scored: int, pairs: int) -> float:
        """Of the language model without its head; the last layer's MLP sees the scored tokens alone."""
        s, added = self.shape, self._added
        mlp = [one for one in s.language[-7:] if ".mlp." in one.name]
        spared = (tokens - scored) * sum(one.weights + added.get(one.name, 0) for one in mlp)
        weights = sum(one.weights + added.get(one.name, 0) * (1 + self.started) for one in s.language)
        return 2 * (tokens * weights - spared) + 4 * pairs * s.q * s.layers

    def backward_flops(self, tokens: int, scored: int, pairs: int) -> float:
        """Gradients of inputs, and of LoRA's weights; the first layer's input needs none. Attention 2.5 times forward:
        a flash kernel computes the scores again."""
        s, added = self.shape, self._added
        first = s.language[:3]
        mlp = [one for one in s.language[-7:] if ".mlp." in one.name]
        spared = (tokens - scored) * sum(one.weights + 2 * added.get(one.name, 0) for one in mlp)
        weights = sum(one.weights + 2 * added.get(one.name, 0) for one in s.language)
        unneeded = sum(one.weights + (self.rank * one.inputs if one.name in added else 0) for one in first)
        return 2 * (tokens * (weights - unneeded) - spared) + 10 * pairs * s.q * s.layers

    @cached_property
    def _added(self) -> dict[str, int]:
        return {one.name: count for one, count in self.lora}

    def head_flops(self, scored: int) -> float:
        """Logits, and as much for their gradient, which is formed in the same pass."""
        return 4.0 * scored * self.shape.embedding

    def step_flops(self, tokens: int, scored: int, pairs: int, again: int = 0) -> float:
        """A training pass with its head; checkpointing and `again` passes of a reference repeat the forward pass."""
        forward = self.forward_flops(tokens, scored, pairs)
        repeated = forward * (self.checkpointing + again)
        return forward + repeated + self.backward_flops(tokens, scored, pairs) + self.head_flops(scored)

    def decoding_bytes(self, prompts: int, prompt: int, rows: int, width: int) -> float:
        """Read in all token steps: weights with the head, prompts once each, and every row's own keys and values."""
        s = self.shape
        weights = (s.decoder + s.embedding) * self.weights + self.lora_parameters * self.trained
        steps = width - 1
        return steps * (weights + self.cache_bytes * prompts * prompt) + self.cache_bytes * rows * steps * width / 2

    def decoding_flops(self, prompt: int, rows: int, width: int) -> float:
        """All token steps of so many rows, with the head."""
        s = self.shape
        weights = sum(one.weights + self._added.get(one.name, 0) for one in s.language) + s.embedding
        return (width - 1) * rows * (2 * weights + 4 * (prompt + width / 2) * s.q * s.layers)

    def vision_flops(self, patches: int) -> float:
        """The tower on one image."""
        s = self.shape
        merged = ("merger", "deepstack")
        inside = sum(one.weights for one in s.vision if not any(word in one.name for word in merged))
        after = sum(one.weights for one in s.vision if any(word in one.name for word in merged))
        window = min(patches, (s.v_window // s.patch) ** 2) if s.v_window else patches
        seen = len(s.v_full) * patches + (s.v_layers - len(s.v_full)) * window
        return 2 * patches * (inside + after / s.merge**2) + 4 * patches * seen * s.v_hidden


def cached(width: int) -> int:
    """Tokens that a row's cache has room for, once `width` are sampled: the last of them is not read."""
    return max(width - 1, 1)


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: tokens of its packed row, how many are scored, pairs that attend."""

    tokens: int
    scored: int
    pairs: int


def passes(prompt: int, completion: int, rows: int, prompts: int, most: int | None) -> list[Pass]:
    """A step of `prompts` with so many `rows` each, all of one length, cut as `packing.micro_batches` cuts it."""
    own = completion - 1
    cut: list[list[int]] = []  # rows of each prompt in a pass
    room = 0
    for _ in range(prompts):
        for row in range(rows):
            shared = bool(row) and bool(cut)
            cost = own + (0 if shared else prompt)
            if not cut or (most is not None and cost > room):
                cut.append([])
                cost, room, shared = own + prompt, most or 0, False
            cut[-1] += [] if shared else [0]
            cut[-1][-1] += 1
            room -= cost
    return [
        Pass(
            sum(prompt + count * own for count in one),
            sum(one) * completion,
            sum(prompt * (prompt + 1) // 2 + count * (own * prompt + own * (own + 1) // 2) for count in one),
        )
        for one in cut
    ]
