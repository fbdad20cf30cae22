"""Cases of the merging benchmark: a Qwen2 and LoRA adapters, made by transformers and PEFT or written by size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SMALL = 0.05  # the RL adapter's size beside the others'
SHARD = 4 * 10**9


@dataclass(frozen=True)
class Case:
    """Sizes of a Qwen2 and its adapters."""

    hidden: int = 1024
    inter: int = 2816
    layers: int = 8
    heads: int = 16
    kv: int = 4
    vocab: int = 32000
    rank: int = 16
    experts: int = 5
    vision: int = 0

    def linears(self) -> dict[str, tuple[int, int]]:
        """[out, in] of every linear layer of the language model."""
        kv = self.hidden // self.heads * self.kv
        h, i = self.hidden, self.inter
        shapes = ((h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i))
        return {
            f"model.layers.{n}.{'self_attn' if name in LINEAR[:4] else 'mlp'}.{name}": shape
            for n in range(self.layers)
            for name, shape in zip(LINEAR, shapes, strict=True)
        }


def make(root: str, case: dict[str, int], full: bool) -> None:
    """The case as transformers and PEFT write it: base, lora/<name> and, if asked for, full/<name>."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    folder, c = Path(root), Case(**case)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=c.vocab, hidden_size=c.hidden, intermediate_size=c.inter, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv, max_position_embeddings=512, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "base")
    for k in range(c.experts):
        torch.manual_seed(100 + k)
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
        lora = LoraConfig(r=c.rank, lora_alpha=2 * c.rank, target_modules=list(LINEAR))
        model = get_peft_model(base, lora)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                scale = 0.02 * (SMALL if k == c.experts - 1 else 1)
                parameter.data = (torch.randn(parameter.shape) * scale).to(parameter.dtype)
        model.save_pretrained(folder / "lora" / f"e{k}")
        if full:
            model.merge_and_unload(safe_merge=True).save_pretrained(folder / "full" / f"e{k}")


def write(root: str, case: dict[str, int]) -> None:
    """A model and adapters of these sizes from one repeated block of random bf16, without a model in memory."""
    import torch
    from safetensors.torch import save_file

    folder, c = Path(root), Case(**case)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab, c.hidden)}
    shapes |= {f"{name}.weight": shape for name, shape in c.linears().items()}
    for n in range(c.vision):  # the sizes of Qwen2.5-VL's tower
        for name, shape in (("qkv", (3840, 1280)), ("proj", (1280, 1280)), ("gate", (3420, 1280)), ("up", (3420, 1280)),
                            ("down", (1280, 3420))):  # fmt: skip
            shapes[f"model.vision.{n}.{name}.weight"] = shape
    shapes["lm_head.weight"] = (c.vocab, c.hidden)
    sizes = {name: 2 * shape[0] * shape[1] for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[n] for n in shards[-1]) + sizes[name] > SHARD:
            shards.append([])
        shards[-1].append(name)
    noise = (0.02 * torch.randn(2**24, generator=torch.Generator().manual_seed(0))).bfloat16()
    block = memoryview(noise.view(torch.uint8).numpy())
    (folder / "base").mkdir(parents=True)
    (folder / "base" / "config.json").write_text("{}")
    where = {}
    for n, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{n + 1:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name in names:
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [at, at + sizes[name]]}
            at, where[name] = at + sizes[name], file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / "base" / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for start in range(0, at, len(block)):
                out.write(block[: min(len(block), at - start)])
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (folder / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    for k in range(c.experts):
        torch.manual_seed(100 + k)
        factors = {}
        for name, (rows, columns) in c.linears().items():
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(c.rank, columns) / columns**0.5
            factors[f"base_model.model.{name}.lora_B.weight"] = 0.02 * torch.randn(rows, c.rank)
        lora = folder / "lora" / f"e{k}"
        lora.mkdir(parents=True)
        save_file({name: factor.bfloat16() for name, factor in factors.items()}, lora / "adapter_model.safetensors")
        (lora / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": c.rank, "lora_alpha": 32}))


def write_grams(root: str, case: dict[str, int]) -> None:
    """For every adapter but the last a Gram matrix of each layer in the span of all factors: of 256 random inputs."""
    import torch
    from safetensors.torch import load_file, save_file

    folder, c = Path(root), Case(**case)
    factors = [load_file(path / "adapter_model.safetensors") for path in sorted((folder / "lora").iterdir())]
    for k in range(c.experts - 1):
        draw, found = torch.Generator().manual_seed(200 + k), {}
        for name in c.linears():
            stack = torch.cat([one[f"base_model.model.{name}.lora_A.weight"] for one in factors])
            seen = stack.float() @ torch.randn(stack.shape[1], 256, generator=draw)
            found[f"{name}.weight"] = seen @ seen.T
        (folder / "grams" / f"e{k}").mkdir(parents=True)
        save_file(found, folder / "grams" / f"e{k}" / "grams.safetensors")
