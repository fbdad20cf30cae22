"""The table of the perspectives: what each gives alone, and what they reach together (`evaluation.perspectives`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mmedexpert.evaluation.predict import PROTOCOLS
from mmedexpert.guidelines import PERSPECTIVES

Row = dict[str, str]
COLUMNS = (
    "model", "asked under", "n", "questions", *(f"{protocol} [95% CI]" for protocol in PROTOCOLS), "right alone",
    "adherence", "criteria",
)  # fmt: skip
TOGETHER = {
    "vote": "vote", "mean": "mean over them", "best": "best one", "oracle": "any of them (oracle)",
    "gain": "gain of the vote", "agreement": "agreement", "kappa": "Fleiss' kappa",
}  # fmt: skip
SAID = (
    "Questions: the same under every perspective, or different, each perspective its own by a hash of the id: rows "
    "then compare questions as much as perspectives. Of the same: vote; mean over the perspectives; best one, chosen "
    "by these very questions; any of them right; gain, vote minus mean; agreement, the share of pairs of perspectives "
    "that pick alike (an unparsed answer agrees with nothing); kappa, agreement beyond chance. Right alone: questions "
    "that no other perspective has right (robust/medevalkit). Adherence, criteria: means in [0, 1], in brackets over "
    "how many answers where not all could be checked. A dash: not asked, or undefined."
)

GROUPS = "Accuracy by kind of question and perspective (robust), in brackets over how many answers."
NEEDS = "needs"  # a record's group: the perspective whose information decides it


def two_decimals(number: float) -> str:
    """`0.83`."""
    return f"{number:.2f}"


def perspective_rows(found: Mapping[str, Mapping[str, Any]], show: Callable[[float], str] = two_decimals) -> list[Row]:
    """Of each model (its name to `perspectives.measured`) a row per perspective, then what they reach together; a dash
    where not asked. No row where no model was asked under any. `show` writes accuracies."""
    rows: list[Row] = []
    for name, one in found.items() if any(one["each"] for one in found.values()) else ():
        each, together = one["each"], one["together"]
        same = {"questions": "the same" if together else "different" if len(each) > 1 else "-"}
        for perspective in dict.fromkeys((*PERSPECTIVES, *each)) if each else ("-",):
            asked = same | _asked(perspective, one, show) if perspective in each else {}
            rows.append({"model": name, "asked under": perspective, **asked})
        for measure, said in TOGETHER.items() if together else ():
            cells = {f"{protocol} [95% CI]": _reached(of, measure, show) for protocol, of in together.items()}
            first = together[PROTOCOLS[0]]
            n = first["oracle" if measure == "kappa" else measure]["n"]
            rows.append({"model": name, "asked under": said, "n": str(n), **same, **cells})
    return [{column: row.get(column, "-") for column in COLUMNS} for row in rows]


def group_rows(
    found: Mapping[str, Mapping[str, Any]], protocol: str, show: Callable[[float], str] = two_decimals
) -> list[Row]:
    """Of each model (its name to `perspectives.measured`) a row per value of a group of the records, and a column per
    perspective with its accuracy and how many questions; no row where no record has a group. Where records say which
    perspective they need, of that group alone: a set of several sources has dozens."""

    def shown(groups: Mapping[str, Any]) -> Mapping[str, Any]:
        return {NEEDS: groups[NEEDS]} if NEEDS in groups else groups

    return [
        {"model": name, "questions": f"{key} {value}"}
        | {p: f"{show(of[p][protocol]['accuracy'])} ({of[p][protocol]['n']})" if p in of else "-" for p in PERSPECTIVES}
        for name, one in found.items()
        for key, values in shown(one.get("groups", {})).items()
        for value, of in values.items()
    ]


def _asked(perspective: str, one: Mapping[str, Any], show: Callable[[float], str]) -> Row:
    """The cells of one perspective: accuracies, questions that it alone has right, adherence, criteria."""
    numbers = one["each"][perspective]
    row = {"n": str(numbers["n"])} | {f"{p} [95% CI]": _shown(numbers[p], "accuracy", show) for p in PROTOCOLS}
    if one["together"]:
        row["right alone"] = "/".join(str(one["together"][p]["alone"][perspective]) for p in PROTOCOLS)
    row["adherence"] = "-" if numbers["adherence"] is None else two_decimals(numbers["adherence"])
    said = []
    for name, value in numbers["criteria"].items():
        of = "" if value["n"] == numbers["judged"] else f" ({value['n']})"
        said.append(f"{name} -" if value["mean"] is None else f"{name} {two_decimals(value['mean'])}{of}")
    return row | {"criteria": ", ".join(said) or "-"}


def _reached(together: Mapping[str, Any], measure: str, show: Callable[[float], str]) -> str:
    if measure == "kappa":
        return "-" if together["kappa"] is None else two_decimals(together["kappa"])
    entry = together[measure]
    shown = _shown(entry, "accuracy" if "accuracy" in entry else "mean", show)
    return f"{shown} {entry['perspective']}" if measure == "best" else shown


def _shown(entry: Mapping[str, Any], mean: str, show: Callable[[float], str]) -> str:
    return f"{show(entry[mean])} [{show(entry['ci_low'])}, {show(entry['ci_high'])}]"
