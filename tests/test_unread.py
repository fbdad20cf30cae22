"""Every option given on a command line is used, told or refused; and every key of the schema is read by something."""

from __future__ import annotations

import ast
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hydra import compose, initialize_config_dir

from mmedexpert import schema, schema_data
from mmedexpert.checks import typed
from mmedexpert.errors import UserError
from mmedexpert.schema import Config, keys
from mmedexpert.unread import READ_BY, below, leaves, notes, parts, readers_of, swept_keys

ROOT = Path(__file__).parents[1]
DATA = {name: one for name, one in {**vars(schema_data), **vars(schema)}.items() if is_dataclass(one)}
UNREAD = {("RewardConfig", "name"), ("DebugConfig", "traceback")}  # the last by run.py's argv
# sizes of the model, settings of a step of the funnel: they go as keywords to what refuses an unknown one
BY_AS_DICT = {"ArchitectureConfig", "DuplicatesConfig", "DecontaminateConfig", "StructureConfig", "BalanceConfig"}


def told(*overrides: str, swept: tuple[str, ...] = ()) -> list[str]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return notes(typed(compose("config", overrides=list(overrides)), overrides), overrides, swept)


class Reads(ast.NodeVisitor):
    """Which fields of the schema's classes a module reads, followed through parameters and assignments."""

    def __init__(self, returns: dict[str, Any]) -> None:
        self.returns = returns  # of functions that give a part of the config
        self.types: dict[str, Any] = {}
        self.found: set[tuple[str, str]] = set()

    def type_of(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            return self.types.get(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self.returns.get(node.func.id)
        if isinstance(node, ast.Attribute):
            if node.attr in ("config",) and not is_dataclass(self.type_of(node.value)):
                return Config  # self.config
            owner = self.type_of(node.value)
            if is_dataclass(owner) and node.attr in (hints := get_type_hints(owner)):
                self.found.add((owner.__name__, node.attr))
                return next((t for t in (hints[node.attr], *get_args(hints[node.attr])) if is_dataclass(t)), None)
        return None

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = dict(self.types)
        for argument in node.args.args:
            name = ast.unparse(argument.annotation) if argument.annotation else ""
            if name in DATA:
                self.types[argument.arg] = DATA[name]
        self.generic_visit(node)
        self.types = before

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and (kind := self.type_of(value)):
                    self.types[name.id] = kind
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.type_of(node)
        self.generic_visit(node)


def read_in_source() -> set[tuple[str, str]]:
    files = [
        p
        for p in (ROOT / "src").rglob("*.py")
        if p.name not in ("schema.py", "schema_data.py", "checks.py", "unread.py")
    ]
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in [*files, ROOT / "run.py"]}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    given = {node.name: ast.unparse(node.returns) for node in functions if node.returns}
    reads = Reads({name: DATA[kind] for name, kind in given.items() if kind in DATA})
    for file, tree in trees.items():
        reads.types = {"config": Config} if file.name == "run.py" else {}
        reads.visit(tree)
    return reads.found


def test_every_key_of_the_schema_is_read_somewhere():
    """A key that is new in schema.py and that no code reads fails here."""
    wanted = {(name, field.name) for name, one in DATA.items() if name not in BY_AS_DICT for field in fields(one)}
    read = read_in_source() | {
        ("Config", "debug"),
        ("Config", "arm"),
        ("Config", "arms"),
    }  # the last two before it is typed
    # what a function reads of a server, it reads of every kind of server
    kinds = {(name, kind.__name__) for name, one in DATA.items() for kind in one.__mro__}
    read |= {(name, key) for name, kind in kinds for owner, key in read if owner == kind}
    read |= {(kind, key) for name, kind in kinds for owner, key in read if owner == name}  # and of what it comes from
    read |= {("BenchmarkConfig", "pairs")}  # of each benchmark in a loop
    read |= {("PairsConfig", part) for part in ("train", "val")}  # by name, in stages/train_judge.py
    # conf/dsa, conf/gba, conf/engine: rates, steps and sizes come with the model
    by_model = ("dsa_lr", "dsa_steps", "gba_lr", "gba_steps", "grams", "exact_merge", "eval_batch_size")
    read |= {("ModelConfig", key) for key in by_model}
    assert wanted - read == UNREAD


def test_every_key_of_the_schema_says_who_reads_it():
    """A key that is new in schema.py and stands under no prefix of the table fails here."""
    assert [key for key in keys() if not any(below(key, prefix) for prefix in READ_BY)] == []
    assert [prefix for prefix in READ_BY if prefix not in keys()] == []
    work = {
        "base",
        "pretrain",
        "data",
        "dsa",
        "gba",
        "caci",
        "search",
        "eval",
        "own",
        "benchmark",
        "report",
        "clean",
        "judge",
        "plan",
    }
    assert set().union(*READ_BY.values()) <= work


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.root=tests"], ["data.root", "data=phantom", "labelled_images"]),
        (["report.runs=[x]"], ["report.runs", "stage=report"]),
        (["stage=dsa", "plan.card=h100"], ["plan.card", "stage=plan"]),
        (["stage=dsa", "report.common=true"], ["report.common", "stage=report"]),
        (["stage=report", "gba.steps=3"], ["gba.steps", "stage=report"]),
        (["stage=report", "benchmark=slake"], ["benchmark", "report.runs"]),
        (["stage=report", "eval.split=val"], ["eval.split"]),
        (["stage=report", "protocol=robust"], ["protocol"]),
        (["model.name_or_path=tests", "pretrain.looking_steps=3"], [ "weights already"]),
        (["model.name_or_path=tests", "model.architecture.hidden_size=3"], ["hidden_size", "weights already"]),
        (["stage=pretrain", "pretrain.reading_steps=0", "pretrain.text_batch_size=3"],
         ["text_batch_size", "reading_steps=0"]),
        (["model.revision=abc"], ["model.revision", "hub"]),
        (["model=qwen2_vl_2b", "model.name_or_path=tests", "model.revision=abc"], ["model.revision", "hub"]),
        (["engine.endpoint.model=m"], ["engine.endpoint.model", "engine=openai"]),
        (["reward.judge.base_url=http://x/v1"], ["reward.judge.base_url", "reward.judge_weight", "hybrid"]),
        (["reward.judge.shows_answer=true"], ["reward.judge.shows_answer", "reward.grader=judge"]),
        (["stage=eval", "engine=openai", "engine.endpoint.model=m", "eval.models=[base]"], ["eval.models", "m"]),
        (["stage=eval", "engine=openai", "engine.endpoint.model=m", "engine.batch_size=3"], ["engine.batch_size"]),
        (["stage=eval", "engine=openai", "engine.endpoint.model=m", "model.dtype=float16"], ["model.dtype"]),
        (["stage=eval", "benchmark=slake", "eval.split=val"], ["eval.split", "own"]),
        (["stage=eval", "benchmark=slake", "eval.perspectives=vote"], ["eval.perspectives", "protocol=robust"]),
        (["stage=eval", "protocol=medevalkit", "eval.perspectives=vote"], ["eval.perspectives"]),
        (["stage=eval", "benchmark=slake", "model.system_prompt=x"], ["model.system_prompt", "protocol=robust"]),
        (["eval.llm_judge.api_key_env=KEY"], ["eval.llm_judge.api_key_env", "base_url"]),
        (["gba=outcome_only", "gba.scale=3"], ["gba.scale", "gba.weights"]),
        (["gba.weights=[0,0,0,0]", "gba.gate=none"], ["gba.gate", "gba.weights"]),
        (["gba.scale=0", "gba.gate=none"], ["gba.gate", "gba.scale=0"]),
        (["merge=none", "merge.name=x"], ["merge.name", "merge=none"]),
        (["trainer.strategy=fsdp"], ["trainer.strategy", "trainer.devices"]),
        (["logger=csv", "logger.project=x"], ["logger.project", "logger=csv"]),
        (["reward.name=x"], ["reward.name", "nothing reads"]),
        (["debug.name=x"], ["debug.name"]),
        (["stage=eval", "benchmark=slake", "benchmark.slake.root=tests", "benchmark.slake.revision=x"],
         ["benchmark.slake.revision", "benchmark.slake.root"]),
        (["eval.llm_judge={api_key_env: KEY}"], ["eval.llm_judge.api_key_env"]),  # a key within a value
        (["gba.lr=1", "gba.lr=2"], ["gba.lr=1", "gba.lr=2", "once"]),
        (["data=phantom", "data=medr1"], ["data=phantom", "data=medr1"]),
        (["reward={protocol: robust}", "reward.protocol=medevalkit"],
         ["reward.protocol=robust", "reward.protocol=medevalkit"]),
    ],
)  # fmt: skip
def test_what_nothing_reads_is_refused(overrides, words):
    with pytest.raises(UserError) as caught:
        told(*overrides)
    for word in words:
        assert word in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("overrides", "noted"),
    [
        (["stage=data", "logger=none", "eval.contamination=false", "eval.num_resamples=50", "data.limit=3"],
         ["eval.contamination", "eval.num_resamples"]),
        (["stage=dsa", "gba.steps=12", "dsa.steps=12", "trainer.threads=1"], ["gba.steps"]),
        (["stage=gba", "gba.init=base", "dsa.steps=12"], ["dsa.steps"]),
        (["stage=gba", "dsa.steps=12"], []),
        (["stage=pretrain", "model.instructions=full"], ["model.instructions"]),
        (["stage=pretrain", "dsa={steps: 3, lr: 1}", "specialty=cardiology"], ["dsa.steps", "dsa.lr", "specialty"]),
        (["stage=eval", "eval.models=[base]", "dsa.steps=12", "data.limit=9"], ["dsa.steps"]),
        (["stage=eval", "eval.models=[caci]", "dsa.steps=12", "gba.steps=3", "merge.lora_rank=3"], []),
        (["stage=eval", "benchmark=slake", "eval.contamination=false", "data.limit=9"], ["data.limit"]),
        (["stage=report", "logger=none", "debug=smoke", "trainer.accelerator=cpu", "eval.num_resamples=9", "seed=3"],
         ["trainer.accelerator"]),
        (["gba.lr=1", "gba.lr=1"], []),
        (["stage=plan", "gba=uniform", "gba.steps=3", "gba.lr=1", "trainer=ddp", "plan.card=h100", "eval.split=val"],
         ["gba.lr", "eval.split"]),
        (["data=medr1", "data.root=tests", "data.limit=3"], []),
        (["trainer=fsdp", "trainer.strategy=ddp"], []),
        (["protocol=robust", "benchmark=slake", "stage=eval", "eval.perspectives=vote"], []),
        (["benchmark=slake", "eval.split=val", "eval.perspectives=vote"], []),  # a pipeline asks its own questions, too
        (["stage=eval", "eval.models=[base]", "merge=ties", "merge.search={density: [1.0]}"],
         ["merge", "merge.search.density"]),
        (["stage=caci", "merge=ties", "merge.search={density: [1.0]}", "eval.perspectives=none"], []),
    ],
)  # fmt: skip
def test_what_other_stages_read_is_told(overrides, noted):
    assert told(*overrides) == noted


