"""`python -m mmedexpert.reporting.workspace --experiment ablation_init`: W&B's workspace and report of an experiment.

The panels are data, so that a test compares them with what runs log; `wandb-workspaces` draws them, and saving needs a
login. Runs are grouped by arm over seeds, and curves stand over the trainer's step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mmedexpert.errors import UserError
from mmedexpert.guidelines import PERSPECTIVES
from mmedexpert.reporting.finals import STEP
from mmedexpert.reporting.tracking import logged_in

ARM, STAGE, EXPERIMENT = (
    "arm",
    "stage",
    "experiment",
)  # keys of the config that every run has, an arm where it is of one


@dataclass(frozen=True)
class Panel:
    """A chart of names that runs of one stage log: curves, the summary's numbers as bars, a table, or how config keys
    go with a number of the summary (the last name)."""

    title: str
    names: tuple[str, ...]
    kind: Literal["curve", "bar", "table", "parallel"] = "curve"


def panels(stage: str, split: str = "test") -> dict[str, list[Panel]]:
    """The sections of a stage's dashboard; `split` is `eval.split`, or a benchmark's name."""
    accuracy = f"{split}/macro_accuracy"
    sections = {
        "gba": {
            "Final numbers": [
                _bar("Macro accuracy", accuracy),
                _bar("95% interval", f"{split}/macro_ci_low", f"{split}/macro_ci_high"),
                _bar("Gain of the reward, first to last fifth", "reward/gain"),
                _bar("Accuracy in training, last fifth", "accuracy/end"),
                _bar("Adherence, last fifth", "adherence/end"),
                _bar("Share of the perspectives in the advantage, last fifth", "share/end"),
                _weights(accuracy),
            ],
            "Learning": [
                _curve("Reward", "reward"),
                _curve("Accuracy of completions", "rewards/accuracy/mean"),
                _curve("Format", "rewards/format/mean"),
                _curve("Adherence", "adherence"),
                _curve("Share of the perspectives in the advantage", "advantages/share"),
                _curve("Groups without signal", "frac_reward_zero_std"),
            ],
            "Perspectives": [
                *(_curve(f"Adherence, {name}", f"adherence/{name}") for name in PERSPECTIVES),
                *(_curve(f"Size of the term, {name}", f"advantages/{name}/mean_abs") for name in PERSPECTIVES),
            ],
            "Policy": [
                _curve("Loss", "loss"),
                _curve("Entropy", "entropy"),
                _curve("Gradient norm", "grad_norm"),
                _curve("Skipped steps", "skipped_steps"),
                _curve("Clipped", "clip_ratio/region_mean"),
                _curve("Sampled against trained log-probabilities", "sampling/sampling_logp_difference/mean"),
                _curve("Length of completions", "completions/mean_length"),
                _curve("Completions cut off", "completions/clipped_ratio"),
            ],
            "Machine": [
                _curve("Seconds a step", "step_time"),
                _curve("Sampling, grading and update", "timing_s/gen", "timing_s/reward", "timing_s/update_actor"),
                _curve("Tokens a second", "perf/throughput"),
                _memory(),
            ],
            "Completions": [Panel("Completions", ("completions",), "table")],
        },
        "dsa": {
            "Final numbers": [_bar("Macro accuracy", accuracy), _bar("Loss, last fifth", "loss/end")],
            "Learning": [
                _curve("Loss", "loss"),
                _curve("Token accuracy", "mean_token_accuracy"),
                _curve("Gradient norm", "grad_norm"),
                _memory(),
            ],
        },
        "caci": {
            "Final numbers": [
                _bar("Macro accuracy", accuracy),
                _bar("95% interval", f"{split}/macro_ci_low", f"{split}/macro_ci_high"),
            ],
            "Conflicts": [
                _bar("Signs in conflict, and by chance", "sign_conflict_rate", "sign_conflict_chance"),
                _bar("Mean cosine of the updates", "mean_cosine"),
                _bar("Norm of the merge", "merged_norm"),
                Panel("By layer", ("conflicts",), "table"),
                Panel("Figures", ("figures",), "table"),
            ],
        },
        "pipeline": {
            "Final numbers": [
                _bar("Macro accuracy of the last model", accuracy),
                _bar("95% interval", f"{split}/macro_ci_low", f"{split}/macro_ci_high"),
                _bar("Unparsed answers", f"{split}/parse_failure_rate"),
                _weights(accuracy),
                Panel("Models", ("models",), "table"),
            ],
        },
    }
    return sections[stage]


STAGES = ("pipeline", "gba", "caci", "dsa")  # of a report, in this order
# whose runs an experiment compares; else pipeline
UNITS = {
    **dict.fromkeys(("ablation_gba_weights", "ablation_init", "data_filtering"), "gba"),
    **dict.fromkeys(
        ("table_main", "ablation_components", "ablation_merge", "ablation_specialties", "scaling", "perspectives",
         "merge_search"), "caci",
    ),
}  # fmt: skip


def workspace(entity: str, project: str, experiment: str | None, stage: str, split: str = "test") -> Any:
    """The workspace of an experiment: the runs of one stage, grouped by arm."""
    ws, wr, expr = _library()
    sections = [
        ws.Section(name=name, panels=[_drawn(wr, panel) for panel in listed], is_open=True)
        for name, listed in panels(stage, split).items()
    ]
    numbers = [f"{split}/macro_{part}" for part in ("accuracy", "ci_low", "ci_high")]
    return ws.Workspace(
        entity=entity, project=project, name=_title(experiment, stage), sections=sections,
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=_filter(experiment, stage), groupby=[expr.Config(ARM)],
            pinned_columns=[f"config:{ARM}.value", "config:seed.value", *(f"summary:{number}" for number in numbers)],
        ),
    )  # fmt: skip


def report(entity: str, project: str, experiment: str | None, split: str = "test") -> Any:
    """The report of an experiment: a grid of panels per stage."""
    _, wr, _ = _library()
    blocks: list[Any] = [wr.TableOfContents()]
    for stage in STAGES:
        listed = [_drawn(wr, panel) for section in panels(stage, split).values() for panel in section]
        runs = wr.Runset(
            entity=entity, project=project, name=stage, filters=_filter(experiment, stage), groupby=[f"config.{ARM}"]
        )
        blocks += [wr.H1(stage), wr.PanelGrid(runsets=[runs], panels=listed)]
    return wr.Report(entity=entity, project=project, title=_title(experiment, "report"), blocks=blocks, width="fluid")


def main(arguments: Sequence[str] | None = None) -> int:
    """Save both and print their addresses; exit code 2 and one line without a login or the library."""
    parser = argparse.ArgumentParser(prog="python -m mmedexpert.reporting.workspace", description=__doc__)
    parser.add_argument("--experiment", help="logger.experiment of the runs; without it all runs of the project")
    parser.add_argument("--stage", choices=STAGES, help="whose runs the workspace compares")
    parser.add_argument("--split", default="test", help="eval.split, or the name of a benchmark")
    parser.add_argument("--project", default="mmedexpert", help="logger.project of the runs")
    parser.add_argument("--entity", help="user or team; the default is that of the login")
    given = parser.parse_args(arguments)
    try:
        import wandb

        _library()
        if not logged_in(str(wandb.setup().settings.base_url)):
            raise UserError("a workspace is saved in your W&B account: call wandb login first")
        entity = str(given.entity or wandb.Api().default_entity)
        stage = given.stage or UNITS.get(given.experiment or "", "pipeline")
        print(workspace(entity, given.project, given.experiment, stage, given.split).save().url)
        print(report(entity, given.project, given.experiment, given.split).save().url)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _curve(title: str, *names: str) -> Panel:
    return Panel(title, names)


def _bar(title: str, *names: str) -> Panel:
    return Panel(title, names, "bar")


def _weights(number: str) -> Panel:
    keys = tuple(f"gba.weights.{name}" for name in PERSPECTIVES)
    return Panel("Weights of the perspectives", (*keys, number), "parallel")


def _memory() -> Panel:
    return Panel(
        "Memory, GB (of the GPU, else of the process)", ("perf/max_memory_allocated_gb", "perf/cpu_memory_used_gb")
    )


def _library() -> tuple[Any, Any, Any]:
    try:
        import wandb_workspaces.expr as expr
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError("workspaces need one more package: python -m pip install wandb-workspaces") from error
    return workspaces, reports, expr


def _drawn(wr: Any, panel: Panel) -> Any:
    if panel.kind == "curve":
        return wr.LinePlot(title=panel.title, x=STEP, y=list(panel.names))
    if panel.kind == "bar":
        return wr.BarPlot(title=panel.title, metrics=list(panel.names), orientation="v")
    if panel.kind == "table":
        return wr.WeavePanelSummaryTable(table_name=panel.names[0])
    *keys, number = panel.names
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key)) for key in keys]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(number)))
    return wr.ParallelCoordinatesPlot(title=panel.title, columns=columns)


def _filter(experiment: str | None, stage: str) -> str:
    # a merge that its experts taught is the run of stage distil
    found = f"Config('{STAGE}') in ['caci', 'distil']" if stage == "caci" else f"Config('{STAGE}') = '{stage}'"
    return found + (f" and Config('{EXPERIMENT}') = '{experiment}'" if experiment else "")


def _title(experiment: str | None, what: str) -> str:
    return f"{experiment or 'mmedexpert'}: {what}"


if __name__ == "__main__":
    sys.exit(main())
