"""`stage=eval benchmark=med_rewardbench` and other pairs of answers: models as judges, beside those without a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmedexpert.data.pairs import Pair, group_mark, pair_of
from mmedexpert.data.records import fingerprint, load_records
from mmedexpert.errors import UserError
from mmedexpert.evaluation.comparison import PAIRED_RESAMPLES
from mmedexpert.evaluation.stats import holm, paired_cluster_bootstrap
from mmedexpert.guidelines.rubrics import DATA
from mmedexpert.judging.ask import COLUMNS, FILE, Judgement, asks_of, controlled, judge, with_verdicts
from mmedexpert.judging.controls import CONTROLS
from mmedexpert.judging.numbers import flat, numbers_of, per_pair
from mmedexpert.judging.prompts import orders_of
from mmedexpert.judging.reward_model import scored
from mmedexpert.names import BASELINES
from mmedexpert.reporting.judges import (
    HEADS,
    dimension_rows,
    heat_map,
    judge_rows,
    lead_of,
    paired_rows,
    part_rows,
    rate_rows,
)  # fmt: skip
from mmedexpert.reporting.tables import markdown, print_table
from mmedexpert.runtime.build import function
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.jsonl import read_lines
from mmedexpert.runtime.ranks import rank
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.runtime.versions import rule_of, text_of, versions
from mmedexpert.schema import BenchmarkConfig, Config
from mmedexpert.stages.answering import (
    Subject,
    answering_key,
    asking,
    engine_of,
    is_reward_model,
    reward_model_of,
    style_of,
)
from mmedexpert.stages.common import stage_run

STAGE = "verdicts"
BLIND = "-image_blind"


@dataclass(frozen=True)
class Set:
    """A prepared benchmark's pairs, the root of their images, and their identity, which follows their content."""

    benchmark: BenchmarkConfig
    source: Run
    pairs: list[Pair]
    image_root: Path
    identity: str


def evaluations_of(
    config: Config, benchmark: BenchmarkConfig, source: Run, subjects: Sequence[Subject]
) -> dict[str, partial[Run]]:
    """A run for each model as a judge, with `eval.image_blind` also without the images, and for each control."""
    judges = [subject for subject in subjects if subject.baseline is None]
    if not judges:
        raise UserError(f"benchmark {benchmark.name} asks a judge: name a model in eval.models (base, caci, a folder)")
    taken = next((one.name for one in judges if one.name in CONTROLS or one.name.endswith(BLIND)), None)
    if taken:
        raise UserError(f"a judge may not be called {taken}, as one without a model is: serve it under another name")
    ways = [(one, False) for one in judges]
    if config.eval.image_blind:
        ways += [(replace(one, name=f"{one.name}{BLIND}"), True) for one in judges]
    ways += [(Subject(name, name, baseline=name), False) for name in CONTROLS]
    records, image_root = load_records(source.folder)
    part = next(iter(benchmark.breakdowns), "organ")  # the pairs are in the parts of the first breakdown
    pairs = [pair_of(record, part) for record in records]
    asked = Set(benchmark, source, pairs, image_root, fingerprint(records, image_root))
    return {
        f"{benchmark.name}/{one.name}": partial(_judged, asked=asked, subject=one, blind=blind) for one, blind in ways
    }


def protocol_of(config: Config) -> str:
    """`protocol`; pairwise where it is auto."""
    return config.protocol if config.protocol != "auto" else "pairwise"