def test_a_sweep_may_hold_what_some_of_its_jobs_do_not_read():
    words = ["gba.weights=[1,1,1,1],[0,0,0,0]", "gba.scale=3", "-m"]
    swept = swept_keys(["--config-path", "/some/run", "-cn", "config", *words], None)
    assert swept == ["gba.weights"]
    assert told("gba.weights=[0,0,0,0]", "gba.scale=3", swept=tuple(swept)) == ["gba.scale"]
    assert told("gba=outcome_only", "gba.scale=3", swept=tuple(swept_keys([], {"gba": "a,b"}))) == ["gba.scale"]
    with pytest.raises(UserError, match=r"gba\.scale"):
        told("gba.weights=[0,0,0,0]", "gba.scale=3", swept=("seed",))
    with pytest.raises(UserError, match=r"data\.root"):
        told("seed=1", "data.root=tests", swept=("seed",))


def test_a_secret_in_a_repeated_option_is_not_told():
    with pytest.raises(UserError) as caught:
        told("report.out=http://me:pass@x/1", "report.out=http://me:pass@x/2", "stage=report")
    assert "pass" not in str(caught.value)


def test_what_a_command_does():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def work(*overrides: str) -> set[str]:
            return parts(typed(compose("config", overrides=list(overrides))))

        everything = {"base", "data", "dsa", "gba", "caci", "eval", "own"}
        assert work() == everything == work("stage=eval") == work("stage=eval", "eval.models=[reasoner]")
        assert work("benchmark=slake", "merge=none") == everything - {"caci"} | {"benchmark"}
        assert all(work(f"stage={name}") == {name} for name in ("report", "list", "clean", "data", "plan"))
        assert work("stage=caci", "merge=ties", "merge.search={density: [1.0]}") >= {"search", "dsa", "gba"}
        assert work("stage=eval", "benchmark=slake", "eval.contamination=false", "model.name_or_path=tests") == {
            "eval", "benchmark", "base",
        }  # fmt: skip
        served = ("stage=eval", "engine=openai", "engine.endpoint.model=m")
        assert work(*served) == {"eval", "own", "data"}


def test_prefixes_are_of_whole_keys():
    assert below("gba.lr", "gba") and below("gba", "gba") and not below("gbas.lr", "gba")
    assert readers_of("logger.project") != readers_of("logger") == ()
    assert list(leaves("a", {"b": {"c": 1}, "d": {}})) == [("a.b.c", 1), ("a.d", {})]
