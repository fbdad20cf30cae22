"""`stage=eval`: models on the same questions, of the own data set or of benchmarks; one folder per model and set."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from PIL import Image

from mmedexpert import metrics, scoring, stats, summary
from mmedexpert.benchmarks import medevalkit, robust
from mmedexpert.benchmarks.llm_judge import LLMJudge
from mmedexpert.engines.asking import Engine
from mmedexpert.engines.openai import OpenAIEngine
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.errors import UserError, suggestion
from mmedexpert.evaluate import Prediction, QuestionSet, judge_again, majority_engine, predict
from mmedexpert.merging.adapters import LoraAdapter, check_compatible
from mmedexpert.merging.checkpoint import fingerprint_base
from mmedexpert.modules.backbone import load_encoder, load_model, streamline
from mmedexpert.names import BASELINES, MULTI_TASK, trained_names
from mmedexpert.ranks import rank
from mmedexpert.runs import Run, write_json
from mmedexpert.schema import Config, EndpointConfig
from mmedexpert.stages import benchmark, caci, dsa, gba
from mmedexpert.stages.common import loading, model_key, records_of, stage_logger, stage_run
from mmedexpert.stages.contamination import clean_part
from mmedexpert.stages.data import dataset
from mmedexpert.stages.pretrain import base_of
from mmedexpert.summary import Summary
from mmedexpert.tracking import log_metrics


@dataclass(frozen=True)
class Subject:
    """What is asked: a model folder with or without an adapter, a served model, or a baseline."""

    name: str
    identity: str
    folder: Path | None = None
    adapter: Path | None = None
    blank: bool = False


@dataclass(frozen=True)
class Asked:
    """A question set, the run it comes from, and its identity (which follows its content)."""

    questions: QuestionSet
    source: Run
    identity: str
    left_out: int
    specialties: list[str]
    public: bool


def run(config: Config) -> dict[str, Run]:
    """Evaluate the models of `eval.models` on the benchmarks of the config, without any on the own data set."""
    subjects = subjects_of(config)
    if not config.benchmark:
        own = _own(config)
        return {subject.name: _evaluate(config, subject, own) for subject in subjects}
    sets = []
    for one in config.benchmark.values():  # every benchmark is read before the first question is asked
        source = benchmark.prepared(config, one)
        notes = source.manifest
        questions, left_out = benchmark.question_set(one, source), len(notes["left_out"])
        sets.append(Asked(questions, source, notes["data_fingerprint"], left_out, ["all"], public=True))
    return {f"{asked.questions.name}/{s.name}": _evaluate(config, s, asked) for asked in sets for s in subjects}


def _own(config: Config) -> Asked:
    data, names = dataset(config), config.specialty.names
    records, image_root = records_of(data, config.eval.split, names)
    name = f"{data.name}-{config.eval.split}"
    questions = QuestionSet(name, records, image_root, medevalkit.ask, medevalkit.judge)
    return Asked(questions, data, data.run_id, 0, names, public=False)


def subjects_of(config: Config) -> list[Subject]:
    """The models to ask, by name or folder; those of the pipeline are trained first where they are not there yet."""
    if config.engine.name == "openai":
        model = config.engine.endpoint.model
        assert model is not None  # checks.check
        return [Subject(Path(model).name, f"served:{model}")]
    wanted = config.eval.models
    if wanted is None and config.benchmark:
        wanted = ["base"]
    base = base_of(config)
    if config.benchmark and "majority" in (wanted or []):
        raise UserError("eval.models: majority is a column of every benchmark table; leave it out")
    known: dict[str, Subject] = {"base": Subject("base", base.identity, base.folder)}
    if wanted is None or {*trained_names(config), MULTI_TASK} & set(wanted):
        for name, r in {**dsa.run(config), **gba.run(config)}.items():
            known[name] = Subject(name, r.run_id, base.folder, r.folder / "adapter")
        known |= {name: Subject(name, r.run_id, r.folder / "model") for name, r in caci.run(config).items()}
        if MULTI_TASK in (wanted or []):  # what merging must approach; gba.init=sft_all starts from the same
            r = dsa.expert(config, "all", config.specialty.names)
            known[MULTI_TASK] = Subject(MULTI_TASK, r.run_id, base.folder, r.folder / "adapter")
    for name in wanted or []:
        if Path(name).is_dir() and name not in known:
            known[name] = _from_folder(Path(name), base.folder)
    chosen = [name for name in wanted or known if name not in BASELINES]
    for name in chosen:
        if name not in known:
            options = [*known, MULTI_TASK, *BASELINES]
            raise UserError(
                f"eval.models: {name!r} is neither a folder nor a model of this pipeline{suggestion(name, options)}"
            )
    subjects = [known[name] for name in chosen]
    last = (subjects or [known["base"]])[-1]
    if wanted is None or "majority" in wanted:
        subjects.append(Subject("majority", "majority"))
    if wanted is None or "blank_image" in wanted:
        subjects.append(Subject("blank_image", f"blank:{last.identity}", last.folder, last.adapter, blank=True))
    return subjects


def _from_folder(folder: Path, base: Path) -> Subject:
    """A merged or adapter run, a PEFT folder or a model folder."""
    inner = next((folder / part for part in ("model", "adapter") if (folder / part).is_dir()), folder)
    name = folder.name if inner == folder else folder.name.rpartition("-")[0]
    if not (inner / "adapter_config.json").is_file():
        return Subject(name, fingerprint_base(inner), inner)
    adapter = LoraAdapter.load(inner)
    check_compatible([adapter], base)
    return Subject(name, adapter.fingerprint, base, inner)


def _evaluate(config: Config, subject: Subject, asked: Asked) -> Run:
    """One model's run on one question set; judged anew, without asking, where the rules or settings changed since."""
    settings, questions = config.eval, asked.questions
    protocol = settings.protocol if settings.protocol != "auto" else ("medevalkit" if asked.public else "robust")
    key: dict[str, Any] = {
        "ask": questions.ask.__module__ if protocol == "medevalkit" else settings.perspectives,
        "split": settings.split if not asked.public else "",
        "specialties": asked.specialties,
        "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
        "engine": config.engine.name,
    }
    data = dataset(config) if settings.contamination or subject.name == "majority" else None

    def summarise(run: Run, rows: list[Prediction]) -> dict[str, float]:
        overlap = clean_part(config, data, questions, asked.identity) if data and settings.contamination else None
        numbers = Summary(num_resamples=settings.num_resamples, seed=config.seed)
        found = numbers.of(
            rows, questions.records, protocol=protocol, specialties=asked.specialties,
            breakdowns=questions.breakdowns, clean=set(overlap["clean"]) if overlap else None,
        )  # fmt: skip
        if settings.llm_judge.base_url is not None:
            found["llm_judge"] = _second_opinion(config, questions, rows, numbers)
        found["question_set"] = {
            "name": questions.name, "source": sorted({r.source for r in questions.records}), "left_out": asked.left_out,
            "folder": str(asked.source.folder), "public": asked.public,
            "own_training_part": asked.source.manifest.get("own_training_part"),
        }  # fmt: skip
        found["contamination"] = overlap["found"] if overlap else None
        found["judged_by"] = _rules(config, questions)
        write_json(run.folder / "summary.json", found)
        return flatten(found)

    def work(run: Run) -> dict[str, float]:
        blank = run.folder / "blank.png" if subject.blank else None
        if blank is not None:
            Image.new("RGB", (112, 112), (128, 128, 128)).save(blank)
        with run.phase("ask"):
            rows = predict(
                _engine(config, subject, questions, protocol), questions, run.folder / "predictions.jsonl",
                protocol=protocol, title=f"{subject.name} {questions.name}",
                perspectives="none" if subject.name == "majority" else settings.perspectives, blank=blank,
            )  # fmt: skip
        with run.phase("summarise"):
            flat = summarise(run, rows)
        if config.stage.name == "eval":  # a pipeline logs all its models in one place
            with stage_logger(config, run) as logger:
                log_metrics(logger, {f"eval/{name}": value for name, value in flat.items()})
        return flat

    inputs = {"questions": asked.identity, "model": subject.identity}
    done = stage_run(config, "eval", f"{subject.name}-{questions.name}", key, work, inputs)
    if rank() == 0 and done.reused and done.summary["judged_by"] != _rules(config, questions):
        rows = judge_again(done.folder / "predictions.jsonl", questions)
        write_json(done.folder / "metrics.json", summarise(done, rows))
    return done


