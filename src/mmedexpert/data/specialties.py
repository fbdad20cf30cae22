"""The specialties of a question, by rules that are kept as data (`specialties.yaml`), each decision with its evidence.

Source: the four specialties are those of MMedExpert-R1; it publishes no rule that finds them. # ours, all of it
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from mmedexpert.data.ages import age_group, group_of
from mmedexpert.data.phrases import Phrases, words_of
from mmedexpert.errors import UserError, suggestion

# where two labels have one score, the earlier is the primary one: a child with a brain tumour is a child first
SPECIALTIES = ("pediatrics", "brain_sensory", "oncology_surgery", "adult_medicine")
RULE, DATASET_MAP = "rule", "dataset_map"  # methods: what the text says; what a benchmark says of its question
# what rules read. `now` is the stem without sentences of the medical history, `asked` its last sentence and the gold
# option, `case` the stem and the gold option
TEXTS = ("stem", "now", "asked", "gold", "case", "age")
METADATA = (
    "body_system", "medical_task", "question_type", "department", "set", "modality", "organ", "sex", "task"
)  # fmt: skip
ALIASES = {
    "dataset": "set", "dataset_name": "set", "source": "set", "image_organ": "organ", "region": "organ",
    "anatomy": "organ", "modality_type": "modality", "clinical_vqa_task": "task", "gender": "sex",
    "patient_age": "age", "system": "body_system",
}  # fmt: skip
MARKS = ("ignored", "negations", "families", "histories")
CHOICES = re.compile(r"\n\s*(?:answer choices|options|choices)\s*:.*|answer choices\s*:.*", re.IGNORECASE | re.DOTALL)
# "... A)one, B)two", but not "Figures A) and B)"
INLINE = re.compile(r"\s(?<!igure )(?<!igures )(?<!mage )(?<!mages )(?<!anel )\(?A\)\s?\S.*?\s\(?B\)\s?\S.*", re.DOTALL)
SENTENCE = re.compile(r"(?<=[.?!])\s+|\n+")


@dataclass(frozen=True)
class Label:
    """A specialty of a question. `evidence` is the rule's id and the words or the field that decided."""

    label: str
    score: float
    method: str
    evidence: str
    version: int

    def as_dict(self) -> dict[str, Any]:
        """As it stands in `Record.provenance["labels"]`."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """Votes for `label` with `score` where each field of `when` holds one of its phrases (`least`: so many different
    ones) and no field of `unless` does; `why` is for the reader of the file."""

    id: str
    label: str
    score: float
    why: str
    when: Mapping[str, Mapping[str, None]]  # of each field its phrases, an ordered set
    unless: Mapping[str, Mapping[str, None]] = field(default_factory=dict)
    least: int = 1

    @property
    def method(self) -> str:
        """By text, or by what a benchmark says."""
        return DATASET_MAP if self.when and set(self.when) <= set(METADATA) else RULE

    def evidence(self, found: Mapping[str, Mapping[str, str]]) -> str:
        """The words that decided, `stem "fracture"`, of the phrases found in each field; empty where it does not."""
        told = []
        for name, phrases in self.when.items():
            here = found[name]
            if here.keys().isdisjoint(phrases.keys()):
                return ""
            hits = {here[phrase]: None for phrase in phrases if phrase in here}
            if len(hits) < self.least:
                return ""
            told.append(f"{name} {', '.join(f'{words!r}' for words in list(hits)[: max(2, self.least)])}")
        if not all(found[name].keys().isdisjoint(phrases.keys()) for name, phrases in self.unless.items()):
            return ""
        return f"{self.id}: {'; '.join(told) or 'whatever is read'}"


@dataclass(frozen=True)
class Rules:
    """All rules in order. Phrases of `marks` say how to read: those ignored are no evidence; a negation takes away what
    follows it, up to `reach` words, a relative the rest of the clause; a history marks its sentence."""

    version: int
    rules: tuple[Rule, ...]
    phrases: Phrases  # of rules and marks
    marks: Mapping[str, str]  # phrases to one of MARKS
    ends: frozenset[str]
    reach: int


def labels(
    *,
    question: str,
    options: Mapping[str, str] | None = None,
    answer: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> list[Label]:
    """The specialties of a question, the primary one first. `answer` is a letter of `options` or a text; options other
    than the gold one are not read. `metadata`: what a benchmark tells (METADATA, ALIASES, `age`); other keys are
    ignored."""
    rules = read_rules()
    found = _found(rules, question, options, answer, metadata or {})
    best: dict[str, Label] = {}
    for rule in rules.rules:
        known = best.get(rule.label)
        if (known is None or rule.score > known.score) and (evidence := rule.evidence(found)):
            best[rule.label] = Label(rule.label, rule.score, rule.method, evidence, rules.version)
    return sorted(best.values(), key=lambda label: (-label.score, SPECIALTIES.index(label.label)))


def primary_specialty(
    *,
    question: str,
    options: Mapping[str, str] | None = None,
    answer: str = "",
    metadata: Mapping[str, Any] | None = None,
) -> str:
    """The specialty a question belongs to first; arguments as those of `labels`."""
    return labels(question=question, options=options, answer=answer, metadata=metadata)[0].label


@cache
def read_rules(path: Path | None = None) -> Rules:
    """The rules of a file, as shipped without one. Raises UserError naming the rule and what is wrong with it."""
    file = path or Path(str(files(__package__).joinpath("specialties.yaml")))
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(error).split())}") from error
    parts = ("version", *MARKS, "ends", "reach", "rules")
    if not isinstance(data, dict) or set(data) != set(parts):
        raise UserError(f"{file} must hold the keys {', '.join(parts)}, and no others")
    for kind in MARKS:
        _check(data[kind], f"{file}, {kind}")
    rules = tuple(_rule(row, file) for row in data["rules"] or ())
    ids = [rule.id for rule in rules]
    if twice := [name for name in ids if ids.count(name) > 1]:
        raise UserError(f"{file}: two rules are called {twice[0]!r}; give each its own id")
    if not any(rule.label == SPECIALTIES[-1] and rule.when == {} for rule in rules):
        raise UserError(f"{file}: no rule votes for {SPECIALTIES[-1]} whatever is read; add one with `when: {{}}`")
    every = [phrase for rule in rules for part in (rule.when, rule.unless) for row in part.values() for phrase in row]
    marks = {phrase: kind for kind in MARKS for phrase in data[kind]}
    phrases = Phrases([*marks, *every])
    return Rules(data["version"], rules, phrases, marks, frozenset(data["ends"]), data["reach"])


def _check(phrases: Any, where: str) -> None:
    if not isinstance(phrases, list) or not phrases:
        raise UserError(f"{where}: no list of phrases")
    try:
        Phrases(phrases)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, AttributeError) as error:  # YAML reads a bare no, on, 12 as something else
        raise UserError(f"{where}: every phrase is a text; put quotes around numbers, yes, no, on and off") from error


def _rule(row: Any, file: Path) -> Rule:
    name = row.get("id") if isinstance(row, dict) else None
    where = f"{file}, rule {name!r}"
    if not isinstance(name, str):
        raise UserError(f"{file}: the rule {str(row)[:60]!r} has no id; give it one")
    known = [part.name for part in fields(Rule)]
    if unknown := [key for key in row if key not in known]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}{suggestion(unknown[0], known)}")
    if missing := [key for key in ("label", "score", "why", "when") if key not in row]:
        raise UserError(f"{where} has no {missing[0]}")
    if row["label"] not in SPECIALTIES:
        raise UserError(f"{where}: unknown label {row['label']!r}{suggestion(str(row['label']), SPECIALTIES)}")
    if not isinstance(row["score"], float) or not 0 < row["score"] <= 1:
        raise UserError(f"{where}: score {row['score']!r} is no number above 0 and up to 1; write it as 0.5 or 1.0")
    for part in ("when", "unless"):
        if not isinstance(row.get(part, {}), dict):
            raise UserError(f"{where}: {part} must be fields with lists of phrases, such as stem: [fracture*]")
        for read, phrases in row.get(part, {}).items():
            if read not in TEXTS + METADATA:
                raise UserError(f"{where}: unknown field {read!r}{suggestion(read, TEXTS + METADATA)}")
            _check(phrases, f"{where}, {part}.{read}")
    sets = {
        part: {read: dict.fromkeys(row[part][read]) for read in row[part]} for part in ("when", "unless") if part in row
    }
    return Rule(**row | sets)


def _found(
    rules: Rules, question: str, options: Mapping[str, str] | None, answer: Any, metadata: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """The phrases of the rules in each field that they read, with the words that matched."""
    options = {str(letter): str(text) for letter, text in (options or {}).items()}
    answer = answer[0] if isinstance(answer, (list, tuple)) and answer else answer
    letter = str(answer or "").strip()
    text = options.get(letter, options.get(letter.upper(), "" if options and len(letter) == 1 else letter))
    gold, _ = _read(rules, text)
    stem = _without_choices(question, options)
    found: dict[str, dict[str, str]] = {"stem": {}, "now": {}, "gold": gold, "asked": gold, "case": {}}
    asked = False
    for sentence in SENTENCE.split(stem):
        here, history = _read(rules, sentence)
        found["stem"] = here | found["stem"]
        if not history:
            found["now"] = here | found["now"]
        if sentence.strip() and ("?" in sentence or not asked):
            found["asked"] = here | gold
            asked = "?" in sentence
    found["case"] = gold | found["stem"]
    told = _told(metadata)
    group, said = group_of(told["age"]) if "age" in told else ("", "")
    if not group:
        group, said = age_group(stem)
    found["age"] = {group: said} if group else {}
    return found | {name: rules.phrases.find(words_of(told[name])) if name in told else {} for name in METADATA}


def _told(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata by the names that rules know, however they are spelled; two of one name one after the other."""
    told: dict[str, str] = {}
    for given, value in metadata.items():
        key = re.sub(r"[\W_]+", "_", str(given).strip().lower()).strip("_")
        key = ALIASES.get(key, key)
        if value not in (None, ""):
            told[key] = f"{told[key]} . {value}" if key in told else str(value)
    return told