def _judged(config: Config, asked: Set, subject: Subject, blind: bool) -> Run:
    """One judge on one set of pairs; read anew, without asking, where the rules or settings changed since."""
    benchmark, source, pairs, name = asked.benchmark, asked.source, asked.pairs, asked.benchmark.name
    protocol, control = protocol_of(config), subject.baseline
    scalar = is_reward_model(subject)
    style = style_of(config, subject)
    # a trained judge as it was trained, but under their protocol; another is told by the question what to write
    theirs = protocol == "med_rewardbench" and not scalar
    prompt = config.model.system_prompt if subject.judge is not None and not theirs else None
    asks = [] if control or scalar else asks_of(
        pairs, asked.image_root, protocol=protocol, seed=config.seed, style=style, blind=blind
    )  # fmt: skip
    key: dict[str, Any] = {"protocol": protocol, "blind": blind, "engine": config.engine.name}
    if control is None:
        words = json.dumps([[ask.id, ask.text, list(names)] for _, _, ask, names in asks])
        key["asked"] = hashlib.sha256(words.encode()).hexdigest()[:16]
        key |= answering_key(asking(config), subject, prompt)
    inputs = {"questions": asked.identity, "model": subject.identity}
    trained = set((subject.judge or {}).get("trained_groups", ()))

    def summarise(run: Run, rows: list[Judgement]) -> dict[str, Any]:
        """The numbers, and the files that are made of them but summary.json, which says what they were judged by."""
        found = numbers_of(pairs, rows, num_resamples=config.eval.num_resamples, seed=config.seed)
        found |= {
            "protocol": protocol,
            "judged_by": _rules(config, benchmark),
            "left_out": len(source.manifest["left_out"]),
            "trained_on": sum(group_mark(pair) in trained for pair in pairs),
        }
        if benchmark.judge:
            found["theirs"] = function(benchmark.judge, f"benchmark.{name}.judge")(pairs, rows)
        found["rules"] = {rule: sum(row["rule"] == rule for row in rows) for rule in sorted({r["rule"] for r in rows})}
        scores = {score: per_pair(pairs, rows, score) for score in found["micro"]}
        write_json(run.folder / "per_pair.json", {"groups": [pair.group for pair in pairs], **scores})
        if table := part_rows(found):
            write_atomic(run.folder / "table.md", markdown(table).encode())
            heat_map(found, f"{subject.name} on {name}", run.folder / "table.png")
        return found

    def work(run: Run) -> dict[str, float]:
        with run.phase("ask"):
            if control is not None:
                rows = controlled(control, pairs, protocol=protocol, seed=config.seed)
            elif scalar:
                model = reward_model_of(asking(config), subject)
                rows = scored(
                    model, pairs, asked.image_root, run.folder / FILE, protocol=protocol, blind=blind,
                    title=f"{subject.name} {name}",
                )  # fmt: skip
            else:
                engine = engine_of(asking(config), subject, prompt)
                rows = judge(engine, asks, run.folder / FILE, protocol=protocol, title=f"{subject.name} {name}")
        with run.phase("summarise"):
            found = summarise(run, rows)
            write_json(run.folder / "summary.json", found)
            return flat(found)

    if control is not None:
        key["rules"] = {**versions("judge_controls", "rubrics"), "guidelines": {one: text_of(one) for one in DATA}}
    done = stage_run(config, STAGE, f"{subject.name}-{name}", key, work, inputs, sources={"questions": source})
    if rank() == 0 and done.reused and done.summary["judged_by"] != _rules(config, benchmark):
        if control is not None:
            rows = controlled(control, pairs, protocol=protocol, seed=config.seed)
        else:
            kept = {(r["id"], r["order"]): r for r in read_lines(done.folder / FILE, COLUMNS)}
            wanted = [(pair.id, order) for pair in pairs for order in orders_of(protocol)]
            if lost := next((one for one in wanted if one not in kept), None):
                raise UserError(f"{done.folder / FILE} lacks {lost[0]}: delete the folder, and judge again")
            rows = [with_verdicts(kept[one], protocol) for one in wanted]
        found = summarise(done, rows)
        write_json(done.folder / "metrics.json", flat(found))
        write_json(done.folder / "summary.json", found)  # last: a kill before it has all judged again
    return done


def _rules(config: Config, benchmark: BenchmarkConfig) -> str:
    """What verdicts and numbers depend on beside the replies."""
    told: list[Any] = [versions(protocol_of(config), "pair_numbers", "stats"), config.eval.num_resamples, config.seed]
    told += [benchmark.breakdowns, rule_of(benchmark.judge["_target_"]) if benchmark.judge else None]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def compare(config: Config, runs: Mapping[str, Run]) -> None:
    """The table of all judges of each set, and each against the first by pairs: printed, and beside the runs.

    p by bootstrap over images of the pairs' means over dimensions, adjusted by Holm over the judges of the set. # ours
    """
    if config.runs.explain or rank() > 0:
        return
    for name in dict.fromkeys(key.partition("/")[0] for key in runs):
        judges = {key.partition("/")[2]: run for key, run in runs.items() if key.startswith(f"{name}/")}
        summaries = {one: run.summary for one, run in judges.items()}
        first = next(one for one in judges if one not in (*CONTROLS, *BASELINES))
        score = lead_of(summaries[first])
        left = summaries[first]["left_out"]
        said = f"protocol {protocol_of(config)}; {summaries[first]['n']} pairs" + (f"; {left} left out" if left else "")
        tables = {
            f"Judges on {name}: percent right": judge_rows(summaries),
            f"By dimension: {HEADS[score]}": dimension_rows(summaries),
            "Place, length and ties": rate_rows(summaries),
            f"Against {first}": paired_rows(_paired(judges, first, score, config.seed), first, score),
        }
        path = judges[first].folder.parent / f"{name}-{protocol_of(config)}.md"
        text = "".join(f"## {title}\n\n{markdown(rows)}\n" for title, rows in tables.items())
        write_atomic(path, f"{said}\n\n{text}".encode())
        for title, rows in tables.items():
            print_table(rows, title, f"{said}\n{path}" if title.startswith("Judges") else "")
        lines = [
            f"{one} was trained on images or patients of {seen} of these {found['n']} pairs, and its numbers say "
            "little: ask it about others (load.split=test)"
            for one, found in summaries.items() if (seen := found.get("trained_on"))
        ]  # fmt: skip
        if left:
            lines.append(
                f"{name}: {left} pairs left out, see manifest.json in {judges[first].folder.parent.parent}/benchmark"
            )
        for line in lines:
            console.print(f"[yellow]{line}[/yellow]", highlight=False, soft_wrap=True)


def _paired(
    judges: Mapping[str, Run], first: str, score: str, seed: int
) -> dict[str, tuple[float, float, float, float]]:
    """Judge to its mean minus the first one's, interval and adjusted p."""
    read = {one: json.loads((run.folder / "per_pair.json").read_text(encoding="utf-8")) for one, run in judges.items()}
    values, groups = {one: told[score] for one, told in read.items()}, read[first]["groups"]
    found = {
        one: paired_cluster_bootstrap(values[one], values[first], groups, num_resamples=PAIRED_RESAMPLES, seed=seed)
        for one in judges if one != first
    }  # fmt: skip
    adjusted = holm([p for *_, p in found.values()])
    return {one: (*numbers[:3], p) for (one, numbers), p in zip(found.items(), adjusted, strict=True)}
