"""Adapters and merged models on disk: parity with PEFT and transformers, and every refusal."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from mmedexpert.errors import UserError
from mmedexpert.merging.apply import merge_adapters, write_merged
from mmedexpert.merging.conflicts import Conflicts
from mmedexpert.merging.low_rank import core_space
from mmedexpert.merging.methods import caci, dare_linear, linear, ties
from mmedexpert.merging.rule import declare
from mmedexpert.models.adapters import LoraAdapter, check_compatible, concatenate_lora, record_base
from mmedexpert.models.checkpoint import fingerprint_base, fingerprint_model, read_checkpoint
from mmedexpert.models.deltas import apply_deltas_

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT |= {"num_key_value_heads": 1, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 14}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
VL_PROJ = "model.language_model.layers.1.mlp.up_proj.weight"


def text_model(seed: int = 0, tie: bool = True) -> PreTrainedModel:
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, tie_word_embeddings=tie))


def vl_model(config_class: type, model_class: type, vision: dict[str, int], tie: bool) -> PreTrainedModel:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tokens = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    torch.manual_seed(0)
    text = dict(**TEXT, rope_parameters=rope, tie_word_embeddings=tie)
    return model_class(config_class(text_config=text, vision_config=vision, tie_word_embeddings=tie, **tokens))


def qwen2_5_vl(tie: bool = False) -> PreTrainedModel:
    vision = VISION | {"intermediate_size": 24, "out_hidden_size": 16, "window_size": 56, "fullatt_block_indexes": [0]}
    return vl_model(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision, tie)


def qwen2_vl(tie: bool = False) -> PreTrainedModel:
    return vl_model(Qwen2VLConfig, Qwen2VLForConditionalGeneration, VISION | {"embed_dim": 16, "mlp_ratio": 2}, tie)


def save_adapter(model: PreTrainedModel, folder: Path, seed: int, **lora: Any) -> PeftModel:
    """A LoRA adapter with random factors, saved by PEFT; returns the PEFT model holding it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]} | lora)
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    peft_model.save_pretrained(folder)
    return peft_model


def peft_deltas(peft_model: PeftModel) -> dict[str, Tensor]:
    modules = peft_model.base_model.model.named_modules()
    found = {f"{name}.weight": m.get_delta_weight("default") for name, m in modules if hasattr(m, "get_delta_weight")}
    return {name: delta.detach() for name, delta in found.items()}


