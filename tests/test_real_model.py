"""Real model types from a local folder: small random weights under the real tokenizer files, through every stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

MOVED = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 151936,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
IDS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "tie_word_embeddings": True,
}  # fmt: skip


def build(kind: str, folder: Path, tokenizer: Path) -> None:
    """A random model of a type, and the real tokenizer and preprocessor files beside it."""
    torch.manual_seed(0)
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=TEXT, vision_config=vision, **IDS))
    else:
        vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
                  "fullatt_block_indexes": [1]}  # fmt: skip
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=vision, **IDS))
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 151645, 151643
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if not file.name.startswith(("LICENSE", "config.3b")):
            shutil.copy(file, folder / file.name)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "config"), [("qwen2_5_vl", "qwen2_5_vl_3b"), ("qwen2_vl", "qwen2_vl_2b")])
def test_every_stage_on_a_local_folder(shared, tmp_path, kind, config):
    build(kind, tmp_path / "base", shared / "data" / "qwen_tokenizer")
    run(
        tmp_path / "out", f"model={config}", f"model.name_or_path={tmp_path / 'base'}", "model.dtype=float32",
        "model.max_new_tokens=8", "model.max_pixels=12544", "model.lora.r=4", "data.limit=6", "dsa.steps=2",
        "dsa.batch_size=2", "gba.steps=1", "specialty.names=[pediatrics,brain_sensory]", "eval.models=[base,caci]",
    )  # fmt: skip
    out = tmp_path / "out"
    assert list(out.glob("pretrain/*")) == []  # a model with weights is never pretrained
    adapters = list(out.glob("dsa/*/adapter/adapter_model.safetensors"))
    assert len(adapters) == 2
    for path in adapters:  # the language model learnt, and what it was learnt on is Qwen's own
        learnt = {name: tensor for name, tensor in load_file(path).items() if "lora_B" in name}
        assert learnt and all("visual" not in name and tensor.abs().sum() > 0 for name, tensor in learnt.items())
    for path in out.glob("eval/caci-*/predictions.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(rows) == 12 and all(row["finish_reason"] in ("stop", "length") for row in rows)
        assert all(1 <= row["tokens"] <= 8 and row["image_sha256"] != [None] for row in rows)
    merged = out / "latest" / "model"
    before, after = (AutoModelForImageTextToText.from_pretrained(folder) for folder in (tmp_path / "base", merged))
    moved = {
        n for (n, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert {name.rpartition(".layers.")[2][2:] for name in moved} == {f"{part}.weight" for part in MOVED}
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer("<|im_start|>user")["input_ids"] == [151644, 872]