def _engine(config: Config, subject: Subject, questions: QuestionSet, protocol: str) -> Engine:
    if subject.name == "majority":
        train, _ = records_of(dataset(config), "train", config.specialty.names)
        return majority_engine(train, questions.records)
    system_prompt = None if protocol == "medevalkit" else config.model.system_prompt
    if subject.folder is None:
        return _served(config.engine.endpoint, system_prompt or "", config.model.max_new_tokens)
    encoder, model = load_encoder(subject.folder, loading(config)), load_model(subject.folder, loading(config))
    encoder.system_prompt = system_prompt
    answering = PeftModel.from_pretrained(model, subject.adapter) if subject.adapter else model
    streamline(answering)
    return TransformersEngine(
        answering.requires_grad_(False), encoder, batch_size=config.engine.batch_size,
        max_new_tokens=config.model.max_new_tokens,
    )  # fmt: skip


def _served(endpoint: EndpointConfig, system_prompt: str, max_new_tokens: int) -> OpenAIEngine:
    assert endpoint.base_url is not None and endpoint.model is not None  # checks.check
    variable = endpoint.api_key_env
    if variable is not None and not os.environ.get(variable):
        raise UserError(
            f"the environment variable {variable} (api_key_env) is empty: export it, or set api_key_env=null"
        )
    return OpenAIEngine(
        endpoint.base_url, endpoint.model, api_key=os.environ[variable] if variable else None,
        system_prompt=system_prompt, max_new_tokens=max_new_tokens, concurrency=endpoint.concurrency,
        timeout_s=endpoint.timeout_s, retries=endpoint.retries,
    )  # fmt: skip


def _second_opinion(
    config: Config, questions: QuestionSet, rows: list[Prediction], numbers: Summary
) -> dict[str, float]:
    """An LLM judge's accuracy on the open answers."""
    endpoint, record_of = config.eval.llm_judge, {record.id: record for record in questions.records}
    judge = LLMJudge(_served(endpoint, "", 256), Path(config.paths.outputs) / "llm_judge.jsonl")
    open_rows = [row for row in rows if row["kind"] == "open"]
    right = judge.judge([(record_of[row["id"]], row["response"]) for row in open_rows])
    judged = [row for row in open_rows if row["id"] in right]
    return numbers.mean([float(right[row["id"]]) for row in judged], judged) if judged else {}


def _rules(config: Config, questions: QuestionSet) -> str:
    """What verdicts and numbers depend on beside the replies: the code of the rules and the settings."""
    modules = [scoring, robust, medevalkit, metrics, stats, summary, inspect.getmodule(questions.judge)]
    code = "".join(inspect.getsource(module) for module in modules if module is not None)
    settings = asdict(config.eval)
    text = code + json.dumps({k: settings[k] for k in ("num_resamples", "contamination", "llm_judge")})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names joined by slashes; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            flat[f"{prefix}{key}"] = float(value)
    return flat