def _without_choices(question: str, options: Mapping[str, str]) -> str:
    """The stem, where options stand behind it: "Answer Choices: (A) ..." or "A)..., B)..."."""
    stem = CHOICES.sub("", question)
    if "A)" in stem and "B)" in stem:
        stem = INLINE.sub("", stem)
    for letter, text in list(options.items())[:1]:
        places = [stem.find(f"{letter}{mark}{text}") for mark in (") ", ")", ". ", ".", ": ")]
        stem = stem[: min((place for place in places if place > 0), default=len(stem))]
    return stem


def _read(rules: Rules, text: str) -> tuple[dict[str, str], bool]:
    """The phrases in a text, but for what it denies, tells of relatives, or means otherwise (`nasal cannula`); whether
    it is about the medical history."""
    words = words_of(text)
    hits = rules.phrases.hits(words)
    taken: set[int] = set()  # places of words that are no evidence
    history = False
    for phrase, place, end in hits:
        kind = rules.marks.get(phrase)
        if kind in ("negations", "families"):
            limit = len(words) if kind == "families" else min(len(words), end + rules.reach)
            end = next((at for at in range(end, limit) if words[at] in rules.ends or at in taken), limit)
        if kind == "histories":
            history = True
        elif kind:
            taken.update(range(place, end))
    found: dict[str, str] = {}
    for phrase, place, end in hits:
        if phrase not in found and taken.isdisjoint(range(place, end)):
            found[phrase] = " ".join(words[place:end])
    return found, history
