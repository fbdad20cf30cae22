"""`stage=judge`: train a judge of pairs of answers, and measure it on pairs that it was not trained on."""

from __future__ import annotations

from mmedexpert.runtime.runs import Run
from mmedexpert.schema import Config
from mmedexpert.stages import judging, train_judge
from mmedexpert.stages.answering import judge_subject
from mmedexpert.stages.common import together
from mmedexpert.stages.pretrain import base_of


def run(config: Config) -> dict[str, Run]:
    """The judge of `judge`; then it, and the judges without a model, on the validation pairs: a table."""
    made = train_judge.trained(config)
    one, source = train_judge.pairs_of(config, "val")
    asked = judging.evaluations_of(config, one, source, [judge_subject(config, made, base_of(config))])
    together(config, list(asked.values()))
    done = {name: evaluate(config) for name, evaluate in asked.items()}
    judging.compare(config, done)
    return {f"judge_{config.judge.name}": made, **done}
