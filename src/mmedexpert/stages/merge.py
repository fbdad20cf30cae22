"""One merge: experts and reasoners into one model by `merge.method`, its values found by `merge.search`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mmedexpert.data.records import fingerprint
from mmedexpert.engines.transformers import TransformersEngine
from mmedexpert.evaluation.predict import QuestionSet, predict
from mmedexpert.evaluation.summary import Summary
from mmedexpert.guidelines import instructions
from mmedexpert.merging.apply import merge_adapters
from mmedexpert.merging.conflicts import COLUMNS, Conflicts
from mmedexpert.merging.figures import conflict_figures
from mmedexpert.merging.grams import Grams
from mmedexpert.merging.rule import declared
from mmedexpert.merging.search import best_of, grid_points, merged_in_place
from mmedexpert.merging.stream import load_update
from mmedexpert.models.adapters import CONFIG
from mmedexpert.models.backbone import load_encoder, load_model
from mmedexpert.models.checkpoint import fingerprint_base
from mmedexpert.models.dense import FILE as DENSE
from mmedexpert.reporting.cards import Kind, write_card
from mmedexpert.reporting.tables import csv_text
from mmedexpert.reporting.tracking import log_table
from mmedexpert.runtime.build import build, values_of
from mmedexpert.runtime.files import write_atomic
from mmedexpert.runtime.runs import Run, console, write_json
from mmedexpert.runtime.versions import digest, rule_of, versions
from mmedexpert.schema import Config
from mmedexpert.scoring import medevalkit
from mmedexpert.stages.common import loading, model_key, records_of, stage_run
from mmedexpert.stages.data import dataset
from mmedexpert.stages.grams import grams, opened
from mmedexpert.stages.pretrain import base_of

SEARCH_SPLIT = "val"  # never test, and never trained on
MERGED = ("model", "adapter", "exact")  # what a merge leaves: each a folder of its run
TOLD = 0.01  # ours: share of an update's squared norm from which its loss is told


def ready(config: Config) -> Search | None:
    """The search of `merge.search`, for `merged`; None without one. Called before training.

    UserError for values that the method does not take and a search without validation questions.
    """
    build(config.merge.method or {}, "merge.method")
    return Search(config) if config.merge.search is not None else None


def merged(
    config: Config, experts: Mapping[str, Run], reasoners: Mapping[str, Run], search: Search | None = None
) -> Run:
    """Experts and reasoner updates, merged by `merge.method` into a copy of the base.

    With a `search` the method's values are the best of a grid on the validation split. Beside the model: what
    conflicted (`conflicts.json`, `conflicts.csv`, two figures), the points tried (`search.csv`), with
    `merge.lora_rank` the same merge as an adapter in `<folder>/adapter`, and with `merge.exact` as it is, not rounded
    to the base's dtype, in `<folder>/exact`: an adapter, or rows (`models/dense.py`), that evaluation asks.
    """
    settings, method = config.merge, config.merge.method or {}
    base = base_of(config)
    runs, seen = {**experts, **reasoners}, grams(config, experts, reasoners)
    sources = {name: r.folder / "adapter" for name, r in experts.items()}
    updates = {name: r.folder / "update" for name, r in reasoners.items()}

    def work(run: Run) -> dict[str, float]:
        chosen = dict(method)
        metrics: dict[str, float] = {}
        inputs_seen = opened(config, seen)
        for part in MERGED:
            shutil.rmtree(run.folder / part, ignore_errors=True)  # left by a try that died after the merge
        if search is not None:
            with run.phase("search"):
                rows = search.rows(run.folder, base.folder, sources, updates, inputs_seen)
            best = next(row for row in rows if row["best"])
            chosen |= search.points[best["point"]]
            run.notes["search"] = {"chosen": search.points[best["point"]], "split": SEARCH_SPLIT}
            numbers = {key: float(value) for key, value in best.items() if _is_number(value)}
            metrics |= {f"search/{key}": value for key, value in numbers.items() if key != "point"}
            lists = {k: v for k, v in search.points[best["point"]].items() if isinstance(v, list)}
            metrics |= {f"search/{name}/{i}": float(v) for name, values in lists.items() for i, v in enumerate(values)}
            metrics["search/points"] = float(len(rows))
            log_table(run.logger, "search", rows)
        conflicts = Conflicts([f"expert/{name}" for name in sources] + [f"reasoner/{name}" for name in updates])
        rule = build(chosen, "merge.method")
        with run.phase("merge"):
            metrics |= merge_adapters(
                base.folder, run.folder / "model", sources, updates, rule, conflicts=conflicts, grams=inputs_seen
            )
            tell_rounding(config, metrics, run.folder)
            if settings.exact:
                merge_adapters(base.folder, run.folder / "exact", sources, updates, rule, grams=inputs_seen, exact=True)
            if settings.lora_rank is not None:
                metrics |= merge_adapters(
                    base.folder, run.folder / "adapter", sources, updates, rule, grams=inputs_seen,
                    lora_rank=settings.lora_rank,
                )  # fmt: skip
        with run.phase("report"):
            figures = write_report(run.folder, conflicts, f"{settings.name}: {_told(chosen)}")
        metrics |= conflicts.report()
        log_table(run.logger, "conflicts", conflicts.table())
        charts = [{"figure": name, "image": path} for name, path in figures.items()]
        log_table(run.logger, "figures", charts, images=True)
        ingredients = {n: load_update(path, base.folder).fingerprint for n, path in {**sources, **updates}.items()}
        for part in MERGED:
            if (run.folder / part).is_dir():
                kind, library = held_in(run.folder / part)
                write_card(
                    run.folder / part, kind=kind, title=f"merged model ({settings.name})",
                    base_model=config.model.name_or_path, base_fingerprint=fingerprint_base(base.folder),
                    method=f"CACI, {chosen.get('_target_', '').rpartition('.')[2]}: {_told(chosen)}"
                    + ("; values chosen on the validation split" if search is not None else ""),
                    data={"data of the experts": "see their cards"}, specialty=None, ingredients=ingredients,
                    metrics=None, library_name=library,
                )  # fmt: skip
        return metrics

    rules = rule_of(str(method.get("_target_", "")))
    key: dict[str, Any] = {"merge": values_of(method), "rules": rules}
    inputs = {"base": base.identity, **{name: r.run_id for name, r in runs.items()}}
    inputs |= {f"grams/{name}": r.run_id for name, r in seen.items()}
    if settings.lora_rank is not None:
        key["lora_rank"] = settings.lora_rank
    if settings.exact:
        key["exact"] = True
    if search is not None:
        key["search"], inputs["data"] = search.key, search.content
    asked = {"data": search.data} if search is not None else {}
    return stage_run(config, "caci", settings.name, key, work, inputs, sources=asked)


def held_in(folder: Path) -> tuple[Kind, Literal["peft", "transformers"] | None]:
    """What a folder of a merge holds, and the library that loads it, as its card says."""
    if (folder / CONFIG).is_file():
        return "adapter", "peft"
    return ("update", None) if (folder / DENSE).is_file() else ("merged", "transformers")


def tell_rounding(config: Config, metrics: Mapping[str, float], folder: Path) -> None:
    """A line where the model that is written has lost much of the merge to 16 bits."""
    lost = metrics.get("rounding_lost", 0.0)
    if lost > TOLD:
        told = (
            f"evaluation asks {folder / 'exact'}" if config.merge.exact else "merge.exact=true keeps and asks it whole"
        )
        console.print(
            f"[yellow]{folder / 'model'}: its 16 bits change the merged update by {100 * lost:.0f}% of its squared "
            f"norm; {told}[/yellow]", highlight=False, soft_wrap=True,
        )  # fmt: skip


class Search:
    """The grid of `merge.search` and the validation questions that judge its points."""

    def __init__(self, config: Config) -> None:
        self.config, self.data = config, dataset(config)
        self.rule = build(config.merge.method or {}, "merge.method")
        self.points = grid_points(config.merge.search or {}, declared(self.rule).scalings)
        records, image_root = records_of(self.data, SEARCH_SPLIT, config.specialty.names)
        name, self.content = f"{self.data.name}-{SEARCH_SPLIT}", fingerprint(records, image_root)
        self.questions = QuestionSet(name, records, image_root, medevalkit.ask, medevalkit.judge)
        self.protocol = "robust" if config.protocol == "auto" else config.protocol
        self.key = {
            "grid": config.merge.search, "split": SEARCH_SPLIT, "specialties": config.specialty.names,
            "protocol": self.protocol, "perspectives": config.eval.perspectives,
            "model": {**model_key(config), "max_new_tokens": config.model.max_new_tokens},
            "rules": versions("prompts", "rotate", "metrics", "stats", self.protocol),
            **({"exact": True} if config.merge.exact else {}),
            "instructions": digest(instructions(config.model.instructions)),
        }  # fmt: skip

    def rows(
        self, folder: Path, base: Path, experts: Mapping[str, Path], reasoners: Mapping[str, Path], seen: Grams | None
    ) -> list[dict[str, Any]]:
        """One row per point with its accuracy, also in `search.csv`; the merges are made in memory, on one model.

        Answers are kept in `<folder>/search`, so that a killed search goes on where it was.
        """
        config, rows = self.config, []
        (folder / "search").mkdir(exist_ok=True)
        model, encoder = load_model(base, loading(config)), load_encoder(base, loading(config))
        encoder.system_prompt = None if self.protocol == "medevalkit" else config.model.system_prompt
        engine = TransformersEngine(
            model.requires_grad_(False), encoder, batch_size=config.engine.batch_size,
            max_new_tokens=config.model.max_new_tokens,
        )  # fmt: skip
        updates = [load_update(path, base) for path in [*experts.values(), *reasoners.values()]]
        sees = any("visual" in name for update in updates for name in update.shapes)
        numbers = Summary(num_resamples=config.eval.num_resamples, seed=config.seed)
        merges = merged_in_place(model, updates, len(experts), self.rule, self.points, seen, exact=config.merge.exact)
        for place, point in enumerate(merges):
            if sees:  # what the encoder keeps of an image is another vision tower's
                engine.encoder = load_encoder(base, loading(config))
                engine.encoder.system_prompt = encoder.system_prompt
            answers = predict(
                engine, self.questions, folder / "search" / f"{place:04d}.jsonl", protocol=self.protocol,
                perspectives=config.eval.perspectives, style=config.model.instructions,
                title=f"point {place + 1} of {len(self.points)}",
            )  # fmt: skip
            found = numbers.of(
                answers, self.questions.records, protocol=self.protocol, specialties=config.specialty.names
            )
            rows.append({
                "point": place, **{name: value if _is_number(value) else str(value) for name, value in point.items()},
                **{name: found[name] for name in ("macro_accuracy", "macro_ci_low", "macro_ci_high", "n")},
                "parse_failure_rate": found["parse_failure_rate"],
            })  # fmt: skip
        best = best_of([row["macro_accuracy"] for row in rows])
        rows = [{**row, "best": row["point"] == best} for row in rows]
        write_atomic(folder / "search.csv", csv_text(rows).encode())
        return rows


def write_report(folder: Path, conflicts: Conflicts, title: str) -> dict[str, Path]:
    """`conflicts.json` (with what its columns mean), `conflicts.csv` and the figures, whose PNGs are returned."""
    rows, cosines = conflicts.table(), conflicts.cosines()
    alike = [[None if value != value else value for value in row] for row in cosines]
    whole = {key: value for key, value in conflicts.report().items() if not key.startswith("layers/")}
    content = {
        "merge": title, "updates": conflicts.names, "columns": COLUMNS, "all": whole, "cosines": alike, "rows": rows,
    }  # fmt: skip
    write_json(folder / "conflicts.json", content)
    write_atomic(folder / "conflicts.csv", csv_text(rows).encode())
    return conflict_figures(folder, rows, conflicts.names, cosines, title)


def _told(method: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in method.items() if value is not None and not key.startswith("_"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