def logits(model: torch.nn.Module) -> Tensor:
    ids = torch.arange(3, 51).view(2, 24)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def read(file: Path) -> dict[str, Tensor]:
    """Copies, because safetensors maps the file and some tests write it anew."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def in_one(deltas: dict[str, Tensor]) -> Callable[[str], list[tuple[int, Tensor]]]:
    """Each update as one block of rows, a vector as one row."""
    return lambda name: [(0, deltas[name].reshape(1 if deltas[name].dim() < 2 else len(deltas[name]), -1))]


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    text_model().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(text_model(), tmp_path / "adapter", 1)
    return tmp_path / "adapter"


# --- adapters against PEFT -------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 9},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3}},
    "alpha_pattern": {"alpha_pattern": {"layers.1.self_attn.q_proj": 5, "up_proj": 3}},
    "everything": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}, "lora_alpha": 7},
    "all_linear": {"target_modules": "all-linear"},
}


@pytest.mark.filterwarnings("ignore:.*ank.*tabilized")
@pytest.mark.parametrize("lora", KINDS.values(), ids=KINDS)
def test_delta_equals_pefts(tmp_path: Path, lora: dict[str, Any]) -> None:
    model = save_adapter(text_model(tie=False), tmp_path / "a", 3, **lora)
    adapter, want = LoraAdapter.load(tmp_path / "a"), peft_deltas(model)
    assert set(adapter.modules) == set(want)
    for name, delta in want.items():
        assert adapter.shapes[name] == tuple(delta.shape)
        torch.testing.assert_close(adapter.delta(name), delta, rtol=0, atol=1e-7)
        a, b, scaling = adapter.factors(name)
        torch.testing.assert_close(scaling * b @ a, delta)


def test_merge_equals_merge_and_unload(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapters(base, tmp_path / "out", {"a": adapter}, {}, linear)
    want = PeftModel.from_pretrained(text_model(), adapter).merge_and_unload().state_dict()
    got = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=0, atol=1e-7)


def test_names_of_a_vision_language_adapter(tmp_path: Path) -> None:
    save_adapter(qwen2_5_vl(), tmp_path / "a", 0, target_modules=["up_proj", "qkv"])
    modules = LoraAdapter.load(tmp_path / "a").modules
    assert VL_PROJ in modules and "model.visual.blocks.0.attn.qkv.weight" in modules
    assert set(modules) <= set(qwen2_5_vl().state_dict())


def test_adapter_records(base: Path, adapter: Path, tmp_path: Path) -> None:
    loaded = LoraAdapter.load(adapter)
    assert loaded.base_fingerprint is None and len(loaded.fingerprint) == 64
    save_adapter(text_model(), tmp_path / "other", 2)
    assert LoraAdapter.load(tmp_path / "other").fingerprint != loaded.fingerprint
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="some/base")
    record_base(adapter, fingerprint_base(base))
    assert LoraAdapter.load(adapter).base == "some/base"
    assert LoraAdapter.load(adapter).base_fingerprint == fingerprint_base(base)


# --- concatenation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [text_model, qwen2_5_vl])
def test_concatenation_is_the_exact_weighted_sum(tmp_path: Path, build: Callable[[], PreTrainedModel]) -> None:
    model = build()
    model.save_pretrained(tmp_path / "base")
    lora: list[dict[str, Any]] = [
        {},
        {"r": 3, "use_rslora": True, "target_modules": ["up_proj", "v_proj"]},
        {"r": 2, "target_modules": ["q_proj", "o_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 5}},
    ]
    for i, changes in enumerate(lora):
        save_adapter(build(), tmp_path / str(i), 10 + i, **changes)
    adapters, weights = [LoraAdapter.load(tmp_path / str(i)) for i in range(3)], [0.5, -1.25, 2.0]
    concatenate_lora(adapters, weights, tmp_path / "sum")

    summed = LoraAdapter.load(tmp_path / "sum")
    want: dict[str, Tensor] = {}
    for one, weight in zip(adapters, weights, strict=True):
        for name in one.modules:
            want[name] = want.get(name, 0) + weight * one.delta(name)
    assert set(summed.modules) == set(want)
    for name, delta in want.items():
        torch.testing.assert_close(summed.delta(name), delta, rtol=1e-5, atol=1e-7)

    before = logits(model)
    apply_deltas_(model, want.items())
    through_peft = PeftModel.from_pretrained(build(), tmp_path / "sum")
    assert not torch.allclose(before, logits(model), atol=1e-3)
    torch.testing.assert_close(logits(through_peft), logits(model), rtol=1e-5, atol=1e-5)
    assert peft_deltas(through_peft).keys() == want.keys()


def test_concatenation_with_its_negative_is_a_difference(adapter: Path, tmp_path: Path) -> None:
    one = LoraAdapter.load(adapter)
    concatenate_lora([one, one], [1, -1], tmp_path / "difference")
    difference = LoraAdapter.load(tmp_path / "difference")
    assert all(difference.delta(name).abs().max() < 1e-7 for name in difference.modules)


def test_concatenation_keeps_the_base_and_refuses_two(adapter: Path, tmp_path: Path) -> None:
    save_adapter(text_model(), tmp_path / "other", 2)
    record_base(adapter, "first")
    pair = [LoraAdapter.load(adapter), LoraAdapter.load(tmp_path / "other")]
    concatenate_lora(pair, [1, 1], tmp_path / "sum")
    assert LoraAdapter.load(tmp_path / "sum").base_fingerprint == "first"
    with pytest.raises(UserError, match="exists"):
        concatenate_lora(pair, [1, 1], tmp_path / "sum")
    record_base(tmp_path / "other", "second")
    with pytest.raises(UserError, match="different bases"):
        concatenate_lora([pair[0], LoraAdapter.load(tmp_path / "other")], [1, 1], tmp_path / "sum2")
    for weights in ([1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weight"):
            concatenate_lora(pair, weights, tmp_path / "sum2")
    wide = Qwen2ForCausalLM(Qwen2Config(**TEXT | {"intermediate_size": 32}))
    save_adapter(wide, tmp_path / "wide", 2)
    with pytest.raises(UserError, match="up_proj"):
        concatenate_lora([pair[0], LoraAdapter.load(tmp_path / "wide")], [1, 1], tmp_path / "sum2")
    assert not (tmp_path / "sum2").exists()


# --- refused adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"lora_alpha": None}, "lora_alpha"),
    ],
)
def test_unsupported_adapters_are_refused(adapter: Path, changes: dict[str, Any], word: str) -> None:
    edit_json(adapter / "adapter_config.json", **changes)
    with pytest.raises(UserError, match=word):
        LoraAdapter.load(adapter)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize(
    ("lora", "word"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"target_modules": ["embed_tokens"]}, "save_embedding_layers"),
        ({"target_modules": ["lm_head"]}, "save_embedding_layers"),
    ],
)
def test_what_peft_saves_beyond_lora_factors_is_refused(tmp_path: Path, lora: dict[str, Any], word: str) -> None:
    save_adapter(text_model(tie=False), tmp_path / "a", 0, **lora)
    with pytest.raises(UserError, match=word):
        LoraAdapter.load(tmp_path / "a")


def test_broken_adapter_files_are_refused(adapter: Path, tmp_path: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole, factors = weights.read_bytes(), read(weights)
    first = next(iter(factors))
    for content in (whole[:-10], whole[:5], b""):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
            LoraAdapter.load(adapter)
    for broken in (
        {},
        {k: v for k, v in factors.items() if k != first},
        factors | {"base_model.model.lm_head.weight": torch.ones(2, 2)},
        factors | {first: torch.ones(7, 16)},
        factors | {first: torch.ones(4)},
    ):
        save_file(broken, weights)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
            LoraAdapter.load(adapter)
    weights.unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        LoraAdapter.load(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        LoraAdapter.load(adapter)
    with pytest.raises(UserError, match="nowhere"):
        LoraAdapter.load(tmp_path / "nowhere")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused_and_nothing_written(
    base: Path, adapter: Path, tmp_path: Path, bad: float
) -> None:
    weights = adapter / "adapter_model.safetensors"
    factors = read(weights)
    factors[f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight"][3, 1] = bad
    save_file(factors, weights)
    with pytest.raises(UserError, match=r"lora_B of model\.layers\.0\.self_attn\.q_proj"):
        merge_adapters(base, tmp_path / "out", {"a": adapter}, {}, linear)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]


def test_adapters_of_another_base_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    record_base(adapter, fingerprint_base(base))
    check_compatible([LoraAdapter.load(adapter)], base)
    text_model(seed=5).save_pretrained(tmp_path / "retrained")
    with pytest.raises(UserError, match="another base"):
        check_compatible([LoraAdapter.load(adapter)], tmp_path / "retrained")
    (adapter / "mmedexpert.json").unlink()
    check_compatible([LoraAdapter.load(adapter)], tmp_path / "retrained")

    Qwen2ForCausalLM(Qwen2Config(**TEXT | {"intermediate_size": 32})).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"adapter .*up_proj\.weight is \[24, 16\].*\[32, 16\]"):
        check_compatible([LoraAdapter.load(adapter)], tmp_path / "wide")
    qwen2_5_vl().save_pretrained(tmp_path / "vl")
    with pytest.raises(UserError, match=r"adapter targets model\.layers"):
        check_compatible([LoraAdapter.load(adapter)], tmp_path / "vl")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        check_compatible([LoraAdapter.load(adapter)], tmp_path)


def test_fingerprint_sees_config_and_every_byte(base: Path, tmp_path: Path) -> None:
    before = fingerprint_base(base)
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    assert fingerprint_base(copy) == before
    weights = (base / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    for place in (header, header + (len(weights) - header) // 3, len(weights) - 1):
        (copy / "model.safetensors").write_bytes(weights[:place] + bytes([weights[place] ^ 1]) + weights[place + 1 :])
        assert fingerprint_base(copy) != before, place
    (copy / "model.safetensors").write_bytes(weights)
    assert fingerprint_base(copy) == before
    edit_json(copy / "config.json", rms_norm_eps=1.0)
    assert fingerprint_base(copy) != before


def test_a_model_answers_by_its_tokenizer_template_and_image_processor_too(base: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(base, copy)
    seen = [fingerprint_model(copy)]
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        for content in ("{}", "{ }"):
            (copy / name).write_text(content)
            seen.append(fingerprint_model(copy))
    assert len(set(seen)) == len(seen) and fingerprint_base(copy) == fingerprint_base(base)
    (copy / "README.md").write_text("a card decides nothing")
    assert fingerprint_model(copy) == seen[-1]


def test_an_adapter_of_another_base_is_refused_by_the_name_it_carries(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    named = {"org/other-7B": False, f"/elsewhere/{base.name}": True, str(base): True, "": True}
    for name, fits in named.items():
        edit_json(adapter / "adapter_config.json", base_model_name_or_path=name)
        if fits:
            check_compatible([LoraAdapter.load(adapter)], base)
        else:
            with pytest.raises(UserError, match=r"trained on org/other-7B, and this base is "):
                check_compatible([LoraAdapter.load(adapter)], base)
    hub = tmp_path / "models--org--other-7B" / "snapshots" / "abc"
    shutil.copytree(base, hub)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="org/other-7B")
    check_compatible([LoraAdapter.load(adapter)], hub)


def test_an_adapters_identity_has_its_scaling(adapter: Path) -> None:
    before = LoraAdapter.load(adapter).fingerprint
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="elsewhere")
    assert LoraAdapter.load(adapter).fingerprint == before
    edit_json(adapter / "adapter_config.json", lora_alpha=77)
    assert LoraAdapter.load(adapter).fingerprint != before


# --- applying and writing --------------------------------------------------------------------------------------------


def test_apply_deltas_rounds_once() -> None:
    model = text_model().to(torch.bfloat16)
    before, delta = model.state_dict()[Q_PROJ].clone(), torch.randn(16, 16) * 1e-3
    apply_deltas_(model, [(Q_PROJ, delta)])
    assert torch.equal(model.state_dict()[Q_PROJ], (before.float() + delta).bfloat16())
    with pytest.raises(ValueError, match="no parameter nothing"):
        apply_deltas_(model, [("nothing", delta)])
    with pytest.raises(ValueError, match="delta"):
        apply_deltas_(model, [(Q_PROJ, delta[:4])])


@pytest.mark.parametrize("build", [qwen2_5_vl, qwen2_vl])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_merged_vision_language_model_loads_whole(
    tmp_path: Path, build: Callable[[bool], PreTrainedModel], tie: bool, dtype: torch.dtype
) -> None:
    model = build(tie).to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    absent = {"lm_head.weight"} if tie else set()
    assert read_checkpoint(tmp_path / "base").keys() == model.state_dict().keys() - absent
    (tmp_path / "base" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "base" / "README.md").write_text("card")
    (tmp_path / "base" / "adapter_config.json").write_text("{}")
    targets = {"model.visual.blocks.0.attn.qkv.weight", VL_PROJ, "model.language_model.norm.weight"}
    deltas = {name: 0.01 * torch.randn(model.state_dict()[name].shape) for name in targets}
    write_merged(tmp_path / "base", tmp_path / "out", deltas, in_one(deltas))

    loaded, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True, dtype=dtype)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in model.state_dict().items():
        want = (tensor.float() + deltas[name]).to(dtype) if name in deltas else tensor
        assert torch.equal(loaded.state_dict()[name], want), name
    names = {file.name for file in (tmp_path / "base").iterdir()}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names - {"README.md", "adapter_config.json"}
    assert not list(tmp_path.glob("*.partial"))


def test_files_with_the_names_in_memory_are_understood(tmp_path: Path) -> None:
    model = qwen2_5_vl()
    model.save_pretrained(tmp_path / "base")
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    assert read_checkpoint(tmp_path / "base").keys() == model.state_dict().keys()
    delta = torch.ones(24, 16)
    write_merged(tmp_path / "base", tmp_path / "out", [VL_PROJ], in_one({VL_PROJ: delta}))
    merged = read(tmp_path / "out" / "model.safetensors")
    assert torch.equal(merged[VL_PROJ], model.state_dict()[VL_PROJ] + delta)


def test_write_merged_refusals_leave_nothing(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def attempt(message: str, delta: Tensor | None = None, error: type[Exception] = UserError) -> None:
        with pytest.raises(error, match=message):
            write_merged(base, tmp_path / "out", [Q_PROJ] if delta is not None else [], in_one({Q_PROJ: delta}))
        assert [p.name for p in tmp_path.iterdir()] == ["base"]

    attempt("not finite", torch.full((16, 16), float("inf")))
    attempt("delta", torch.ones(4), ValueError)
    copyfile = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
        attempt(r"disk space for .*out, which needs \d{4,} bytes")
    with monkeypatch.context() as patch:

        def full(source: Path, target: Path) -> None:
            copyfile(source, target)
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(shutil, "copyfile", full)
        attempt(r"disk space for .*out, which needs \d{4,} bytes")
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:-1])
    attempt(r"model\.safetensors")
    (base / "model.safetensors").unlink()
    attempt(r"no model\.safetensors")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    attempt("outside")
    (base / "model.safetensors.index.json").unlink()
    save_file({Q_PROJ: torch.ones(16, 16, dtype=torch.int8)}, base / "model.safetensors")
    attempt("quantised", torch.ones(16, 16))
    (base / "model.safetensors").write_bytes(whole)

    (tmp_path / "out.partial").mkdir()  # what a killed merge leaves behind is cleared, a finished one never
    (tmp_path / "out.partial" / "junk").write_text("")
    write_merged(base, tmp_path / "out", [], in_one({}))
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == whole and not (tmp_path / "out" / "junk").exists()
    with pytest.raises(UserError, match="exists"):
        write_merged(base, tmp_path / "out", [], in_one({}))


# --- the whole merge -------------------------------------------------------------------------------------------------


def roles_of(expert: list[Tensor], reasoner: list[Tensor], name: str, first_row: int = 0) -> Tensor:
    return expert[0] + 10 * reasoner[0] + (100 if name == Q_PROJ else 0)


declare(roles_of, "roles", "place")


def test_merge_adapters_collects_by_role_with_zeros_for_the_absent(base: Path, adapter: Path, tmp_path: Path) -> None:
    save_adapter(text_model(), tmp_path / "rl", 2, target_modules=["q_proj", "v_proj"])
    conflicts = Conflicts(["expert/a", "reasoner/rl"])
    folders = {"a": adapter}, {"rl": tmp_path / "rl"}
    assert merge_adapters(base, tmp_path / "out", *folders, roles_of, conflicts=conflicts) == {}
    report = conflicts.report()
    before, after = read(base / "model.safetensors"), read(tmp_path / "out" / "model.safetensors")
    expert, reasoner = LoraAdapter.load(adapter), LoraAdapter.load(tmp_path / "rl")
    for name, tensor in before.items():
        want = tensor.clone()
        if name in expert.modules:
            want += expert.delta(name)
        if name in reasoner.modules:
            want += 10 * reasoner.delta(name)
        want += 100 if name == Q_PROJ else 0
        torch.testing.assert_close(after[name], want, rtol=0, atol=1e-5)
    assert all(isinstance(value, float) for value in report.values())
    norm = torch.stack([expert.delta(name).square().sum() for name in expert.modules]).sum().sqrt()
    assert report["expert/a/norm"] == pytest.approx(float(norm), rel=1e-5)
    assert report["sign_conflict_chance"] == 0.5 and 0.4 < report["sign_conflict_rate"] < 0.6  # only q_proj overlaps
    assert 0 < report["reasoner/rl/kept_share"] <= 1


def test_list_methods_get_experts_then_reasoners_and_absent_experts_do_not_vote(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    save_adapter(text_model(), tmp_path / "rl", 2, target_modules=["q_proj"])
    rule = partial(ties, weights=[1.0, 3.0], density=1.0)
    merge_adapters(base, tmp_path / "out", {"a": adapter}, {"rl": tmp_path / "rl"}, rule)
    before, after = read(base / "model.safetensors"), read(tmp_path / "out" / "model.safetensors")
    one, two = LoraAdapter.load(adapter), LoraAdapter.load(tmp_path / "rl")
    up = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(after[up] - before[up], one.delta(up), rtol=0, atol=1e-6)
    want = ties([one.delta(Q_PROJ), two.delta(Q_PROJ)], [1, 3], 1.0)
    torch.testing.assert_close(after[Q_PROJ] - before[Q_PROJ], want, rtol=0, atol=1e-6)

    merge_adapters(base, tmp_path / "dare", {"a": adapter}, {}, partial(dare_linear, weights=None, density=0.5))
    dropped = read(tmp_path / "dare" / "model.safetensors")[Q_PROJ] - before[Q_PROJ]
    want = dare_linear([one.delta(Q_PROJ)], None, 0.5, name=Q_PROJ)
    torch.testing.assert_close(dropped, want, rtol=0, atol=1e-6)


def test_a_merge_written_as_lora_loads_through_peft(base: Path, adapter: Path, tmp_path: Path) -> None:
    record_base(adapter, fingerprint_base(base))
    save_adapter(text_model(), tmp_path / "rl", 2, r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    folders = {"a": adapter}, {"rl": tmp_path / "rl"}
    for rule, rank in ((linear, 7), (core_space, 7), (ties_half := partial(ties, weights=None, density=0.5), 16)):
        merge_adapters(base, tmp_path / "full", *folders, rule)
        lost = merge_adapters(base, tmp_path / "lora", *folders, rule, lora_rank=rank)
        assert lost["energy_lost"] < 1e-5 and LoraAdapter.load(tmp_path / "lora").base_fingerprint
        through_peft = PeftModel.from_pretrained(text_model(), tmp_path / "lora")
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
        torch.testing.assert_close(logits(through_peft), logits(whole), rtol=1e-3, atol=1e-3)
        shutil.rmtree(tmp_path / "full")
        shutil.rmtree(tmp_path / "lora")
    lost = merge_adapters(base, tmp_path / "lora", *folders, ties_half, lora_rank=2)
    assert 0.1 < lost["energy_lost"] < 0.9 and LoraAdapter.load(tmp_path / "lora").config["r"] == 2


def test_users_mistakes_in_a_merge_are_told(base: Path, adapter: Path, tmp_path: Path) -> None:
    out, experts = tmp_path / "out", {"a": adapter}
    with pytest.raises(UserError, match="nothing to merge"):
        merge_adapters(base, out, {}, {}, linear)
    with pytest.raises(UserError, match="2 weights for 1 deltas"):
        merge_adapters(base, out, experts, {}, partial(linear, weights=[1.0, 1.0]))
    with pytest.raises(UserError, match="density"):
        merge_adapters(base, out, experts, {}, partial(ties, weights=None, density=80))
    with pytest.raises(UserError, match="sum to zero"):
        merge_adapters(base, out, experts, {"b": adapter}, partial(linear, weights=[1.0, -1.0]))
    with pytest.raises(UserError, match="lora_rank"):
        merge_adapters(base, out, experts, {"b": base}, linear, lora_rank=4)
    with pytest.raises(UserError, match="whole model"):
        merge_adapters(base, out, experts, {"b": base}, core_space)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    out.mkdir()
    for rank in (None, 4):
        with pytest.raises(UserError, match="exists"):
            merge_adapters(base, out, experts, {}, linear, lora_rank=rank)


def test_caci_of_a_vision_language_model_end_to_end(tmp_path: Path) -> None:
    qwen2_5_vl().save_pretrained(tmp_path / "base")
    for i, folder in enumerate(("heart", "brain", "rl")):
        save_adapter(qwen2_5_vl(), tmp_path / folder, i, target_modules="all-linear")
        record_base(tmp_path / folder, fingerprint_base(tmp_path / "base"))
    roles = {"expert_weights": None, "reasoner_weights": None, "expert_density": 0.8, "reasoner_density": 0.8}
    rule = partial(caci, **roles, expert_scaling=1.0, reasoner_scaling=1.0)
    experts = {name: tmp_path / name for name in ("heart", "brain")}
    conflicts = Conflicts(["heart", "brain", "rl"])
    merge_adapters(tmp_path / "base", tmp_path / "out", experts, {"rl": tmp_path / "rl"}, rule, conflicts=conflicts)
    report = conflicts.report()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    deltas = [[LoraAdapter.load(tmp_path / n).delta(VL_PROJ)] for n in ("heart", "brain", "rl")]
    want = qwen2_5_vl().state_dict()[VL_PROJ] + rule(deltas[0] + deltas[1], deltas[2])
    torch.testing.assert_close(loaded.state_dict()[VL_PROJ], want, rtol=0, atol=1e-6)
    assert 0.5 < report["sign_conflict_chance"] < 0.75  # two or three voters after the trim
    assert logits(loaded).isfinite().all()
